"""The models that this process has loaded: each once, under a lock.

A worker process keeps what it loaded between chunks and between calls, so that a network is loaded once however many
chunks there are. ``n_loads`` counts, for tests and reports.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from daskinfer.worker.loaded import LoadedModel

logger = logging.getLogger(__name__)

# A process that runs several networks in turn keeps this many; arbitrary, small since each may fill a device's memory.
MAX_MODELS = 4


class ModelCache:
    """Loaded models by key, least recently used first.

    Note: threads share it. One lock guards the table; each key has a lock of its own, held while that model loads, so
    that a slow load keeps nobody else waiting. A model that is dropped is closed once the chunk that runs on it is done.
    """

    def __init__(self, max_models: int = MAX_MODELS) -> None:
        self.n_loads = 0
        self._max_models = max_models
        self._lock = threading.Lock()
        self._load_locks: dict[Any, threading.Lock] = {}
        self._models: OrderedDict[Any, LoadedModel] = OrderedDict()

    def get(self, key: Any, load: Callable[[], LoadedModel]) -> LoadedModel:
        """The model under ``key``, loaded by the first who asks; a load that fails is tried again by the next."""
        with self._lock:
            loading = self._load_locks.setdefault(key, threading.Lock())
        with loading:
            with self._lock:
                if key in self._models:
                    self._models.move_to_end(key)
                    return self._models[key]
            self._evict_models(self._max_models - 1)  # before loading: the device may not hold one more
            model = load()
            self._insert_model(key, model)
            return model

    def __contains__(self, key: Any) -> bool:
        with self._lock:
            return key in self._models

    def clear(self) -> None:
        """Close every model and forget it."""
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
    """Close a model that nobody asked to close: what goes wrong is not the fault of whoever loads the next."""
    with model.lock:
        try:
            model.close()
        except Exception:
            logger.warning("a model could not be closed", exc_info=True)


model_cache = ModelCache()
