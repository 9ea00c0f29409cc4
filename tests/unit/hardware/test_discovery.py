from __future__ import annotations

import ctypes
import json
import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from daskinfer.hardware import discovery
from daskinfer.hardware.discovery import Machine, inspect_machine
from tests.support.nvml_stand_in import LIBRARY, build

GPU = "GPU-00000000-0000-0000-0000-{:012d}".format
MIG = "MIG-00000000-0000-0000-0000-{:012d}".format


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder of the library and the environment to find it in."""
    folder = tmp_path_factory.mktemp("nvml")
    return folder, build(folder)


@pytest.fixture
def nvml(stand_in: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This process's pynvml over the stand-in, which reads the environment anew at each call."""
    pynvml = pytest.importorskip("pynvml")
    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(stand_in[0] / LIBRARY)))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("NVML_STAND_IN_DEVICES", "4")
    return monkeypatch


def uuids(found: Machine) -> list[str]:
    """What the GPUs found are pinned by."""
    return [gpu.uuid for gpu in found.gpus]


def test_every_gpu_is_found_with_its_name_memory_and_number(nvml: pytest.MonkeyPatch) -> None:
    """Without CUDA_VISIBLE_DEVICES, all that NVML sees is there, numbered in its order."""
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
    """What is invalid hides itself and all after it, what is repeated hides all; numbers follow NVML's order."""
    nvml.setenv("CUDA_VISIBLE_DEVICES", variable)
    found = inspect_machine()
    assert uuids(found) == [GPU(i) for i in VISIBLE[variable]]
    assert [g.name for g in found.gpus] == [f"cuda:{i}" for i in range(len(found.gpus))]
    assert found.n_hidden_gpus == 4 - len(found.gpus)


def test_the_beginning_of_a_uuid_is_enough_where_it_is_unambiguous(nvml: pytest.MonkeyPatch) -> None:
    """CUDA takes any beginning that fits one GPU only; so does discovery."""
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


def test_a_gpu_that_does_not_answer_is_left_out_aloud(nvml: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """One GPU off the bus costs that GPU alone, and a warning."""
    nvml.setenv("NVML_STAND_IN_LOST", "1")
    assert uuids(inspect_machine()) == [GPU(0), GPU(2), GPU(3)]
    assert "GPU 1 of this machine is left out" in caplog.text


def test_what_the_driver_cannot_tell_stays_unknown(nvml: pytest.MonkeyPatch) -> None:
    """No memory of its own and no CUDA version: 0 and None, not an error."""
    nvml.setenv("NVML_STAND_IN_CUDA", "0")
    nvml.setenv("NVML_STAND_IN_MEMORY", "0")
    found = inspect_machine()
    assert found.driver_cuda is None
    assert {(g.memory_nbytes, g.free_nbytes) for g in found.gpus} == {(0, 0)}


def test_a_driver_without_devices_gives_no_gpus(nvml: pytest.MonkeyPatch) -> None:
    """NVML without devices is a machine with a driver and no GPUs."""
    nvml.setenv("NVML_STAND_IN_DEVICES", "0")
    nvml.setenv("NVML_STAND_IN_CUDA", "12080")
    found = inspect_machine()
    assert (found.gpus, found.n_hidden_gpus, found.driver_cuda) == ((), 0, (12, 8))


def test_nvml_that_does_not_start_gives_no_gpus_and_one_debug_line(
    nvml: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A library without its driver is no reason to fail: DEBUG says why there are no GPUs."""
    caplog.set_level(logging.DEBUG, "daskinfer")  # the command line has set it in this process, perhaps
    nvml.setenv("NVML_STAND_IN_INIT", "9")
    found = inspect_machine()
    assert (found.gpus, found.n_hidden_gpus, found.driver, found.driver_cuda) == ((), 0, "", None)
    assert [record.getMessage() for record in caplog.records] == ["no GPUs here, NVML says: Driver Not Loaded"]


def test_no_nvml_library_gives_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without NVIDIA's software has its CPUs."""
    pynvml = pytest.importorskip("pynvml")
    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "CDLL", lambda name: ctypes.CDLL("no-such-library-anywhere.so"))
    found = inspect_machine()
    assert (found.gpus, found.driver) == ((), "")
    assert found.n_cores >= 1
    assert found.memory_nbytes > 0


def test_nvml_is_shut_down_as_often_as_it_is_started(nvml: pytest.MonkeyPatch) -> None:
    """Nothing stays open, so that others in this process keep their own count."""
    import pynvml

    before = pynvml._nvmlLib_refcount
    inspect_machine()
    assert pynvml._nvmlLib_refcount == before


def test_discovery_in_a_fresh_process_loads_the_library_and_neither_torch_nor_dask(
    stand_in: tuple[Path, dict[str, str]],
) -> None:
    """Found by the system's loader, in a process that stays fit for pinning."""
    code = (
        "import json, sys; from daskinfer.hardware.discovery import inspect_machine; found = inspect_machine();"
        "print(json.dumps([[g.uuid for g in found.gpus], found.n_hidden_gpus, found.driver,"
        "                  sorted({'torch', 'dask', 'cuda'} & set(sys.modules))]))"
    )
    mine = {"NVML_STAND_IN_DEVICES": "3", "CUDA_VISIBLE_DEVICES": f"{GPU(2)},0", "NVML_STAND_IN_DRIVER": "550.54"}
    env = {**stand_in[1], **mine}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[GPU(0), GPU(2)], 1, "550.54", []]


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty system folder in place of this machine's proc and sys."""
    monkeypatch.setattr(discovery, "_ROOT", tmp_path)
    return tmp_path


def put(folder: Path, **files: str) -> None:
    """Write small files, with a dot in their name where the keyword has two underscores."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_the_processors_name_comes_from_the_system(system: Path) -> None:
    """The first processor's model name, else what the platform calls it."""
    assert inspect_machine().cpu_label == platform.processor()
    put(system / "proc", cpuinfo="processor\t: 0\nmodel name\t: EPYC 9654\nmodel name\t: other")
    assert inspect_machine().cpu_label == "EPYC 9654"


def test_limits_of_control_groups_version_2_count_at_every_level(system: Path) -> None:
    """A container or a batch job has the memory and cores of the tightest group above it."""
    groups = system / "sys/fs/cgroup"
    put(system / "proc/self", cgroup="0::/job/step")
    put(groups / "job", memory__max=str(1 << 28), cpu__max="150000 100000")
    put(groups / "job/step", memory__max="max", cpu__max="max 100000")
    assert (inspect_machine().memory_nbytes, inspect_machine().n_cores) == (1 << 28, 1)


def test_limits_of_control_groups_version_1_count_too(system: Path) -> None:
    """The older layout has a folder per controller and a quota in two files."""
    groups = system / "sys/fs/cgroup"
    put(system / "proc/self", cgroup="9:name=systemd:/\n4:memory:/job\n2:cpu,cpuacct:/job\n0::/")
    put(groups / "memory/job", memory__limit_in_bytes=str(1 << 27))
    put(groups / "cpu/job", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    assert (inspect_machine().memory_nbytes, inspect_machine().n_cores) == (1 << 27, 1)


def test_without_limits_the_whole_machine_counts(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No quota: every core of the affinity; systems without affinity or sysconf count what they can."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 5, 7}, raising=False)
    assert inspect_machine().n_cores == 5
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "sysconf", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert (inspect_machine().n_cores, inspect_machine().memory_nbytes) == (1, 0)
