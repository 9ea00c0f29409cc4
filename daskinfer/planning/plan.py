"""A plan as people and programs read it: what each device would do, how many bytes that takes, and what does not fit.

Made from a ``scheduling.chunking.ChunkLayout``; decides nothing about the rows.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from daskinfer.core.formatting import format_html_table, format_nbytes, format_text_table
from daskinfer.scheduling.chunking import ChunkLayout


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """One device's part of a plan.

    ``share`` is a fraction of all rows. ``peak_nbytes`` covers the model and the device's largest chunk, input and output,
    with the last micro-batch padded to the full shape, but not the activations between layers; it is 0 without a chunk.
    ``rows_per_second`` is the measured throughput of the device, 0 if it is unknown.
    """

    device: str
    label: str
    weight: float
    share: float
    n_rows: int
    n_chunks: int
    input_nbytes: int
    output_nbytes: int
    peak_nbytes: int
    rows_per_second: float = 0.0


def make_device_plans(
    layout: ChunkLayout,
    *,
    names: Sequence[str],
    labels: Sequence[str],
    weights: Sequence[float],
    row_in_nbytes: int,
    row_out_nbytes: int,
    model_nbytes: int,
    speeds: Sequence[float] = (),
) -> tuple[DevicePlan, ...]:
    """Summarize a layout per device.

    Parameters
    ----------
    layout
        Which rows form which chunk.
    names, labels, weights
        Of each device, in the order to which the positions in ``layout.devices`` refer.
    row_in_nbytes, row_out_nbytes
        Bytes of one row of all inputs, and of all outputs.
    model_nbytes
        Bytes of the model on a device.
    speeds
        Throughput of each device in rows/s, 0 if unknown; empty if all are unknown.

    Returns
    -------
    tuple of DevicePlan
        One per device, including devices without rows.

    Examples
    --------
    >>> from daskinfer.scheduling.chunking import make_chunks
    >>> layout = make_chunks(8, [1.0], batch_size=2)
    >>> one = make_device_plans(
    ...     layout, names=["cpu:0"], labels=["CPU"], weights=[1.0], row_in_nbytes=8, row_out_nbytes=4, model_nbytes=9
    ... )[0]
    >>> one.n_rows, one.n_chunks, one.input_nbytes, one.output_nbytes, one.peak_nbytes
    (8, 4, 64, 32, 33)
    """
    row_nbytes = row_in_nbytes + row_out_nbytes
    n_chunks = Counter(layout.devices)
    device_rows = layout.rows_per_device(len(names))
    columns = zip(names, labels, weights, device_rows, layout.largest_chunks(len(names)), strict=True)
    return tuple(
        DevicePlan(
            device=name,
            label=label,
            weight=weight,
            share=n_rows / max(1, layout.n_rows),
            n_rows=n_rows,
            n_chunks=n_chunks[index],
            input_nbytes=n_rows * row_in_nbytes,
            output_nbytes=n_rows * row_out_nbytes,
            peak_nbytes=model_nbytes + layout.padded_rows(largest) * row_nbytes if largest else 0,
            rows_per_second=speeds[index] if speeds else 0.0,
        )
        for index, (name, label, weight, n_rows, largest) in enumerate(columns)
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """What a call would compute on which device, in which chunks and with how many bytes; displays as a table.

    Parameters
    ----------
    devices
        One record per device, in the order of ``device_weights``.
    layout
        The chunks, rows ``start:stop`` each, and the position of each chunk's device.
    weights_assumed
        Whether the weights are a prior, since no run has measured the devices yet.
    model
        A short name of the model.
    inputs, outputs
        One line per port, like ``"x: (200000, 1, 8, 8) float32"``.
    notes
        Anything else worth knowing before it runs, a sentence each.
    balanced
        Whether devices get rows according to their throughput while it runs; if not, exactly the layout's chunks.

    Examples
    --------
    >>> from daskinfer.scheduling.chunking import make_chunks
    >>> layout = make_chunks(1000, [3.0, 1.0], batch_size=10)
    >>> devices = make_device_plans(
    ...     layout,
    ...     names=["cuda:0", "cpu:0"],
    ...     labels=["H100", "CPU"],
    ...     weights=[3.0, 1.0],
    ...     row_in_nbytes=64,
    ...     row_out_nbytes=40,
    ...     model_nbytes=4096,
    ... )
    >>> print(Plan(devices, layout, True, "Net", ("x: (1000, 16) float32",), ("(1000, 10) float32",)))
    Net on 1,000 rows in 12 chunks
    input   x: (1000, 16) float32
    output  (1000, 10) float32
    <BLANKLINE>
    device  name  weight (assumed)  share   rows  chunks  batch size        in       out     needs
    cuda:0  H100                 3  75.0%    750       6           10  46.9 KiB  29.3 KiB  23.3 KiB
    cpu:0   CPU                  1  25.0%    250       6           10  15.6 KiB   9.8 KiB  11.1 KiB
    total                                  1,000      12               62.5 KiB  39.1 KiB
    """

    devices: tuple[DevicePlan, ...]
    layout: ChunkLayout
    weights_assumed: bool
    model: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    notes: tuple[str, ...] = ()
    balanced: bool = False

    @property
    def seconds(self) -> float | None:
        """Expected seconds once workers have loaded the model; None unless every device that gets rows was measured."""
        working = [device for device in self.devices if device.n_rows]
        if not working or not all(device.rows_per_second for device in working):
            return None
        if self.balanced:
            return self.n_rows / sum(device.rows_per_second for device in working)
        return max(device.n_rows / device.rows_per_second for device in working)

    @property
    def n_rows(self) -> int:
        """Rows of the input."""
        return self.layout.n_rows

    @property
    def batch_size(self) -> int:
        """Rows of a micro-batch."""
        return self.layout.batch_size

    @property
    def n_chunks(self) -> int:
        """Chunks of all devices together."""
        return len(self.layout.chunks)

    @property
    def input_nbytes(self) -> int:
        """Bytes of all inputs."""
        return sum(device.input_nbytes for device in self.devices)

    @property
    def output_nbytes(self) -> int:
        """Bytes of all outputs."""
        return sum(device.output_nbytes for device in self.devices)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain strings, numbers, lists and dicts; a chunk is ``[start, stop, device position]``."""
        return {
            "model": self.model,
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "n_rows": self.n_rows,
            "batch_size": self.batch_size,
            "cell_rows": self.layout.cell_rows,
            "input_nbytes": self.input_nbytes,
            "output_nbytes": self.output_nbytes,
            "weights_assumed": self.weights_assumed,
            "devices": [asdict(device) for device in self.devices],
            "chunks": [[c.start, c.stop, device] for c, device in zip(self.layout.chunks, self.layout.devices, strict=True)],
            "seconds": self.seconds,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        table = format_text_table(self._get_column_names(), [*self._format_device_cells(), self._format_total_cells()])
        return "\n".join([*self._format_header_lines(), "", table, *(f"note: {note}" for note in self.notes)])

    __repr__ = __str__  # shown at the interpreter's prompt, and in a notebook without HTML

    def _repr_html_(self) -> str:
        head = "<br>".join(html.escape(line) for line in self._format_header_lines())
        table = format_html_table(self._get_column_names(), [*self._format_device_cells(), self._format_total_cells()])
        return f"<p>{head}</p>{table}" + "".join(f"<p>note: {html.escape(note)}</p>" for note in self.notes)

    def _format_header_lines(self) -> list[str]:
        return [
            f"{self.model} on {self.n_rows:,} rows in {self.n_chunks:,} chunks",
            *(f"input   {port}" for port in self.inputs),
            *(f"output  {port}" for port in self.outputs),
            *([] if self.seconds is None else [f"time    about {self.seconds:,.3g} s {_TIME_CAVEAT}"]),
        ]

    @property
    def _has_measured_speeds(self) -> bool:
        return any(device.rows_per_second for device in self.devices)

    def _get_column_names(self) -> list[str]:
        weight = "weight (assumed)" if self.weights_assumed else "weight"
        speed = ["rows/s"] if self._has_measured_speeds else []
        return ["device", "name", weight, *speed, "share", "rows", "chunks", "batch size", "in", "out", "needs"]

    def _format_device_cells(self) -> list[list[str]]:
        return [
            [
                d.device,
                d.label,
                f"{d.weight:,.4g}",
                *([f"{d.rows_per_second:,.0f}"] if self._has_measured_speeds else []),
                f"{d.share:.1%}",
                f"{d.n_rows:,}",
                f"{d.n_chunks:,}",
                f"{self.batch_size:,}",
                format_nbytes(d.input_nbytes),
                format_nbytes(d.output_nbytes),
                format_nbytes(d.peak_nbytes),
            ]
            for d in self.devices
        ]

    def _format_total_cells(self) -> list[str]:
        nbytes = [format_nbytes(self.input_nbytes), format_nbytes(self.output_nbytes)]
        speed = [""] if self._has_measured_speeds else []
        return ["total", "", "", *speed, "", f"{self.n_rows:,}", f"{self.n_chunks:,}", "", *nbytes, ""]


_TIME_CAVEAT = "at the measured throughput, once workers run; longer if storage or other programs slow it down"


def find_memory_problems(
    devices: Sequence[DevicePlan], layout: ChunkLayout, limits: Sequence[int], *, row_nbytes: int, model_nbytes: int
) -> list[str]:
    """Return a sentence for each device on which a plan does not fit, the one that lacks most memory first.

    Parameters
    ----------
    devices, layout
        A layout, and what ``make_device_plans`` returned for it.
    limits
        Free bytes of each device; 0 means unknown, and is never refused.
    row_nbytes
        Bytes of one row of all inputs and outputs.
    model_nbytes
        Bytes of the model on a device.

    Returns
    -------
    list of str
        One entry per device whose largest chunk does not fit; empty if all fit.

    Examples
    --------
    >>> from daskinfer.scheduling.chunking import make_chunks
    >>> layout = make_chunks(1000, [1.0], batch_size=250)
    >>> plan = make_device_plans(
    ...     layout, names=["cuda:0"], labels=[""], weights=[1.0], row_in_nbytes=1000, row_out_nbytes=24, model_nbytes=0
    ... )
    >>> problem = find_memory_problems(plan, layout, [200 << 10], row_nbytes=1024, model_nbytes=0)[0]
    >>> problem.removesuffix(" Use batch_size=200 or less (--batch-size).")
    'chunk 0 (rows 0:250) needs 250.0 KiB on cuda:0 at batch_size=250; 200.0 KiB is free.'
    """
    problems = []
    for device, limit, chunk in zip(devices, limits, layout.largest_chunks(len(devices)), strict=True):
        if chunk and 0 < limit < device.peak_nbytes:
            sentence = (
                f"chunk {chunk.index} (rows {chunk.start}:{chunk.stop}) needs {format_nbytes(device.peak_nbytes)} "
                f"on {device.device} at batch_size={layout.batch_size}; {format_nbytes(limit)} is free. "
                f"{_suggest_fix(layout, device.device, limit - model_nbytes, row_nbytes)}"
            )
            problems.append((device.peak_nbytes - limit, sentence))
    return [sentence for _, sentence in sorted(problems, key=lambda problem: -problem[0])]


def _suggest_fix(layout: ChunkLayout, device: str, nbytes: int, row_nbytes: int) -> str:
    rows = nbytes // max(1, row_nbytes)
    if rows < 1:
        return f"Not even one row fits beside the model: leave {device} out, or use a device with more memory."
    if rows >= layout.cell_rows:
        return f"Rechunk the input to chunks of {rows} rows or fewer."
    if layout.cell_rows > layout.batch_size:
        return f"Use an output whose write-units (chunks or shards) hold {rows} rows or fewer."
    return f"Use batch_size={rows} or less (--batch-size)."
