"""The numbers behind the charts of a run."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daskinfer.diagnostics.charts import (
    MAX_SVG_DEVICES,
    N_BINS,
    Bar,
    Row,
    compute_idle_seconds,
    compute_throughput,
    list_rows,
    list_shares,
    make_bars,
    place_marks,
    render_svg,
    shorten_label,
    stack_throughput,
)
from daskinfer.diagnostics.device_stats import DeviceReport
from daskinfer.diagnostics.palette import COMPUTE, DEVICE_COLORS, FAILED_COLOR, get_device_color
from daskinfer.diagnostics.report import RunReport
from daskinfer.diagnostics.timeline import Mark, Span

SVG = "{http://www.w3.org/2000/svg}"


def span(device: str, began: float, seconds: float, n_rows: int = 8) -> Span:
    """A chunk that was computed only."""
    nothing = (began, began)
    return Span(device, 0, n_rows, 1, n_rows, nothing, (began, began + seconds), nothing)


def row(device: str, position: int = 0) -> Row:
    """The row of a device."""
    return Row(device, device, get_device_color(position))


def test_a_stage_that_took_no_time_has_no_bar() -> None:
    """There is a bar for each stage of a span that took time, counted from the first one's begin."""
    both = [Span("a", 0, 8, 1, 8, (5.0, 6.0), (7.0, 9.0), (9.0, 9.5)), span("b", 4.0, 2.0)]
    assert [(bar.span.device, bar.stage, bar.begin, bar.end) for bar in make_bars(both)] == [
        ("a", "read", 1.0, 2.0),
        ("a", "compute", 3.0, 5.0),
        ("a", "write", 5.0, 5.5),
        ("b", "compute", 0.0, 2.0),
    ]
    assert make_bars([]) == []
    assert make_bars([span("a", 1.0, 0.0)]) == []


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 1e4), st.floats(1e-3, 1e3), st.integers(1, 1000))))
def test_every_row_counts_once_in_the_speed(chunks: list[tuple[str, float, float, int]]) -> None:
    """Rows/s times the seconds of the bins are the rows of each device, however chunks overlap with bins."""
    bars = make_bars([span(device, began, seconds, n_rows) for device, began, seconds, n_rows in chunks])
    edges, by_device = compute_throughput(bars)
    assert len(edges) == N_BINS + 1
    assert set(by_device) == {device for device, *_ in chunks}
    for device, speed in by_device.items():
        n_rows = sum(n for name, _, _, n in chunks if name == device)
        assert sum(speed) * edges[1] == pytest.approx(n_rows, rel=1e-6)


def test_throughput_is_stacked() -> None:
    """Each device's rows/s begin where those of the device before it end, in the devices' order and colours."""
    edges, (first, idle, last) = stack_throughput(
        [row("a"), row("c", 1), row("b", 2)], make_bars([span("a", 0.0, 2.0), span("b", 0.0, 2.0, 16)])
    )
    assert (len(edges), first.row.device, idle.row.device, last.row.device) == (N_BINS + 1, "a", "c", "b")
    assert (first.bottom[0], first.top[0], idle.top, last.top[0]) == (
        0.0,
        pytest.approx(4.0),
        first.top,
        pytest.approx(12.0),
    )
    assert (first.row.color, last.row.color) == (get_device_color(0), get_device_color(2))


def test_devices_are_those_of_the_plan_first() -> None:
    """The plan's devices come first in its order, including idle ones, then any other that has a span."""
    devices = tuple(DeviceReport(name, "", n, 8 * n) for name, n in (("b", 0), ("a", 1)))
    report = RunReport(8, 1.0, 1, devices, timeline=(span("c", 0.0, 1.0), span("a", 0.0, 1.0)))
    assert [(one.device, one.color) for one in list_rows(report)] == [
        (name, DEVICE_COLORS[position]) for position, name in enumerate("bac")
    ]


def test_workers_that_were_not_needed_have_no_row() -> None:
    """If this process was faster, it has the only row, under the name that people know, in the colour of its place."""
    devices = (DeviceReport("cpu:0", "", 0, 0), DeviceReport("inline", "", 1, 8, n_cores=2))
    (only,) = list_rows(RunReport(8, 1.0, 1, devices))
    assert only == Row("inline", "this process (all 2 cores)", DEVICE_COLORS[1])


def test_the_requested_share_is_shown_if_there_was_one() -> None:
    """Shares by throughput and done are always there; one was requested only if the caller gave weights."""
    given, none = (
        RunReport(8, 1.0, 1, tuple(DeviceReport(name, "", 1, 8, asked_share=share) for name in "ab"))
        for share in (0.0, None)
    )
    assert [share.label for share in list_shares(given)] == ["requested", "measured", "done"]
    assert [share.label for share in list_shares(none)] == ["measured", "done"]
    assert [share.label for share in list_shares(RunReport(8, 1.0, 1, none.devices[:1]))] == ["done"]


def test_loading_and_the_first_call_have_bars() -> None:
    """What comes before the rows has bars of its own, the first call over the computing that it is a part of."""
    one = Span("a", 0, 8, 1, 8, (0.0, 0.5), (4.5, 8.5), (8.5, 8.5), loaded=(0.5, 4.5), first_call=(4.5, 6.5))
    assert [(bar.stage, bar.begin, bar.end) for bar in make_bars([one])] == [
        ("read", 0.0, 0.5),
        ("load the model", 0.5, 4.5),
        ("compute", 4.5, 8.5),
        ("first call", 4.5, 6.5),
    ]


def test_marks_have_their_place_on_the_time_axis() -> None:
    """A mark counts from the first bar, as bars do; a clock that is wrong puts none before the first or after the last."""
    marks = (Mark("a", 9.0, "worker died", ""), Mark("a", 12.5, "failed attempt", ""), Mark("a", 99.0, "device lost", ""))
    report = RunReport(8, 1.0, 1, (DeviceReport("a", "", 1, 8),), timeline=(span("a", 10.0, 4.0),), marks=marks)
    assert [placed.seconds for placed in place_marks(report)] == [0.0, 2.5, 4.0]
    picture = render_svg(list_rows(report), make_bars(report.timeline), place_marks(report))
    circles = [one.get("fill") for one in ElementTree.fromstring(picture).iter(f"{SVG}circle")]
    assert (len(circles), circles[0]) == (3, FAILED_COLOR)
    assert "went wrong" in picture


def test_idle_until_the_last_finished() -> None:
    """Each device that did something was idle until the last one finished; one without a chunk has no time."""
    devices = [DeviceReport(name, "", n, 0, 0.0, 0.0, 0.0, ended=at) for name, n, at in [("a", 1, 7.0), ("b", 2, 9.5)]]
    idle = DeviceReport("c", "", 0, 0, 0.0, 0.0, 0.0)
    assert compute_idle_seconds([*devices, idle]) == {"a": 2.5, "b": 0.0}
    assert compute_idle_seconds([]) == {}


def test_names_and_colours_are_bounded() -> None:
    """A long name is shortened for an axis; colours repeat once they are used up."""
    assert (shorten_label("cuda:0"), shorten_label("x" * 27), shorten_label("x" * 28)) == (
        "cuda:0",
        "x" * 27,
        "x" * 26 + "…",
    )
    assert {get_device_color(i) for i in range(40)} == set(DEVICE_COLORS)
    assert get_device_color(len(DEVICE_COLORS)) == get_device_color(0)


def paths(picture: str) -> list[tuple[str | None, str | None, str | None]]:
    """Colour, opacity and lines of each path."""
    root = ElementTree.fromstring(picture)
    return [(path.get("stroke"), path.get("stroke-opacity"), path.get("d")) for path in root.iter(f"{SVG}path")]


def test_the_small_picture() -> None:
    """A line shows when a device was busy, paler if it was busy part of the time; without bars there is no picture."""
    whole = [span("<a>", 0.0, 32.0), *(span("b", at, 0.05) for at in range(32))]
    (busy, rare) = paths(render_svg([row("<a>"), row("b")], make_bars(whole)))
    assert busy == (COMPUTE.color, "1", "M0 10h320")
    assert rare[1] == "0.5"
    assert (rare[2] or "").startswith("M0 32h1M10 32h1")
    assert next(ElementTree.fromstring(render_svg([row("<a>")], make_bars(whole))).itertext()) == "<a>"
    assert render_svg([row("a")], []) == ""


def test_the_small_picture_stays_small() -> None:
    """It stays below 20 kB with the most devices and chunks; devices that are not shown are counted."""
    devices = [f"cuda:{i}" for i in range(MAX_SVG_DEVICES + 3)]
    stretches = [(j * 0.71 + 0.01 * i, 0.1 + (i * j % 7) / 12) for i in range(len(devices)) for j in range(200)]
    bars = [
        Bar(span(device, 0.0, 1.0), lane, begin, begin + seconds)
        for device in devices
        for lane in ("read", "load the model", "compute", "first call", "write")
        for begin, seconds in stretches[:200]
    ]
    picture = render_svg([row(device) for device in devices], bars)
    assert len(picture) < 20_000
    assert " and 3 more devices" in "".join(ElementTree.fromstring(picture).itertext())
    assert "cuda:16" not in picture
