"""Tests that need a real GPU, skipped elsewhere with the reason: ``python -m pytest tests/gpu -m gpu`` runs them.

NVML says whether there is a GPU: asking CUDA would initialise it in this process, and that this never happens is one of the
things that are tested. ``test_check.py`` uses the stand-in accelerator and runs on any machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from distributed import Client

import daskinfer as di
from daskinfer.core.installation import describe_install
from daskinfer.errors import DeviceError
from daskinfer.hardware.device_spec import check_drivable
from daskinfer.hardware.discovery import inspect_machine


def _find_skip_reason() -> str:
    """Return the reason why no GPU can be used here; empty if one can."""
    machine = inspect_machine()
    if not machine.gpus:
        return "NVML sees no GPU here"
    try:
        check_drivable(machine.gpus, torch.version.cuda, machine)
    except DeviceError as error:
        return str(error)
    return "" if find_spec("dask_cuda") else f"dask-cuda is not installed: {describe_install('cuda13')}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder that need a GPU, and skip them without one."""
    here = Path(__file__).parent
    needs_gpu = [item for item in items if item.path.parent == here and item.path.name != "test_check.py"]
    reason = _find_skip_reason() if needs_gpu else ""
    for item in needs_gpu:
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def gpu_client() -> Iterator[Client]:
    """A client of one cluster of every GPU and one CPU worker."""
    with di.LocalDeviceCluster("cuda,cpu") as cluster, Client(cluster, set_as_default=False) as client:
        yield client
