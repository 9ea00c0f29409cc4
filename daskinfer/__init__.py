"""Apply a trained model to a large array on every device you own, in order, with Dask.

``README.md`` beside this file is the architecture: the packages, which may import which, and the journey of a chunk.

Names are imported when they are first used: ``daskinfer --help`` should not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from daskinfer.api import close, devices, plan, predict, run, stream
    from daskinfer.cluster.local import LocalDeviceCluster
    from daskinfer.diagnostics.report import RunReport
    from daskinfer.errors import DaskInferError, Interrupted
    from daskinfer.lazy import map_blocks
    from daskinfer.models.model import Model
    from daskinfer.options import Options

__version__ = "0.1.0"  # pyproject reads it here: reading what pip recorded takes milliseconds of each first call

__all__ = [
    "DaskInferError",
    "Interrupted",
    "LocalDeviceCluster",
    "Model",
    "Options",
    "RunReport",
    "__version__",
    "close",
    "devices",
    "map_blocks",
    "plan",
    "predict",
    "run",
    "stream",
]

_MODULES = {
    "DaskInferError": "errors",
    "Interrupted": "errors",
    "LocalDeviceCluster": "cluster.local",
    "Model": "models.model",
    "Options": "options",
    "RunReport": "diagnostics.report",
    "close": "api",
    "devices": "api",
    "map_blocks": "lazy",
    "plan": "api",
    "predict": "api",
    "run": "api",
    "stream": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'daskinfer' has no attribute {name!r}")
    return getattr(import_module(f"daskinfer.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
