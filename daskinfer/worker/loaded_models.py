"""Cache of the models that this process has loaded: each is loaded once, under a lock.

A worker process keeps its loaded models between chunks and between calls, so that a model is loaded once for any number of
chunks. ``n_loads`` counts the loads, for tests and reports.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from daskinfer.models.loaded_model import LoadedModel

logger = logging.getLogger(__name__)

# Models that a process keeps if it runs several in turn; arbitrary, small since each may fill a device's memory.
MAX_MODELS = 4


class ModelCache:
    """Loaded models by key, least recently used first.

    Note: threads share it. One lock guards the table; each key has its own lock, held while that model loads, so that a
    slow load blocks no other key. An evicted model is closed once the chunk that runs on it is done.
    """

    def __init__(self, max_models: int = MAX_MODELS) -> None:
        self.n_loads = 0
        self._max_models = max_models
        self._lock = threading.Lock()
        self._load_locks: dict[Any, threading.Lock] = {}
        self._models: OrderedDict[Any, LoadedModel] = OrderedDict()

    def get(self, key: Any, load: Callable[[], LoadedModel]) -> LoadedModel:
        """Return the model under ``key``; the first caller loads it, and after a failed load the next caller tries again."""
        with self._lock:
            load_lock = self._load_locks.setdefault(key, threading.Lock())
        with load_lock:
            with self._lock:
                if key in self._models:
                    self._models.move_to_end(key)
                    return self._models[key]
            self._evict_models(self._max_models - 1)  # before loading: the device may not have room for one more
            model = load()
            self._insert_model(key, model)
            return model

    def __contains__(self, key: Any) -> bool:
        with self._lock:
            return key in self._models

    def clear(self) -> None:
        """Close and drop every model."""
        self._evict_models(0)

    def _insert_model(self, key: Any, model: LoadedModel) -> None:
        with self._lock:
            self.n_loads += 1
            self._models[key] = model
        self._evict_models(self._max_models)

    def _evict_models(self, n_kept: int) -> None:
        with self._lock:
            evicted = [self._models.popitem(last=False)[1] for _ in range(max(0, len(self._models) - n_kept))]
        for model in evicted:
            _close_model(model)


def _close_model(model: LoadedModel) -> None:
    """Close an evicted model; log errors, since they must not fail the caller, who is loading another model."""
    with model.lock:
        try:
            model.close()
        except Exception:
            logger.warning("closing a model failed; it was dropped anyway", exc_info=True)


model_cache = ModelCache()
