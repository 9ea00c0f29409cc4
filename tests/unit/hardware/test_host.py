from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from daskinfer.hardware import host
from daskinfer.hardware.host import count_cores, read_cpu_label, read_memory_nbytes


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty folder in place of this machine's /proc and /sys."""
    monkeypatch.setattr(host, "_ROOT", tmp_path)
    return tmp_path


def write_files(folder: Path, **contents: str) -> None:
    """Write small files; two underscores in a keyword are a dot in the file's name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_the_processors_name_comes_from_the_system(system: Path) -> None:
    """It is the first processor's model name, else the platform's name for it."""
    assert read_cpu_label() == platform.processor()
    write_files(system / "proc", cpuinfo="processor\t: 0\nmodel name\t: EPYC 9654\nmodel name\t: other")
    assert read_cpu_label() == "EPYC 9654"


def test_limits_of_control_groups_version_2_count_at_every_level(system: Path) -> None:
    """A container or a batch job has the memory and cores of the tightest group above it."""
    groups = system / "sys/fs/cgroup"
    write_files(system / "proc/self", cgroup="0::/job/step")
    write_files(groups / "job", memory__max=str(1 << 28), cpu__max="150000 100000")
    write_files(groups / "job/step", memory__max="max", cpu__max="max 100000")
    assert (read_memory_nbytes(), count_cores()) == (1 << 28, 1)


def test_limits_of_control_groups_version_1_count_too(system: Path) -> None:
    """The older layout has a folder per controller and a quota in two files."""
    groups = system / "sys/fs/cgroup"
    write_files(system / "proc/self", cgroup="9:name=systemd:/\n4:memory:/job\n2:cpu,cpuacct:/job\n0::/")
    write_files(groups / "memory/job", memory__limit_in_bytes=str(1 << 27))
    write_files(groups / "cpu/job", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    assert (read_memory_nbytes(), count_cores()) == (1 << 27, 1)


def test_without_limits_the_whole_machine_counts(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No quota: every core of the affinity; systems without affinity or sysconf count what they can."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 5, 7}, raising=False)
    assert count_cores() == 5
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "sysconf", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert (count_cores(), read_memory_nbytes()) == (1, 0)
