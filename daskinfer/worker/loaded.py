"""A network that is on its device, whatever it came from: what the runner calls."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class LoadedModel:
    """A network on a device, ready to be called.

    ``compiled``: it makes itself anew for each shape that it sees, and may then answer others with other last bits.

    Note: ``lock`` is held while a chunk runs, since networks and users' objects need not be safe for threads.
    """

    run: Callable[..., Any]
    device: torch.device
    takes_tensors: bool
    on_close: Callable[[], None] | None = None
    compiled: bool = False
    max_batch_sizes: dict[Any, int] = field(default_factory=dict)  # what memory held, by the shape of a row
    contiguous_only_shapes: set[Any] = field(default_factory=set)  # shapes of rows with which it failed in channels_last
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def from_model(cls, model: Any, device: torch.device) -> LoadedModel:
        """Put a network that nobody else uses onto ``device``."""
        if isinstance(model, torch.nn.Module):
            model.eval()  # one by one: a network's own train() often forgets to return it
            model.requires_grad_(False)
            model.to(device)
            return cls(model, device, takes_tensors=True, compiled=any(map(_is_compiled, model.modules())))
        if hasattr(model, "load"):
            model.load(str(device))
        return cls(model, device, takes_tensors=False, on_close=getattr(model, "close", None))

    def close(self) -> None:
        """Tell the model that it is needed no more."""
        if self.on_close is not None:
            self.on_close()


def _is_compiled(module: torch.nn.Module) -> bool:
    # By its name: torch.compile's class lies in a package that takes seconds to import.
    return isinstance(module, torch.jit.ScriptModule) or type(module).__name__ == "OptimizedModule"
