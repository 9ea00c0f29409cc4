"""Images in torch's memory format "channels_last": laid out so where that is faster, and never a row lost to it."""

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
from daskinfer.core.pytree import Ports
from daskinfer.errors import ChunkError, OutputExists
from daskinfer.execution import tuning
from daskinfer.execution.tuning import MIN_FORMAT_TRIAL_BATCHES
from daskinfer.options import Options
from daskinfer.scheduling import autotune
from daskinfer.scheduling.throughput_history import history
from daskinfer.storage.manifest import Header, parse_line
from daskinfer.storage.paths import get_manifest_path
from daskinfer.worker import task
from daskinfer.worker.benchmark import ModelBenchmark
from daskinfer.worker.loaded import LoadedModel
from daskinfer.worker.model_runner import ModelOutput, ModelRunConfig, run_model

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).normal(size=(40, 3, 6, 5)).astype("float32")
N_SLOW = 20_000  # images of the network that is slow, enough for a choice
SLOW = np.resize(IMAGES, (N_SLOW, *IMAGES.shape[1:]))
LARGE = np.random.default_rng(1).normal(size=(2_000, 3, 32, 32)).astype("float32")  # too few for the ladder


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether a batch lies in that format, and in no other."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.ndim in formats and x.is_contiguous(memory_format=formats[x.ndim]) and not x.is_contiguous()


class Looks(nn.Module):
    """A convolution that notes in which format its batches lay, and does as it is told with them first."""

    def __init__(self, first: Callable[[torch.Tensor], Any] = lambda x: None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.first, self.seen = nn.Conv2d(3, 4, 3), first, list[bool]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(is_channels_last(x))
        self.first(x)
        return self.conv(x)


class SlowIfContiguous(nn.Module):
    """A convolution that takes 0.25 ms for a row, a quarter of that in channels_last; the answer says which it was."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 1, (6, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(len(x) * (0.000_06 if is_channels_last(x) else 0.000_25))
        return self.conv(x[..., :6, :5]).flatten(1) + (1e-5 if is_channels_last(x) else 0.0)

    def answer(self, x: Any) -> Any:
        """What torch alone answers, in no time."""
        return plain(nn.Sequential(self.conv, nn.Flatten()), x[..., :6, :5])


def run(
    network: Any, x: Any = IMAGES, start: int = 0, *, measured: bool = True, size: int = 8, **fields: Any
) -> ModelOutput:
    """One chunk, where channels_last was measured to pay, or was not."""
    model = network if isinstance(network, LoadedModel) else LoadedModel.from_model(network, CPU)
    ports = Ports.from_input(x)
    job = ModelRunConfig(ports, size, Options(**fields), channels_last=("cpu",) if measured else ())
    return run_model(model, ports.split(x), start, job)


def plain(network: nn.Module, x: Any = IMAGES) -> Any:
    """The same by torch alone."""
    with torch.inference_mode():
        return network(torch.from_numpy(x)).numpy()


def test_what_a_network_gets() -> None:
    """Images lie in that format where it was measured or asked for, and only there; the answer is the same."""
    for measured, fields in ((True, {}), (False, {"memory_format": "channels_last"})):
        answer = run(network := Looks(), measured=measured, **fields)
        assert answer.channels_last
        assert set(network.seen) == {True}
        np.testing.assert_allclose(answer.arrays[0], plain(network), rtol=1e-5, atol=1e-6)
    for fields in ({}, {"memory_format": "contiguous"}):
        answer = run(network := Looks(), measured=False, **fields)
        assert not answer.channels_last
        assert set(network.seen) == {False}


def test_volumes_and_what_is_no_image() -> None:
    """Volumes have a format of their own; other ports, and networks that take ndarrays, get what they always got."""
    seen = []

    class Mixed(nn.Module):
        def forward(self, volume: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
            seen.append((is_channels_last(volume), meta.is_contiguous()))
            return volume.sum((1, 2, 3, 4)) + meta.sum((1, 2))

    volume, meta = np.ones((9, 2, 3, 4, 5), np.float32), np.ones((9, 2, 2), np.float32)
    assert run(Mixed(), {"volume": volume, "meta": meta}).arrays[0].tolist() == [124.0] * 9
    assert set(seen) == {(True, True)}
    answer = run(lambda x: np.full(len(x), x.flags.c_contiguous))
    assert answer.arrays[0].all()
    assert not answer.channels_last


def test_a_network_casts_and_gets_that_format() -> None:
    """Rows that torch casts on the device are laid out after it."""
    network = Looks()
    network.conv.to(torch.bfloat16)
    assert run(network, dtype="bfloat16").channels_last
    assert set(network.seen) == {True}


def views(x: torch.Tensor) -> None:
    """What many a network does with contiguous tensors, and torch refuses on others."""
    x.view(len(x), -1)


def test_a_network_that_fails_in_that_format(caplog: pytest.LogCaptureFixture) -> None:
    """It is run in torch's own, once found out, and no row is lost; a line says so."""
    caplog.set_level(logging.INFO, "daskinfer.worker.model_runner")
    model = LoadedModel.from_model(network := Looks(views), CPU)
    for _ in range(2):
        answer = run(model)
        assert not answer.channels_last
        np.testing.assert_allclose(answer.arrays[0], plain(network), rtol=1e-5, atol=1e-6)
        assert network.seen[:1] == [True]  # tried once
    assert network.seen.count(True) == 1
    assert [r.message for r in caplog.records] == [
        "cpu: the network fails in channels_last; going on in torch's own memory format"
    ]


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_row_at_fault_is_at_fault_in_either_format(on_error: str, caplog: pytest.LogCaptureFixture) -> None:
    """Only it is named or masked, and the chunks after it have the format that pays."""

    def picky(x: torch.Tensor) -> None:
        if bool((x == 9).any()):
            raise ArithmeticError("a nine")

    bad = IMAGES.copy()
    bad[13] = 9
    caplog.set_level(logging.INFO, "daskinfer.worker.model_runner")
    model = LoadedModel.from_model(network := Looks(picky), CPU)
    if on_error == "raise":
        with pytest.raises(ChunkError, match="rows 13:14 on cpu failed: ArithmeticError: a nine"):
            run(model, bad, on_error=on_error)
    else:
        answer = run(model, bad, on_error=on_error)
        assert list(answer.failed_rows) == [13]
        good = np.arange(len(bad)) != 13
        np.testing.assert_allclose(answer.arrays[0][good], plain(network, bad[good]), rtol=1e-5, atol=1e-6)
    assert run(model).channels_last
    assert not caplog.records


def test_a_failure_in_the_format_that_was_asked_for() -> None:
    """Whoever asks for it gets it, and torch's own words where it does not do."""
    with pytest.raises(ChunkError, match="view size is not compatible"):
        run(Looks(views), measured=False, memory_format="channels_last")


def test_memory_that_runs_out_in_that_format() -> None:
    """The micro-batch is halved as ever, and the format stays."""

    def short(x: torch.Tensor) -> None:
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    answer = run(network := Looks(short))
    assert (answer.batch_size, answer.channels_last) == (2, True)
    np.testing.assert_allclose(answer.arrays[0], plain(Looks()), rtol=1e-5, atol=1e-6)
    assert set(network.seen) == {True}


@settings(deadline=None, max_examples=30)
@given(cuts=st.sets(st.integers(1, len(IMAGES) - 1)))
def test_the_bytes_do_not_depend_on_the_cut(cuts: set[int]) -> None:
    """However the rows are cut, every row has the same bytes in that format, too."""
    edges = [0, *sorted(cuts), len(IMAGES)]
    model = LoadedModel.from_model(Looks(), CPU)
    parts = [run(model, IMAGES[a:b], a).arrays[0] for a, b in pairwise(edges)]
    assert np.concatenate(parts).tobytes() == run(model).arrays[0].tobytes()


def trial(network: Any, x: Any = IMAGES, **fields: Any) -> ModelBenchmark:
    """A network that is to be timed."""
    ports = Ports.from_input(x)
    return ModelBenchmark(LoadedModel.from_model(network, CPU), ports.split(x), ModelRunConfig(ports, 8, Options(**fields)))


def test_which_networks_may_be_faster() -> None:
    """Those with convolutions that get images, of any kind that torch may lay out otherwise."""
    assert trial(Looks()).can_use_channels_last
    assert trial(nn.Conv3d(1, 1, 2), np.ones((4, 1, 2, 3, 4), np.float32)).can_use_channels_last
    assert trial(Looks(), IMAGES.reshape(len(IMAGES), -1), preprocess=np.abs).can_use_channels_last  # it may make images
    assert not trial(nn.Flatten()).can_use_channels_last
    assert not trial(nn.Conv1d(3, 1, 2), np.ones((4, 3, 5), np.float32)).can_use_channels_last
    assert not trial(np.negative).can_use_channels_last
    compiled = ModelBenchmark(
        LoadedModel(Looks(), CPU, takes_tensors=True, compiled=True), [IMAGES], ModelRunConfig(Ports.from_input(IMAGES), 8)
    )
    assert not compiled.can_use_channels_last
    assert not trial(Looks(), memory_format="contiguous").can_use_channels_last
    assert not trial(Looks(), memory_format="channels_last").can_use_channels_last  # settled


def test_answers_have_to_agree() -> None:
    """A network that answers otherwise in that format, or fails, holds no row in it."""
    good, fails = trial(Looks()), trial(Looks(views))
    assert (good.run(8)[0], good.run_channels_last(8)[0]) == (8, 8)
    assert (fails.run(8)[0], fails.run_channels_last(8)[0]) == (8, 0)

    class ReadsTheMemory(nn.Module):
        def __init__(self, like: Callable[[torch.Tensor], torch.Tensor]) -> None:
            super().__init__()
            self.like = like

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.like(x.as_strided((len(x), 90), (90, 1)).cumsum(1))

    for like in (torch.Tensor.sin, lambda y: y.argmax(1), lambda y: y > 0):
        wrong = trial(ReadsTheMemory(like))
        assert (wrong.run(8)[0], wrong.run_channels_last(8)[0]) == (8, 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_answers_in_half_precision_agree_less_closely(dtype: str) -> None:
    """What is rounded to three digits may differ in the third."""
    half = Looks()
    half.to(getattr(torch, dtype))
    for same in (trial(half, dtype=dtype), trial(Looks(), autocast="bf16")):
        assert (same.run(8)[0], same.run_channels_last(8)[0]) == (8, 8)


def test_answers_agree_where_there_is_none() -> None:
    """What is no number in both is the same, and zeros are zeros."""
    for odd in (np.nan, np.inf, 0.0):
        same = trial(Looks(), np.full_like(IMAGES, odd))
        assert (same.run(8)[0], same.run_channels_last(8)[0]) == (8, 8)


@pytest.mark.parametrize("devices", ["inline", ["cpu", "cpu"]])
def test_the_format_that_pays_is_found_and_kept(two_cpus: list[str], devices: Any) -> None:
    """Where there is enough to do it is measured, said in the report, and known to the next call."""
    history.clear()
    net = SlowIfContiguous()
    expected = net.answer(SLOW)
    first, report = di.predict(net, SLOW, devices=devices, return_report=True)
    np.testing.assert_allclose(first, expected, rtol=1e-5, atol=2e-5)
    assert report.channels_last == ("cpu",)
    assert "images in channels_last on cpu" in report.details
    assert report.to_dict()["channels_last"] == ("cpu",)
    events: list[Any] = []
    second = di.predict(net, SLOW, devices=devices, progress=events.append)
    receipts = [event.receipt for event in events if type(event).__name__ == "ChunkDone"]
    n_in_it = sum(receipt.stop - receipt.start for receipt in receipts if receipt.channels_last)
    # In this process the first task is done before anything is chosen.
    assert n_in_it == N_SLOW if devices != "inline" else n_in_it > N_SLOW / 2
    assert "MicroBatchesTried" not in {type(event).__name__ for event in events}
    np.testing.assert_allclose(second, expected, rtol=1e-5, atol=2e-5)


def test_short_runs_try_it_with_one_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process three micro-batches tell, where there are some dozen; what they found is known to the next call."""
    monkeypatch.setattr(autotune, "MIN_QUICK_SPEEDUP", 0.0)  # whatever the clock says of one micro-batch
    history.clear()
    net, x = SlowIfContiguous(), LARGE
    expected = net.answer(x)
    for n_contiguous in (range(1, 1000), range(1)):
        answer, report = di.predict(net, x, devices="inline", return_report=True)
        np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=2e-5)
        assert (report.channels_last, report.by_kind) == (("cpu",), {})
        assert int((answer - expected < 5e-6).sum()) in n_contiguous
    assert "images in channels_last on cpu" in report.details


def test_a_few_micro_batches_are_not_worth_it() -> None:
    """Trying would take longer than it gains."""
    history.clear()
    _, report = di.predict(SlowIfContiguous(), LARGE[: MIN_FORMAT_TRIAL_BATCHES * 64], devices="inline", return_report=True)
    assert (report.channels_last, report.batch_size) == ((), 64)  # what is left after the first task is less


def test_a_format_that_does_not_pay_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network to which it is all the same is run as ever, and not tried by the next call again."""
    history.clear()
    n_tried = 0

    def tried(*given: Any) -> bool:
        nonlocal n_tried
        n_tried += 1
        return task.is_channels_last_faster(*given)

    monkeypatch.setattr(tuning, "measure_channels_last", tried)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2))
    for _ in range(2):
        _, report = di.predict(net, LARGE, devices="inline", return_report=True)
        assert report.channels_last == ()
    assert n_tried == 1


def test_workers_that_are_there_look_at_it_too(two_cpus: list[str]) -> None:
    """Where nobody says who computes, and workers do, rows may be done already: only the format is still chosen."""
    history.clear()
    net = SlowIfContiguous()
    answer, report = di.predict(net, SLOW, return_report=True)
    np.testing.assert_allclose(answer, net.answer(SLOW), rtol=1e-5, atol=2e-5)
    assert report.channels_last == ("cpu",)


def test_a_named_micro_batch_is_run_as_ever(two_cpus: list[str]) -> None:
    """Whoever names it gets the same bytes each time: nothing is measured."""
    history.clear()
    _, report = di.predict(SlowIfContiguous(), SLOW[:9000], devices=two_cpus, batch_size=64, return_report=True)
    assert report.channels_last == ()


def test_a_run_goes_on_in_the_format_that_was_chosen(two_cpus: list[str], tmp_path: Path) -> None:
    """The manifest keeps it; the answer of two attempts is that of one, to the byte."""
    history.clear()
    source, net = tmp_path / "x.npy", SlowIfContiguous()
    np.save(source, SLOW)
    how: dict[str, Any] = {"devices": two_cpus}
    di.run(net, source, tmp_path / "whole.npy", **how)
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
        di.run(net, source, tmp_path / "parts.npy", progress=stop, **how)
    history.clear()  # as in another process
    report = di.run(net, source, tmp_path / "parts.npy", **how)
    assert 0 < report.rows < N_SLOW
    assert report.channels_last == ("cpu",)
    assert np.load(tmp_path / "parts.npy").tobytes() == np.load(tmp_path / "whole.npy").tobytes()
    with pytest.raises(OutputExists, match="options memory_format was 'auto' and is 'contiguous'"):
        di.run(net, source, tmp_path / "parts.npy", memory_format="contiguous", **how)


def test_manifests_from_before_say_nothing_of_it() -> None:
    """An output that was begun when there was no choice is of torch's own format."""
    header = Header(
        output="y", model="m", input={}, options={"pad": True}, shape=(8, 2), dtype="<f4", unit_rows=4, batch_size=4
    )
    record = {name: value for name, value in header.to_record().items() if name != "channels_last"}
    read = Header.from_record(json.loads(json.dumps(record)))
    assert (read.channels_last, read.options["memory_format"]) == ((), "auto")


def test_log_of_the_choice(caplog: pytest.LogCaptureFixture) -> None:
    """One DEBUG line tells both speeds."""
    history.clear()
    with caplog.at_level(logging.DEBUG, "daskinfer.scheduling.autotune"):
        di.predict(SlowIfContiguous(), SLOW, devices="inline")
    assert any(r.message.startswith("channels_last: ") for r in caplog.records)
