"""A stand-in accelerator for torch, which gives a machine without a GPU a device with memory, streams and events of its own.

:func:`build` compiles ``standin.cpp`` against the headers of the installed torch (g++ alone, 9 s); :func:`load` registers it
as torch's device type "standin", and with daskinfer as a :class:`StandInBackend`. Both last for the process, and change what
``torch.accelerator`` is: use a process of its own. Environment variables set the devices and their memory; see the head of
``standin.cpp``.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from daskinfer.worker.backends import BACKENDS, DeviceBackend, DeviceMemory

DEVICE_TYPE = "standin"
_SOURCE = Path(__file__).with_name("standin.cpp")
_FLAGS = ("-std=c++20", "-O0", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-interference-size")
# Operations that autocast runs in low precision (True) or in float32 (False).
_AUTOCAST_OPERATIONS = {"linear": True, "conv2d": True, "matmul": True, "softmax.int": False}
_registered_libraries: list[torch.library.Library] = []  # torch drops the registrations of a library that is deleted


class StandIn:
    """The loaded stand-in: the log of its calls, the violations that it found, and errors to inject."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def read_log(self) -> list[str]:
        """Return a line per copy, kernel, wait and synchronisation since the last call, and clear them."""
        lines = self._library.standin_read_log().decode().splitlines()
        self._library.standin_clear()
        return list(lines)

    def read_violations(self) -> list[str]:
        """Return a line per access that did not wait for the work it depends on."""
        return list(self._library.standin_read_violations().decode().splitlines())

    def fail_next(self, message: str) -> None:
        """Let the next kernel fail with a message; if it contains "illegal", all later kernels fail too."""
        self._library.standin_fail_next(message.encode())


class StandInBackend(DeviceBackend):
    """The stand-in as daskinfer's worker uses it."""

    device_type = DEVICE_TYPE
    out_of_memory_phrases = ("standin out of memory",)

    def is_available(self) -> bool:
        return torch.accelerator.is_available()

    @property
    def first_device(self) -> torch.device:
        return torch.device(DEVICE_TYPE, 0)

    def get_device_name(self, device: torch.device) -> str:
        return "Stand-in"

    def get_uuid(self, device: torch.device) -> str:
        return f"GPU-{_read_uuid(device.index or 0)}"

    def check_pinned(self, device_name: str, uuid: str) -> None:
        assert self.get_uuid(self.first_device) == uuid

    def get_memory(self, device: torch.device) -> DeviceMemory | None:
        free, total = torch.accelerator.get_memory_info(device)
        return DeviceMemory(total, free)

    def get_peak_nbytes(self, device: torch.device) -> int:
        return int(torch.accelerator.max_memory_allocated(device))

    def empty_cache(self) -> None:
        torch.accelerator.empty_cache()

    def is_sticky(self, error: BaseException) -> bool:
        return "illegal memory access" in str(error)


def build(directory: Path) -> Path:
    """Compile the library into ``directory``; return its path."""
    root, library = Path(torch.__file__).parent, directory / "libstandin.so"
    includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    links = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
    subprocess.run(["g++", *_FLAGS, *includes, str(_SOURCE), *links, "-o", str(library)], check=True)
    return library


def load(library: Path) -> StandIn:
    """Register the stand-in with torch and daskinfer, for the rest of this process."""
    torch.ops.load_library(str(library))
    functions = ctypes.CDLL(str(library))
    for name in ("standin_read_log", "standin_read_violations"):
        getattr(functions, name).restype = ctypes.c_char_p
    for name in ("standin_get_free_nbytes", "standin_get_total_nbytes"):
        getattr(functions, name).restype = ctypes.c_longlong
    torch.utils.rename_privateuse1_backend(DEVICE_TYPE)
    torch._register_device_module(DEVICE_TYPE, _make_module(functions))
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=False)
    _register_autocast()
    BACKENDS[DEVICE_TYPE] = StandInBackend()
    return StandIn(functions)


def _make_module(functions: ctypes.CDLL) -> types.ModuleType:
    """Make what torch expects as ``torch.standin``."""

    def get_properties(device: Any = 0) -> types.SimpleNamespace:
        index = device if isinstance(device, int) else torch.device(device).index or 0
        total = functions.standin_get_total_nbytes()
        return types.SimpleNamespace(name="Stand-in", total_memory=total, uuid=_read_uuid(index))

    def set_device(device: Any) -> None:
        functions.standin_set_device(device if isinstance(device, int) else torch.device(device).index or 0)

    module = types.ModuleType(f"torch.{DEVICE_TYPE}")
    members: dict[str, Callable[..., Any]] = {
        "is_available": lambda: functions.standin_count_devices() > 0,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "device_count": functions.standin_count_devices,
        "current_device": functions.standin_get_device,
        "set_device": set_device,
        "manual_seed_all": lambda seed: None,
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
        "get_device_properties": get_properties,
        "get_device_name": lambda device=0: "Stand-in",
        "mem_get_info": lambda device=0: (functions.standin_get_free_nbytes(0), functions.standin_get_total_nbytes()),
    }
    for name, member in members.items():
        setattr(module, name, member)
    return module


def _read_uuid(index: int) -> str:
    visible = os.environ.get("STANDIN_VISIBLE")
    number = int(visible.split(",")[index]) if visible else index
    return f"00000000-0000-0000-0000-{number:012}"


def _register_autocast() -> None:
    operations, others = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    _registered_libraries.extend((operations, others))
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name, is_low in _AUTOCAST_OPERATIONS.items():
        operation, _, overload = name.partition(".")
        kernel = getattr(getattr(torch.ops.aten, operation), overload or "default")
        operations.impl(name, _make_autocast_kernel(kernel, is_low=is_low), "AutocastPrivateUse1")


def _make_autocast_kernel(kernel: Callable[..., Any], *, is_low: bool) -> Callable[..., Any]:
    def cast(value: Any, dtype: torch.dtype) -> Any:
        is_castable = isinstance(value, torch.Tensor) and value.is_floating_point() and value.device.type == DEVICE_TYPE
        return value.to(dtype) if is_castable else value

    def run(*arguments: Any) -> Any:
        dtype = torch.get_autocast_dtype(DEVICE_TYPE) if is_low else torch.float32
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return kernel(*(cast(argument, dtype) for argument in arguments))

    return run
