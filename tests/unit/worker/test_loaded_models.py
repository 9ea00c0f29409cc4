from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from daskinfer.models.loaded_model import LoadedModel
from daskinfer.worker.loaded_models import ModelCache

CPU = torch.device("cpu")


class Loader:
    """Loads models, counts the loads, and notes which models were closed; the first ``n_failures`` loads fail."""

    def __init__(self, n_failures: int = 0) -> None:
        self.n_calls = 0
        self.n_failures = n_failures
        self.closed: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, name: str = "a") -> LoadedModel:
        self.n_calls += 1
        assert self.gate.wait(10)
        if self.n_calls <= self.n_failures:
            raise OSError("not yet")
        return LoadedModel(len, CPU, takes_tensors=False, on_close=lambda: self.closed.append(name))


def test_loads_once_for_all_threads() -> None:
    """Eight threads that race for one model get the same loaded model."""
    cache, loader, barrier = ModelCache(), Loader(), threading.Barrier(8)

    def ask(_: int) -> LoadedModel:
        barrier.wait(10)
        return cache.get("a", loader)

    with ThreadPoolExecutor(8) as pool:
        models = list(pool.map(ask, range(8)))
    assert len({id(model) for model in models}) == loader.n_calls == cache.n_loads == 1


def test_a_failed_load_is_tried_again() -> None:
    """The error reaches its caller; the next caller loads again."""
    cache, loader = ModelCache(), Loader(n_failures=1)
    with pytest.raises(OSError, match="not yet"):
        cache.get("a", loader)
    assert "a" not in cache
    assert cache.get("a", loader) is cache.get("a", loader)
    assert (loader.n_calls, cache.n_loads) == (2, 1)


def test_a_slow_load_does_not_block_other_keys() -> None:
    """While one model loads, another one is loaded and returned."""
    cache, slow, quick = ModelCache(), Loader(), Loader()
    slow.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(cache.get, "slow", slow)
        assert pool.submit(cache.get, "quick", quick).result(10)
        assert not waiting.done()
        slow.gate.set()
        assert waiting.result(10)


def test_the_least_recently_used_is_closed() -> None:
    """The model whose last use is longest ago is closed to make room."""
    cache, loader = ModelCache(max_models=2), Loader()
    for key in ("a", "b", "a", "c"):
        cache.get(key, lambda key=key: loader(key))
    assert loader.closed == ["b"]
    assert [key in cache for key in "abc"] == [True, False, True]


def test_room_is_made_before_loading() -> None:
    """The device never holds more models than the cache may."""
    cache, loader = ModelCache(max_models=1), Loader()
    cache.get("a", lambda: loader("a"))
    cache.get("b", lambda: LoadedModel(len, CPU, takes_tensors=not loader.closed))
    assert not cache.get("b", loader).takes_tensors


def test_evicted_is_loaded_again() -> None:
    """An evicted model is loaded again on its next use."""
    cache, loader = ModelCache(max_models=1), Loader()
    for key in ("a", "b", "a"):
        cache.get(key, lambda key=key: loader(key))
    assert (cache.n_loads, loader.closed) == (3, ["a", "b"])


def test_a_running_model_is_closed_after_its_chunk() -> None:
    """A model whose lock is held is closed only after the lock is released."""
    cache, loader = ModelCache(), Loader()
    model = cache.get("a", loader)
    with ThreadPoolExecutor(1) as pool:
        with model.lock:
            clearing = pool.submit(cache.clear)
            assert not clearing.done()
            assert loader.closed == []
        clearing.result(10)
    assert loader.closed == ["a"]


def test_clear_closes_all_even_if_one_fails(caplog: pytest.LogCaptureFixture) -> None:
    """A close that raises is logged; the other models are still closed, and the caller goes on."""
    cache, loader = ModelCache(), Loader()
    cache.get("bad", lambda: LoadedModel(len, CPU, takes_tensors=False, on_close=lambda: [].pop()))
    cache.get("good", lambda: loader("good"))
    with caplog.at_level(logging.WARNING, "daskinfer"):
        cache.clear()
    assert "closing a model failed" in caplog.text
    assert loader.closed == ["good"]
    assert "bad" not in cache


def test_a_model_without_close_needs_none() -> None:
    """Closing a model without close() does nothing."""
    LoadedModel(len, CPU, takes_tensors=False).close()
