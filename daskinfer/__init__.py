"""Apply a trained network to a large array on every device you own, in order, with Dask.

The rooms of the house, lower floors first; a room imports from its own floor and below, never from above::

    0  errors  tables  records  options  structure             plain Python
       events  timeline  status  status_words  reported
       pictures  variables  own_code  allocator  owned  ranges
                       shipped_files  model_paths
    1  hardware  device  grid  planner  dealer  ladder         + NVML, numbers only
       pace  plan_record  manifest  stored  durable
       staging  ledger  verifying
    2  arrays  borrowed  packed  fingerprint  loaded           + torch
       model_file  recipe  model  cache  bad_rows
       chunk_errors  buffers  returned  runner  probe  trial
       result_memory
    3  worker  device_thread  nanny_process  launch  ending    + dask
       cluster  cuda_cluster  kept  placement  io  inputs
       input_mark  wanted  outputs
       transport  parts  ways  task  graph  upstream  feeder
       plugin  preflight  shipping  call  faults  fetching
       lane  replacing  window  in_order  tuning  stopping
       ready  driver
    4  assembly  report  figure  run_report  answering  progress  api  jobs
       dashboard  demo  foreseen  checkup  doctor  log_lines
       command  job_file  cli_values  cli_options  cli

The longest chain of imports has eight rooms (the design has seven): what is stored lies below what is read, and both below
what is computed.

Names are imported when they are first used: ``daskinfer --help`` should not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from daskinfer._storage_api import plan, run
    from daskinfer.api import close, devices, map_blocks, predict, stream
    from daskinfer.cluster.local import LocalDeviceCluster
    from daskinfer.errors import DaskInferError, Interrupted
    from daskinfer.models.model import Model
    from daskinfer.options import Options

__all__ = [
    "DaskInferError",
    "Interrupted",
    "LocalDeviceCluster",
    "Model",
    "Options",
    "close",
    "devices",
    "map_blocks",
    "plan",
    "predict",
    "run",
    "stream",
]

_HOMES = {
    "DaskInferError": "errors",
    "Interrupted": "errors",
    "LocalDeviceCluster": "cluster.local",
    "Model": "models.model",
    "Options": "options",
    "close": "api",
    "devices": "api",
    "map_blocks": "api",
    "plan": "_storage_api",
    "predict": "api",
    "run": "_storage_api",
    "stream": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'daskinfer' has no attribute {name!r}")
    return getattr(import_module(f"daskinfer.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
