"""Which devices a call uses, and who computes for it; first match wins:

1. ``client=``: the client's workers, each one device.
2. ``devices="auto"`` and a current Dask client: its workers.
3. ``devices="inline"``: this process.
4. The cluster kept for this process, of the devices asked for.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from distributed import Client
from distributed.comm import CommClosedError

from daskinfer.cluster.worker_spec import memory_per_worker, resource_name
from daskinfer.errors import ClusterError, DeviceError
from daskinfer.hardware.device_spec import Device, check_drivable, inspect_machine, parse_devices
from daskinfer.worker import current_device

logger = logging.getLogger(__name__)

_checked_clients: weakref.WeakSet[Client] = weakref.WeakSet()  # clients whose cluster has daskinfer


@dataclass(frozen=True)
class Placement:
    """The devices of a call in the plan's order, and how to make Dask run a task on each.

    ``client`` is None where no cluster of somebody else's is used; ``addresses`` are then empty. ``nannies`` are the
    addresses of those that bring a worker back, empty where there is none, and None for workers of a cluster of ours.
    ``can_choose_executor``: nobody asked for workers, and there are CPUs only, so this process may compute as well.
    """

    devices: tuple[Device, ...]
    client: Client | None = None
    addresses: tuple[str, ...] = ()
    nannies: tuple[str | None, ...] = ()
    can_choose_executor: bool = False

    @property
    def is_inline(self) -> bool:
        """Whether the work is done in this process."""
        return self.devices[0].kind == "inline"

    @property
    def memory_limits(self) -> tuple[int, ...]:
        """Bytes that a chunk and the network may take on each device; 0 where that is unknown."""
        return tuple(d.free_nbytes or d.memory_nbytes for d in self.devices)

    def get_compute_kwargs(self, device_index: int) -> dict[str, Any]:
        """Keywords of ``client.compute`` that keep a task on a device.

        Our own workers have a resource each, which comes back when one is restarted; others are known by address only.
        """
        if self.addresses and self.nannies[device_index] is not None:
            return {"workers": [self.addresses[device_index]]}
        return {"resources": {resource_name(self.devices[device_index].name): 1}}


def fetch_workers(client: Client) -> dict[str, dict[str, Any]]:
    """What the scheduler says of every worker, by address.

    Not ``acquire_client.scheduler_info(n_workers=-1)``: the record that it returns is overwritten by one without workers each time
    the client refreshes it, from another thread (seen once in a run of all tests, as a worker that was missing).
    """
    found: dict[str, dict[str, Any]] = client.sync(client.scheduler.identity, n_workers=-1)["workers"]
    return found


def resolve_placement(devices: str | Sequence[str], client: Client | None) -> Placement:
    """Find the devices of a call; starts nothing.

    Raises
    ------
    DeviceError
        Where a device is unknown, doubled, absent or not drivable, or where both a client and devices are given.
    ClusterError
        Where the client is closed or asynchronous, or has no workers, or where its cluster has no daskinfer.
    """
    automatic = isinstance(devices, str) and devices.strip().lower() == "auto"
    if client is not None:
        if not automatic:
            raise DeviceError(
                f"devices={devices!r} was given beside client=; a client's devices are its workers. Leave one of them out "
                "(beside --scheduler: --devices auto, which goes over a job file's)."
            )
        return _resolve_client_placement(client)
    current = _find_current_client() if automatic else None
    if current is not None:
        placement = _resolve_client_placement(current)
        _warn_of_unused_gpus(placement)
        return placement
    here = inspect_machine()
    found = parse_devices(devices, here)
    check_drivable(found, torch.version.cuda, here)
    if found[0].kind == "inline":
        return Placement((replace(found[0], label=here.cpu_label, memory_nbytes=here.memory_nbytes),))
    share = memory_per_worker(len(found), here.memory_nbytes)
    sized = tuple(d if d.kind == "cuda" else replace(d, memory_nbytes=share) for d in found)
    return Placement(sized, can_choose_executor=automatic and all(d.kind == "cpu" for d in sized))


def _resolve_client_placement(client: Client) -> Placement:
    if not isinstance(client, Client):
        raise ClusterError(
            f"client is a {type(client).__name__}; a distributed.Client is needed. Make one with Client(…) of "
            "the cluster, or of its scheduler's address."
        )
    if client.asynchronous or client.status != "running":
        state = "asynchronous" if client.asynchronous else client.status
        raise ClusterError(f"the client is {state}; a running synchronous one is needed. Make one with Client(cluster).")
    check_installed(client)
    found = _query_devices(client)
    if not found:
        raise ClusterError(
            f"the client of {client.scheduler.address} has no workers; at least one is needed. Start one, or wait for it "
            "with client.wait_for_workers(1) (--wait-for-workers 1)."
        )
    ordered = sorted(found.items(), key=lambda pair: (pair[1].kind != "cuda", pair[1].name))
    there = fetch_workers(client)
    nannies = tuple(_get_nanny_address(there.get(address, {}), device) for address, device in ordered)
    return Placement(tuple(d for _, d in ordered), client, tuple(address for address, _ in ordered), nannies)


def _query_devices(client: Client) -> dict[str, Device]:
    """The device of every worker; those that go while they are asked are none."""
    found: dict[str, Any] = client.run(current_device.describe_worker_device, on_error="return")
    for answer in found.values():
        if isinstance(answer, Exception) and not isinstance(answer, CommClosedError):
            raise answer
    return {address: device for address, device in found.items() if isinstance(device, Device)}


def check_installed(client: Client) -> None:
    """Refuse a cluster without daskinfer: its scheduler unpickles the tasks, and its workers run them.

    Raises
    ------
    ClusterError
        Where one cannot import it.
    """
    if client in _checked_clients:
        return
    imported = client.run(import_module, "daskinfer", on_error="return")
    lacking = {f"the worker {address}": said for address, said in imported.items() if isinstance(said, ImportError)}
    try:
        client.run_on_scheduler(import_module, "daskinfer")
    except ImportError as error:
        lacking = {f"the scheduler {client.scheduler.address}": error, **lacking}
    if lacking:
        who, why = next(iter(lacking.items()))
        more = f", nor can {len(lacking) - 1} more," if len(lacking) > 1 else ""
        raise ClusterError(
            f"{who}{more} cannot import daskinfer ({why}); the scheduler and every worker have to. Install there what is "
            "installed here: the same versions of Python, torch, dask and daskinfer."
        )
    _checked_clients.add(client)


def _get_nanny_address(info: Mapping[str, Any], device: Device) -> str | None:
    ours = resource_name(device.name) in info.get("resources", {})
    return None if ours else info.get("nanny") or ""


def _find_current_client() -> Client | None:
    with contextlib.suppress(ValueError):
        found: Client = Client.current(allow_global=True)
        return found
    return None


def _warn_of_unused_gpus(placement: Placement) -> None:
    used = {d.uuid for d in placement.devices}
    unused = [d.name for d in inspect_machine().gpus if d.uuid not in used]
    if unused:
        warnings.warn(
            f"the current Dask client's workers leave {', '.join(unused)} of this machine unused. Pass devices='cuda' to "
            "use them, or client= to say that this is meant.",
            stacklevel=4,
        )
