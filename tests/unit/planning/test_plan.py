import json
from xml.etree import ElementTree

import pytest

from daskinfer.planning.plan import DevicePlan, Plan, find_memory_problems, make_device_plans
from daskinfer.scheduling.chunking import ChunkLayout, fit_chunk_nbytes, make_chunks


def plan_devices(layout: ChunkLayout, *, model_nbytes: int = 0, n_devices: int = 1) -> tuple[DevicePlan, ...]:
    """Summarize a layout for GPUs of equal weight and rows of 1 KiB."""
    return make_device_plans(
        layout,
        names=[f"cuda:{i}" for i in range(n_devices)],
        labels=["<b>"] * n_devices,
        weights=[1.0] * n_devices,
        row_in_nbytes=768,
        row_out_nbytes=256,
        model_nbytes=model_nbytes,
    )


def make_plan(**changed: object) -> Plan:
    """Make a plan of 1010 rows for two GPUs, with some fields changed."""
    layout = make_chunks(1010, [1.0, 1.0], batch_size=10)
    fields: dict[str, object] = {
        "devices": plan_devices(layout, model_nbytes=5, n_devices=2),
        "layout": layout,
        "weights_assumed": False,
        "model": "Net <1>",
        "inputs": ("x: (1010, 192) float32", "y: (1010,) int8"),
        "outputs": ("(1010, 64) float32",),
    }
    return Plan(**(fields | changed))  # type: ignore[arg-type]


def test_a_device_is_described_in_rows_and_bytes():
    """Rows, chunks and bytes are summed per device; the peak is the model and the largest chunk."""
    first, second = plan_devices(make_chunks(1010, [1.0, 1.0], batch_size=10), model_nbytes=5, n_devices=2)
    assert (first.n_rows, first.n_chunks, first.share) == (510, 6, 510 / 1010)
    assert (second.n_rows, second.input_nbytes, second.output_nbytes) == (500, 500 * 768, 500 * 256)
    assert first.peak_nbytes == 5 + 130 * 1024


def test_the_peak_counts_the_padding():
    """Three rows at batch_size=64 take the memory of 64 rows."""
    assert plan_devices(make_chunks(3, [1.0], batch_size=64))[0].peak_nbytes == 64 * 1024


def test_a_device_without_rows_is_described_by_zeros():
    """Without rows, share, peak and counts are 0, and nothing is divided by zero."""
    (device,) = plan_devices(make_chunks(0, [1.0], batch_size=8), model_nbytes=5)
    assert (device.share, device.n_rows, device.n_chunks, device.peak_nbytes) == (0.0, 0, 0, 0)


def test_a_plan_as_text():
    """The text is a header with all ports, one line per device under aligned columns, a total, and the notes."""
    lines = str(make_plan(notes=("GPU 3 is left out.",))).splitlines()
    assert lines[:4] == [
        "Net <1> on 1,010 rows in 12 chunks",
        "input   x: (1010, 192) float32",
        "input   y: (1010,) int8",
        "output  (1010, 64) float32",
    ]
    assert [" ".join(line.split()) for line in lines[5:]] == [
        "device name weight share rows chunks batch size in out needs",
        "cuda:0 <b> 1 50.5% 510 6 10 382.5 KiB 127.5 KiB 130.0 KiB",
        "cuda:1 <b> 1 49.5% 500 6 10 375.0 KiB 125.0 KiB 130.0 KiB",
        "total 1,010 12 757.5 KiB 252.5 KiB",
        "note: GPU 3 is left out.",
    ]
    assert len({len(line) for line in lines[5:8]}) == 1


@pytest.mark.parametrize("assumed", [True, False])
def test_assumed_weights_are_called_so_once(assumed):
    """The word assumed appears once if no run has measured the weights, and not at all otherwise."""
    plan = make_plan(weights_assumed=assumed)
    assert str(plan).count("assumed") == plan._repr_html_().count("assumed") == int(assumed)


def test_a_plan_is_escaped_in_html():
    """Names, labels, ports and notes that look like HTML are escaped; the whole parses as well-formed markup."""
    page = make_plan(inputs=("<i>",), outputs=("&",), notes=("<script>",))._repr_html_()
    assert not any(tag in page for tag in ("<b>", "<1>", "<i>", "<script>"))
    text = list(ElementTree.fromstring(f"<div>{page.replace('<br>', '<br/>')}</div>").itertext())
    assert {"<b>", "Net <1> on 1,010 rows in 12 chunks", "input   <i>", "output  &", "note: <script>"} <= set(text)


def test_a_plan_survives_json():
    """to_dict returns the whole plan as plain values."""
    plan = make_plan()
    read = json.loads(json.dumps(plan.to_dict()))
    assert read == plan.to_dict()
    assert read["chunks"][1] == [130, 260, 1]
    assert (read["n_rows"], read["batch_size"], read["devices"][1]["n_rows"]) == (1010, 10, 500)


def test_totals_of_a_plan():
    """The totals of a plan are the sums over its devices."""
    plan = make_plan()
    assert (plan.n_rows, plan.batch_size, plan.n_chunks) == (1010, 10, 12)
    assert (plan.input_nbytes, plan.output_nbytes) == (1010 * 768, 1010 * 256)


@pytest.mark.parametrize(
    ("cell_rows", "limit", "cure"),
    [
        (64, 49 << 10, "Use batch_size=48 or less (--batch-size)."),
        (128, 101 << 10, "Use an output whose write-units (chunks or shards) hold 100 rows or fewer."),
        (64, 1 << 10, "Not even one row fits beside the model: leave cuda:0 out, or use a device with more memory."),
        (64, 100 << 10, "Rechunk the input to chunks of 99 rows or fewer."),
    ],
)
def test_a_chunk_that_does_not_fit_is_refused_with_the_cure(cell_rows, limit, cure):
    """The message names the chunk, its rows, the device, the bytes needed and free, and what to change."""
    layout = make_chunks(64 * 32, [1.0], batch_size=64, cell_rows=cell_rows)
    plan = plan_devices(layout, model_nbytes=1024)
    (refusal,) = find_memory_problems(plan, layout, [limit], row_nbytes=1024, model_nbytes=1024)
    needs, advice = refusal.split(" free. ")
    assert needs.startswith("chunk 0 (rows 0:512) needs 513.0 KiB on cuda:0 at batch_size=64; ")
    assert advice == cure


def test_the_worst_offender_comes_first():
    """Problems are sorted by the bytes that are lacking; an unknown limit or an idle device is never refused."""
    layout = make_chunks(300, [1.0, 1.0, 1.0, 1.0, 0.0], batch_size=1)
    limits = [1 << 14, 0, 1 << 10, 1 << 30, 1]
    refusals = find_memory_problems(plan_devices(layout, n_devices=5), layout, limits, row_nbytes=1024, model_nbytes=0)
    assert [r.split(" on ")[1].split()[0] for r in refusals] == ["cuda:2", "cuda:0"]


def test_a_layout_made_to_fit_is_not_refused():
    """A layout limited by fit_chunk_nbytes is refused only if a single cell does not fit."""
    limit = 100 << 10
    budget = fit_chunk_nbytes([limit], model_nbytes=1024)
    layout = make_chunks(5000, [1.0], batch_size=64, row_nbytes=1024, chunk_nbytes=budget)
    plan = plan_devices(layout, model_nbytes=1024)
    assert find_memory_problems(plan, layout, [limit], row_nbytes=1024, model_nbytes=1024) == []


@pytest.mark.parametrize(("balanced", "seconds"), [(True, 1010 / 400), (False, 510 / 100)])
def test_measured_throughput_gives_the_expected_time(balanced, seconds):
    """Balanced devices finish together; fixed shares take as long as the slowest device needs for its own."""
    layout = make_chunks(1010, [1.0, 1.0], batch_size=10)
    devices = make_device_plans(
        layout,
        names=["cpu:0", "cpu:1"],
        labels=["", ""],
        weights=[1.0, 1.0],
        row_in_nbytes=4,
        row_out_nbytes=4,
        model_nbytes=0,
        speeds=[100.0, 300.0],
    )
    plan = make_plan(layout=layout, devices=devices, balanced=balanced)
    assert plan.seconds == seconds
    assert f"time    about {seconds:.3g} s at the measured throughput, once workers run; longer if" in str(plan)
    assert "rows/s" in str(plan)


def test_no_expected_time_without_throughput():
    """Unless every working device was measured, no time is expected."""
    assert make_plan().seconds is None
    assert "rows/s" not in str(make_plan())
