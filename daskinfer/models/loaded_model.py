"""A model on its device, wherever it came from: what the model runner calls."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class LoadedModel:
    """A model on a device, ready to be called.

    ``compiled``: it recompiles itself for each new input shape, and its last bits may then differ.

    ``is_warm``: it has computed a micro-batch, so what only the first call has to do is done.

    Note: hold ``lock`` while a chunk runs, since models and users' objects need not be thread-safe.
    """

    run: Callable[..., Any]
    device: torch.device
    takes_tensors: bool
    on_close: Callable[[], None] | None = None
    compiled: bool = False
    is_warm: bool = False
    max_batch_sizes: dict[Any, int] = field(default_factory=dict)  # what fitted into memory, by the shape of a row
    contiguous_only_shapes: set[Any] = field(default_factory=set)  # shapes of rows that failed in channels_last
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def from_model(cls, model: Any, device: torch.device) -> LoadedModel:
        """Put a model that nobody else uses onto ``device``."""
        if isinstance(model, torch.nn.Module):
            model.eval()  # one call per line: a model's own train() often forgets to return it
            model.requires_grad_(False)
            model.to(device)
            return cls(model, device, takes_tensors=True, compiled=any(map(_is_compiled, model.modules())))
        if hasattr(model, "load"):
            model.load(str(device))
        return cls(model, device, takes_tensors=False, on_close=getattr(model, "close", None))

    def close(self) -> None:
        """Call the ``close()`` of the user's object, if it has one."""
        if self.on_close is not None:
            self.on_close()


def _is_compiled(module: torch.nn.Module) -> bool:
    # By name: the package of torch.compile's class takes seconds to import.
    return isinstance(module, torch.jit.ScriptModule) or type(module).__name__ == "OptimizedModule"
