"""Tests that need a real GPU, skipped elsewhere with the reason: ``python -m pytest tests/gpu -m gpu`` runs them all.

Whether there is one is asked of NVML: asking CUDA would start it in this process, and that it is never started here is one
of the things that are tested.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from distributed import Client

import daskinfer as di
from daskinfer.errors import DeviceError
from daskinfer.hardware.device_spec import check_drivable
from daskinfer.hardware.discovery import inspect_machine


def _reason_to_skip() -> str:
    """Why no GPU can be used here; empty where one can."""
    here = inspect_machine()
    if not here.gpus:
        return "NVML sees no GPU here"
    try:
        check_drivable(here.gpus, torch.version.cuda, here)
    except DeviceError as error:
        return str(error)
    return "" if find_spec("dask_cuda") else 'dask-cuda is not installed: pip install "daskinfer[cuda13]"'


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies in this folder, and skip it where there is no GPU."""
    mine = [item for item in items if "gpu" in item.path.parent.parts]
    reason = _reason_to_skip() if mine else ""
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def gpu_client() -> Iterator[Client]:
    """A client of one cluster of every GPU and one CPU worker."""
    with di.LocalDeviceCluster("cuda,cpu") as cluster, Client(cluster, set_as_default=False) as client:
        yield client
