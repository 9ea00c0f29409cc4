"""Images in torch's memory format "channels last": used if it is faster, and without losing a row to it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import daskinfer as di
from daskinfer.core.chunks import BatchConfig
from daskinfer.core.pytree import Ports
from daskinfer.errors import ChunkError, OutputExists
from daskinfer.execution import tuning
from daskinfer.execution.tuning import MIN_FORMAT_TRIAL_BATCHES
from daskinfer.models.loaded_model import LoadedModel
from daskinfer.options import Options
from daskinfer.scheduling import autotune
from daskinfer.scheduling.throughput_history import history
from daskinfer.storage.manifest import Header, parse_line
from daskinfer.storage.paths import get_manifest_path
from daskinfer.worker import benchmark
from daskinfer.worker.benchmark import ModelBenchmark
from daskinfer.worker.model_runner import ModelOutput, ModelRunConfig, run_model

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).normal(size=(40, 3, 6, 5)).astype("float32")
N_SLOW = 20_000  # images for the slow model, enough for tuning
SLOW = np.resize(IMAGES, (N_SLOW, *IMAGES.shape[1:]))
LARGE = np.random.default_rng(1).normal(size=(2_000, 3, 32, 32)).astype("float32")  # too few for tuning the batch size


def is_channels_last(x: torch.Tensor) -> bool:
    """Return whether a batch is in that format, and in no other."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.ndim in formats and x.is_contiguous(memory_format=formats[x.ndim]) and not x.is_contiguous()


class FormatRecorder(nn.Module):
    """A convolution that records the memory format of its batches, after calling ``first`` on them."""

    def __init__(self, first: Callable[[torch.Tensor], Any] = lambda x: None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.first, self.seen = nn.Conv2d(3, 4, 3), first, list[bool]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(is_channels_last(x))
        self.first(x)
        return self.conv(x)


class SlowIfContiguous(nn.Module):
    """A convolution that takes 0.25 ms per row, a quarter of that in channels_last; the output tells which it was."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 1, (6, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(len(x) * (0.000_06 if is_channels_last(x) else 0.000_25))
        return self.conv(x[..., :6, :5]).flatten(1) + (1e-5 if is_channels_last(x) else 0.0)

    def compute_expected(self, x: Any) -> Any:
        """Compute the output with torch only, without delay."""
        return run_plain(nn.Sequential(self.conv, nn.Flatten()), x[..., :6, :5])


def run(module: Any, x: Any = IMAGES, start: int = 0, *, measured: bool = True, size: int = 8, **fields: Any) -> ModelOutput:
    """Run one chunk, as if channels_last was measured to be faster, or was not."""
    model = module if isinstance(module, LoadedModel) else LoadedModel.from_model(module, CPU)
    ports = Ports.from_input(x)
    job = ModelRunConfig(ports, BatchConfig(size, channels_last=("cpu",) if measured else ()), Options(**fields))
    return run_model(model, ports.split(x), start, job)


def run_plain(module: nn.Module, x: Any = IMAGES) -> Any:
    """Run the module with torch only."""
    with torch.inference_mode():
        return module(torch.from_numpy(x)).numpy()


def test_the_format_of_a_models_input() -> None:
    """Images are in that format if it was measured to be faster or requested, only then; the output is the same."""
    for measured, fields in ((True, {}), (False, {"memory_format": "channels_last"})):
        output = run(module := FormatRecorder(), measured=measured, **fields)
        assert output.channels_last
        assert set(module.seen) == {True}
        np.testing.assert_allclose(output.arrays[0], run_plain(module), rtol=1e-5, atol=1e-6)
    for fields in ({}, {"memory_format": "contiguous"}):
        output = run(module := FormatRecorder(), measured=False, **fields)
        assert not output.channels_last
        assert set(module.seen) == {False}


def test_volumes_and_other_inputs() -> None:
    """Volumes have a format of their own; other ports, and models that take ndarrays, get contiguous arrays."""
    seen = []

    class Mixed(nn.Module):
        def forward(self, volume: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
            seen.append((is_channels_last(volume), meta.is_contiguous()))
            return volume.sum((1, 2, 3, 4)) + meta.sum((1, 2))

    volume, meta = np.ones((9, 2, 3, 4, 5), np.float32), np.ones((9, 2, 2), np.float32)
    assert run(Mixed(), {"volume": volume, "meta": meta}).arrays[0].tolist() == [124.0] * 9
    assert set(seen) == {(True, True)}
    output = run(lambda x: np.full(len(x), x.flags.c_contiguous))
    assert output.arrays[0].all()
    assert not output.channels_last


def test_cast_rows_are_in_that_format() -> None:
    """Rows that torch casts on the device are converted after the cast."""
    module = FormatRecorder()
    module.conv.to(torch.bfloat16)
    assert run(module, dtype="bfloat16").channels_last
    assert set(module.seen) == {True}


def flatten_view(x: torch.Tensor) -> None:
    """Do what many models do with contiguous tensors, and torch refuses for others."""
    x.view(len(x), -1)


def test_a_model_that_fails_in_that_format(caplog: pytest.LogCaptureFixture) -> None:
    """From its first failure on it runs in torch's default format, and no row is lost; one log line says so."""
    caplog.set_level(logging.INFO, "daskinfer.worker.model_runner")
    model = LoadedModel.from_model(module := FormatRecorder(flatten_view), CPU)
    for _ in range(2):
        output = run(model)
        assert not output.channels_last
        np.testing.assert_allclose(output.arrays[0], run_plain(module), rtol=1e-5, atol=1e-6)
        assert module.seen[:1] == [True]  # tried once
    assert module.seen.count(True) == 1
    assert [r.message for r in caplog.records] == [
        "cpu: the model fails in channels_last; continuing in torch's default memory format"
    ]


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_bad_row_is_bad_in_either_format(on_error: str, caplog: pytest.LogCaptureFixture) -> None:
    """Only that row is named or masked, and later chunks use the faster format."""

    def picky(x: torch.Tensor) -> None:
        if bool((x == 9).any()):
            raise ArithmeticError("a nine")

    bad = IMAGES.copy()
    bad[13] = 9
    caplog.set_level(logging.INFO, "daskinfer.worker.model_runner")
    model = LoadedModel.from_model(module := FormatRecorder(picky), CPU)
    if on_error == "raise":
        with pytest.raises(ChunkError, match="rows 13:14 on cpu failed: ArithmeticError: a nine"):
            run(model, bad, on_error=on_error)
    else:
        output = run(model, bad, on_error=on_error)
        assert list(output.failed_rows) == [13]
        good = np.arange(len(bad)) != 13
        np.testing.assert_allclose(output.arrays[0][good], run_plain(module, bad[good]), rtol=1e-5, atol=1e-6)
    assert run(model).channels_last
    assert not caplog.records


def test_a_failure_in_the_requested_format() -> None:
    """The requested format is always used, and torch's own error is shown if the model does not support it."""
    with pytest.raises(ChunkError, match="view size is not compatible"):
        run(FormatRecorder(flatten_view), measured=False, memory_format="channels_last")


def test_memory_that_runs_out_in_that_format() -> None:
    """The batch size is halved as always, and the format stays."""

    def short(x: torch.Tensor) -> None:
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    output = run(module := FormatRecorder(short))
    assert (output.batch_size, output.channels_last) == (2, True)
    np.testing.assert_allclose(output.arrays[0], run_plain(FormatRecorder()), rtol=1e-5, atol=1e-6)
    assert set(module.seen) == {True}


@settings(deadline=None, max_examples=30)
@given(cuts=st.sets(st.integers(1, len(IMAGES) - 1)))
def test_the_bytes_do_not_depend_on_the_cut(cuts: set[int]) -> None:
    """However the rows are cut, every row has the same bytes in that format too."""
    edges = [0, *sorted(cuts), len(IMAGES)]
    model = LoadedModel.from_model(FormatRecorder(), CPU)
    parts = [run(model, IMAGES[a:b], a).arrays[0] for a, b in pairwise(edges)]
    assert np.concatenate(parts).tobytes() == run(model).arrays[0].tobytes()


def make_benchmark(module: Any, x: Any = IMAGES, **fields: Any) -> ModelBenchmark:
    """Make a benchmark of a model."""
    ports = Ports.from_input(x)
    return ModelBenchmark(
        LoadedModel.from_model(module, CPU), ports.split(x), ModelRunConfig(ports, BatchConfig(8), Options(**fields))
    )


def test_which_models_may_be_faster() -> None:
    """Convolutional models that get images or volumes, for which torch has such a format."""
    assert make_benchmark(FormatRecorder()).can_use_channels_last
    assert make_benchmark(nn.Conv3d(1, 1, 2), np.ones((4, 1, 2, 3, 4), np.float32)).can_use_channels_last
    assert make_benchmark(
        FormatRecorder(), IMAGES.reshape(len(IMAGES), -1), preprocess=np.abs
    ).can_use_channels_last  # it may make images
    assert not make_benchmark(nn.Flatten()).can_use_channels_last
    assert not make_benchmark(nn.Conv1d(3, 1, 2), np.ones((4, 3, 5), np.float32)).can_use_channels_last
    assert not make_benchmark(np.negative).can_use_channels_last
    compiled = ModelBenchmark(
        LoadedModel(FormatRecorder(), CPU, takes_tensors=True, compiled=True),
        [IMAGES],
        ModelRunConfig(Ports.from_input(IMAGES), BatchConfig(8)),
    )
    assert not compiled.can_use_channels_last
    assert not make_benchmark(FormatRecorder(), memory_format="contiguous").can_use_channels_last
    assert not make_benchmark(FormatRecorder(), memory_format="channels_last").can_use_channels_last  # settled


def test_outputs_must_agree() -> None:
    """If a model's output differs in that format, or it fails, 0 rows are reported for it."""
    good, fails = make_benchmark(FormatRecorder()), make_benchmark(FormatRecorder(flatten_view))
    assert (good.run(8)[0], good.run_channels_last(8)[0]) == (8, 8)
    assert (fails.run(8)[0], fails.run_channels_last(8)[0]) == (8, 0)

    class ReadsTheMemory(nn.Module):
        def __init__(self, like: Callable[[torch.Tensor], torch.Tensor]) -> None:
            super().__init__()
            self.like = like

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.like(x.as_strided((len(x), 90), (90, 1)).cumsum(1))

    for like in (torch.Tensor.sin, lambda y: y.argmax(1), lambda y: y > 0):
        wrong = make_benchmark(ReadsTheMemory(like))
        assert (wrong.run(8)[0], wrong.run_channels_last(8)[0]) == (8, 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_outputs_in_half_precision_agree_less_closely(dtype: str) -> None:
    """Values that are rounded to three digits may differ in the third."""
    half = FormatRecorder()
    half.to(getattr(torch, dtype))
    for same in (make_benchmark(half, dtype=dtype), make_benchmark(FormatRecorder(), autocast="bf16")):
        assert (same.run(8)[0], same.run_channels_last(8)[0]) == (8, 8)


def test_nan_and_infinity_agree() -> None:
    """NaN, infinity and zero in both outputs are the same."""
    for odd in (np.nan, np.inf, 0.0):
        same = make_benchmark(FormatRecorder(), np.full_like(IMAGES, odd))
        assert (same.run(8)[0], same.run_channels_last(8)[0]) == (8, 8)


@pytest.mark.parametrize("devices", ["inline", ["cpu", "cpu"]])
def test_the_faster_format_is_found_and_remembered(two_cpus: list[str], devices: Any) -> None:
    """If there are enough rows it is measured, reported, and known to the next call."""
    history.clear()
    module = SlowIfContiguous()
    expected = module.compute_expected(SLOW)
    first, report = di.predict(module, SLOW, devices=devices, return_report=True)
    np.testing.assert_allclose(first, expected, rtol=1e-5, atol=2e-5)
    assert report.channels_last == ("cpu",)
    assert "images in channels_last on cpu" in report.details
    assert report.to_dict()["channels_last"] == ("cpu",)
    events: list[Any] = []
    second = di.predict(module, SLOW, devices=devices, progress=events.append)
    all_stats = [event.stats for event in events if type(event).__name__ == "ChunkDone"]
    n_in_it = sum(stats.stop - stats.start for stats in all_stats if stats.channels_last)
    # In this process the first task is computed before anything is chosen.
    assert n_in_it == N_SLOW if devices != "inline" else n_in_it > N_SLOW / 2
    assert "BatchTuningStarted" not in {type(event).__name__ for event in events}
    np.testing.assert_allclose(second, expected, rtol=1e-5, atol=2e-5)


def test_short_runs_try_it_with_one_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With some dozen micro-batches, three decide in this process; the next call knows the result."""
    monkeypatch.setattr(autotune, "MIN_QUICK_SPEEDUP", 0.0)  # whatever the clock says of one micro-batch
    history.clear()
    module, x = SlowIfContiguous(), LARGE
    expected = module.compute_expected(x)
    for n_contiguous in (range(1, 1000), range(1)):
        output, report = di.predict(module, x, devices="inline", return_report=True)
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=2e-5)
        assert (report.channels_last, report.by_kind) == (("cpu",), {})
        assert int((output - expected < 5e-6).sum()) in n_contiguous
    assert "images in channels_last on cpu" in report.details


def test_a_few_micro_batches_are_not_worth_it() -> None:
    """Trying the format would take longer than it could save."""
    history.clear()
    _, report = di.predict(SlowIfContiguous(), LARGE[: MIN_FORMAT_TRIAL_BATCHES * 64], devices="inline", return_report=True)
    assert (report.channels_last, report.batch_size) == ((), 64)  # fewer are left after the first task


def test_a_format_that_is_not_faster_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model for which the format does not matter runs as always, and the next call does not try again."""
    history.clear()
    n_tried = 0

    def count(*args: Any) -> bool:
        nonlocal n_tried
        n_tried += 1
        return benchmark.measure_channels_last(*args)

    monkeypatch.setattr(tuning, "measure_channels_last", count)
    module = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2))
    for _ in range(2):
        _, report = di.predict(module, LARGE, devices="inline", return_report=True)
        assert report.channels_last == ()
    assert n_tried == 1


def test_running_workers_choose_the_format_too(two_cpus: list[str]) -> None:
    """With automatic devices some rows may be computed before workers take over: then only the format is chosen."""
    history.clear()
    module = SlowIfContiguous()
    output, report = di.predict(module, SLOW, return_report=True)
    np.testing.assert_allclose(output, module.compute_expected(SLOW), rtol=1e-5, atol=2e-5)
    assert report.channels_last == ("cpu",)


def test_with_a_given_batch_size_nothing_is_measured(two_cpus: list[str]) -> None:
    """A given batch size gives the same bytes each time."""
    history.clear()
    _, report = di.predict(SlowIfContiguous(), SLOW[:9000], devices=two_cpus, batch_size=64, return_report=True)
    assert report.channels_last == ()


def test_a_resumed_run_uses_the_format_that_was_chosen(two_cpus: list[str], tmp_path: Path) -> None:
    """The manifest records it; the output of two attempts is that of one, to the byte."""
    history.clear()
    source, module = tmp_path / "x.npy", SlowIfContiguous()
    np.save(source, SLOW)
    how: dict[str, Any] = {"devices": two_cpus}
    di.run(module, source, tmp_path / "whole.npy", **how)
    header = parse_line((get_manifest_path(tmp_path / "whole.npy") / "header.json").read_bytes())
    assert header is not None
    assert header["channels_last"] == ["cpu"]

    class Enough(BaseException): ...

    n_done = 0

    def stop(event: Any) -> None:
        nonlocal n_done
        n_done += type(event).__name__ == "ChunkDone"
        if n_done > 3:
            raise Enough("so far")

    with pytest.raises(Enough, match="so far"):
        di.run(module, source, tmp_path / "parts.npy", progress=stop, **how)
    history.clear()  # as in another process
    report = di.run(module, source, tmp_path / "parts.npy", **how)
    assert 0 < report.rows < N_SLOW
    assert report.channels_last == ("cpu",)
    assert np.load(tmp_path / "parts.npy").tobytes() == np.load(tmp_path / "whole.npy").tobytes()
    with pytest.raises(OutputExists, match="options memory_format was 'auto' and is 'contiguous'"):
        di.run(module, source, tmp_path / "parts.npy", memory_format="contiguous", **how)


def test_older_manifests_have_the_default_format() -> None:
    """An output that was begun before there was a choice is in torch's default format."""
    header = Header(
        output="y", model="m", input={}, options={"pad": True}, shape=(8, 2), dtype="<f4", unit_rows=4, batch_size=4
    )
    record = {name: value for name, value in header.to_record().items() if name != "channels_last"}
    read = Header.from_record(json.loads(json.dumps(record)))
    assert (read.channels_last, read.options["memory_format"]) == ((), "auto")


def test_log_of_the_choice(caplog: pytest.LogCaptureFixture) -> None:
    """One DEBUG line has both speeds."""
    history.clear()
    with caplog.at_level(logging.DEBUG, "daskinfer.scheduling.autotune"):
        di.predict(SlowIfContiguous(), SLOW, devices="inline")
    assert any(r.message.startswith("channels_last: ") for r in caplog.records)
