"""Choose the devices of a call and where it computes; the first match wins:

1. ``client=``: the client's workers, each one device.
2. ``devices="auto"`` and a current Dask client: its workers.
3. ``devices="inline"``: this process.
4. The default cluster of this process, with the requested devices.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from distributed import Client
from distributed.comm import CommClosedError

from daskinfer.cluster.worker_spec import memory_per_worker, resource_name
from daskinfer.errors import ClusterError, DeviceError
from daskinfer.hardware.device_spec import check_drivable, parse_devices
from daskinfer.hardware.discovery import Device, inspect_machine
from daskinfer.planning.job import Placement
from daskinfer.worker import current_device

logger = logging.getLogger(__name__)

_checked_clients: weakref.WeakSet[Client] = weakref.WeakSet()  # clients whose cluster can import daskinfer


def get_task_restriction(placement: Placement, device_index: int) -> dict[str, Any]:
    """Return the keywords of ``client.submit`` that keep a task on a device.

    A managed worker has a resource of its own, which a restart keeps; others are placed by address.
    """
    if placement.is_external and placement.nannies[device_index] is not None:
        return {"workers": [placement.addresses[device_index]]}
    return {"resources": {resource_name(placement.devices[device_index].name): 1}}


def fetch_workers(client: Client) -> dict[str, dict[str, Any]]:
    """Return the scheduler's record of each worker, by address.

    ``client.scheduler_info(n_workers=-1)`` will not do: another thread replaces the record that it returns by one without
    workers each time the client refreshes it (seen once in a run of all tests, as a missing worker).
    """
    workers: dict[str, dict[str, Any]] = client.sync(client.scheduler.identity, n_workers=-1)["workers"]
    return workers


def resolve_placement(
    devices: str | torch.device | Sequence[str | torch.device], client: Client | None
) -> tuple[Placement, Client | None]:
    """Find the devices of a call, and the caller's client if its workers are the devices; starts nothing.

    Raises
    ------
    DeviceError
        If a device is unknown, requested twice, missing or not usable by this torch, or if both a client and devices are
        given.
    ClusterError
        If the client is closed or asynchronous, has no workers, or if its cluster cannot import daskinfer.
    """
    is_auto = isinstance(devices, str) and devices.strip().lower() == "auto"
    if client is not None:
        if not is_auto:
            raise DeviceError(
                f"devices={devices!r} conflicts with client=, whose workers are the devices. Remove one of them "
                "(with --scheduler, use --devices auto to override a job file)."
            )
        return _resolve_client_placement(client), client
    current = _find_current_client() if is_auto else None
    if current is not None:
        placement = _resolve_client_placement(current)
        _warn_of_unused_gpus(placement)
        return placement, current
    machine = inspect_machine()
    requested = parse_devices(devices, machine)
    check_drivable(requested, torch.version.cuda, machine)
    if requested[0].kind == "inline":
        return Placement((replace(requested[0], label=machine.cpu_label, memory_nbytes=machine.memory_nbytes),)), None
    share = memory_per_worker(len(requested), machine.memory_nbytes)
    sized = tuple(d if d.kind == "cuda" else replace(d, memory_nbytes=share) for d in requested)
    return Placement(sized, can_choose_executor=is_auto and all(d.kind == "cpu" for d in sized)), None


def _resolve_client_placement(client: Client) -> Placement:
    if not isinstance(client, Client):
        raise ClusterError(
            f"client must be a distributed.Client, got a {type(client).__name__}. "
            "Make one from the cluster or its scheduler's address: Client(cluster)."
        )
    if client.asynchronous or client.status != "running":
        state = "asynchronous" if client.asynchronous else client.status
        raise ClusterError(f"client must be running and synchronous, but it is {state}. Make another with Client(cluster).")
    check_installed(client)
    by_address = _query_devices(client)
    if not by_address:
        raise ClusterError(
            f"the cluster at {client.scheduler.address} has no workers. Start one, or wait for it with "
            "client.wait_for_workers(1) (--wait-for-workers 1)."
        )
    ordered = sorted(by_address.items(), key=lambda pair: (pair[1].kind != "cuda", pair[1].name))
    workers = fetch_workers(client)
    nannies = tuple(_get_nanny_address(workers.get(address, {}), device) for address, device in ordered)
    return Placement(tuple(d for _, d in ordered), tuple(address for address, _ in ordered), nannies)


def _query_devices(client: Client) -> dict[str, Device]:
    """Query the device of each worker, by address; skip workers that die meanwhile."""
    results: dict[str, Any] = client.run(current_device.describe_worker_device, on_error="return")
    for result in results.values():
        if isinstance(result, Exception) and not isinstance(result, CommClosedError):
            raise result
    return {address: device for address, device in results.items() if isinstance(device, Device)}


def check_installed(client: Client) -> None:
    """Raise if the cluster lacks daskinfer: its scheduler unpickles the tasks, and its workers run them.

    Raises
    ------
    ClusterError
        If the scheduler or a worker cannot import daskinfer.
    """
    if client in _checked_clients:
        return
    results = client.run(import_module, "daskinfer", on_error="return")
    errors = {f"worker {address}": error for address, error in results.items() if isinstance(error, ImportError)}
    try:
        client.run_on_scheduler(import_module, "daskinfer")
    except ImportError as error:
        errors = {f"scheduler {client.scheduler.address}": error, **errors}
    if errors:
        process, cause = next(iter(errors.items()))
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise ClusterError(
            f"{process}{more} cannot import daskinfer: {cause}. "
            "Install the same versions of Python, torch, dask and daskinfer on the scheduler and every worker."
        )
    _checked_clients.add(client)


def _get_nanny_address(info: Mapping[str, Any], device: Device) -> str | None:
    """Return the address of a worker's nanny: empty without one, None for a worker of a managed cluster."""
    is_managed = resource_name(device.name) in info.get("resources", {})
    return None if is_managed else info.get("nanny") or ""


def _find_current_client() -> Client | None:
    with contextlib.suppress(ValueError):
        current: Client = Client.current(allow_global=True)
        return current
    return None


def _warn_of_unused_gpus(placement: Placement) -> None:
    used = {d.uuid for d in placement.devices}
    unused = [d.name for d in inspect_machine().gpus if d.uuid not in used]
    if unused:
        warnings.warn(
            f"the current Dask client leaves {', '.join(unused)} of this machine unused. Pass devices='cuda' to use "
            "them, or client= to silence this warning.",
            stacklevel=6,
        )
