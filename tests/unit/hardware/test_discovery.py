from __future__ import annotations

import ctypes
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from daskinfer.hardware import host
from daskinfer.hardware.discovery import Machine, inspect_machine
from tests.support.nvml_stand_in import LIBRARY, build

GPU = "GPU-00000000-0000-0000-0000-{:012d}".format
MIG = "MIG-00000000-0000-0000-0000-{:012d}".format


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Build the library; its folder, and an environment in which a process finds it."""
    folder = tmp_path_factory.mktemp("nvml")
    return folder, build(folder)


@pytest.fixture
def nvml(stand_in: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Make this process's pynvml use the stand-in, which reads the environment at each call."""
    pynvml = pytest.importorskip("pynvml")
    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(stand_in[0] / LIBRARY)))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("NVML_STAND_IN_DEVICES", "4")
    return monkeypatch


def uuids(machine: Machine) -> list[str]:
    """Return the UUIDs of the machine's GPUs."""
    return [gpu.uuid for gpu in machine.gpus]


def test_every_gpu_is_found_with_its_name_memory_and_number(nvml: pytest.MonkeyPatch) -> None:
    """Without CUDA_VISIBLE_DEVICES, all GPUs that NVML sees are found, numbered in its order."""
    found = inspect_machine()
    assert uuids(found) == [GPU(i) for i in range(4)]
    assert [(g.name, g.index, g.kind) for g in found.gpus] == [(f"cuda:{i}", i, "cuda") for i in range(4)]
    assert {(g.label, g.memory_nbytes, g.free_nbytes) for g in found.gpus} == {("Stand-in GPU", 16 << 30, 15 << 30)}
    assert (found.n_hidden_gpus, found.driver, found.driver_cuda) == (0, "580.65.06", (13, 0))


VISIBLE = {
    "": [],
    "-1": [],
    "none": [],
    "2": [2],
    "3, 1": [1, 3],
    "0,9,1": [0],
    "0,x,1": [0],
    "1,1": [],
    GPU(2): [2],
    f"{GPU(3)},0": [0, 3],
    f"0,{GPU(0)}": [],
    "GPU-": [],
    "GPU-ffff,0": [],
    f"{GPU(1)[:-1]}": [],
    MIG(0): [],
}


@pytest.mark.parametrize("variable", VISIBLE)
def test_the_callers_cuda_visible_devices_is_respected(variable: str, nvml: pytest.MonkeyPatch) -> None:
    """An invalid entry hides itself and all after it, a repeated one hides all; numbers follow NVML's order."""
    nvml.setenv("CUDA_VISIBLE_DEVICES", variable)
    found = inspect_machine()
    assert uuids(found) == [GPU(i) for i in VISIBLE[variable]]
    assert [g.name for g in found.gpus] == [f"cuda:{i}" for i in range(len(found.gpus))]
    assert found.n_hidden_gpus == 4 - len(found.gpus)


def test_the_start_of_a_uuid_is_enough_if_it_is_unambiguous(nvml: pytest.MonkeyPatch) -> None:
    """CUDA accepts any prefix that matches one GPU only; so does discovery."""
    nvml.setenv("NVML_STAND_IN_DEVICES", "1")
    nvml.setenv("CUDA_VISIBLE_DEVICES", "GPU-0000")
    assert uuids(inspect_machine()) == [GPU(0)]


MIG_VISIBLE = {
    None: [MIG(0), MIG(1), GPU(1)],
    "0": [MIG(0), MIG(1)],
    "1": [GPU(1)],
    GPU(0): [MIG(0), MIG(1)],
    f"{MIG(1)},1": [MIG(1), GPU(1)],
    "MIG-0": [],
    f"0,{MIG(0)}": [],
}


@pytest.mark.parametrize("variable", MIG_VISIBLE)
def test_a_gpu_in_mig_mode_is_its_instances(variable: str | None, nvml: pytest.MonkeyPatch) -> None:
    """The instances are the devices, by name and UUID; the number or UUID of the GPU stands for all of them."""
    nvml.setenv("NVML_STAND_IN_DEVICES", "2")
    nvml.setenv("NVML_STAND_IN_MIG", "1")
    if variable is not None:
        nvml.setenv("CUDA_VISIBLE_DEVICES", variable)
    found = inspect_machine()
    assert uuids(found) == MIG_VISIBLE[variable]
    assert [g.name for g in found.gpus] == [u if "MIG" in u else f"cuda:{i}" for i, u in enumerate(uuids(found))]
    assert all((g.memory_nbytes == 2 << 30) == g.uuid.startswith("MIG") for g in found.gpus)


def test_a_gpu_that_nvml_cannot_query_is_ignored_with_a_warning(
    nvml: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A GPU that fell off the bus costs only itself, and logs a warning."""
    nvml.setenv("NVML_STAND_IN_LOST", "1")
    assert uuids(inspect_machine()) == [GPU(0), GPU(2), GPU(3)]
    assert "ignoring GPU 1: NVML reports" in caplog.text


def test_what_the_driver_does_not_support_stays_unknown(nvml: pytest.MonkeyPatch) -> None:
    """No memory of its own and no CUDA version: 0 and None, not an error."""
    nvml.setenv("NVML_STAND_IN_CUDA", "0")
    nvml.setenv("NVML_STAND_IN_MEMORY", "0")
    found = inspect_machine()
    assert found.driver_cuda is None
    assert {(g.memory_nbytes, g.free_nbytes) for g in found.gpus} == {(0, 0)}


def test_a_driver_without_devices_gives_no_gpus(nvml: pytest.MonkeyPatch) -> None:
    """NVML without devices means a machine with a driver and no GPUs."""
    nvml.setenv("NVML_STAND_IN_DEVICES", "0")
    nvml.setenv("NVML_STAND_IN_CUDA", "12080")
    found = inspect_machine()
    assert (found.gpus, found.n_hidden_gpus, found.driver_cuda) == ((), 0, (12, 8))


def test_nvml_that_does_not_start_gives_no_gpus_and_one_debug_line(
    nvml: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A library without its driver is no error: a DEBUG line says why there are no GPUs."""
    caplog.set_level(logging.DEBUG, "daskinfer")  # the command line may have set it in this process
    nvml.setenv("NVML_STAND_IN_INIT", "9")
    found = inspect_machine()
    assert (found.gpus, found.n_hidden_gpus, found.driver, found.driver_cuda) == ((), 0, "", None)
    assert [record.getMessage() for record in caplog.records] == ["found no GPUs: NVML reports Driver Not Loaded"]


def test_no_nvml_library_gives_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without NVIDIA's software still has its CPUs."""
    pynvml = pytest.importorskip("pynvml")
    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "CDLL", lambda name: ctypes.CDLL("no-such-library-anywhere.so"))
    found = inspect_machine()
    assert (found.gpus, found.driver) == ((), "")
    assert found.n_cores >= 1
    assert found.memory_nbytes > 0


def test_nvml_is_shut_down_as_often_as_it_is_started(nvml: pytest.MonkeyPatch) -> None:
    """No handle stays open, so other users of NVML in this process keep their own count."""
    import pynvml

    before = pynvml._nvmlLib_refcount
    inspect_machine()
    assert pynvml._nvmlLib_refcount == before


def test_discovery_in_a_new_process_loads_neither_torch_nor_dask(
    stand_in: tuple[Path, dict[str, str]],
) -> None:
    """The system's loader finds the library, and the process can still be pinned afterwards."""
    code = (
        "import json, sys; from daskinfer.hardware.discovery import inspect_machine; found = inspect_machine();"
        "print(json.dumps([[g.uuid for g in found.gpus], found.n_hidden_gpus, found.driver,"
        "                  sorted({'torch', 'dask', 'cuda'} & set(sys.modules))]))"
    )
    settings = {"NVML_STAND_IN_DEVICES": "3", "CUDA_VISIBLE_DEVICES": f"{GPU(2)},0", "NVML_STAND_IN_DRIVER": "550.54"}
    env = {**stand_in[1], **settings}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[GPU(0), GPU(2)], 1, "550.54", []]


def test_a_machine_has_the_cores_memory_and_processor_of_its_host() -> None:
    """What is not a GPU comes from the host module."""
    found = inspect_machine()
    assert (found.n_cores, found.memory_nbytes) == (host.count_cores(), host.read_memory_nbytes())
    assert found.cpu_label == host.read_cpu_label()
