"""A plan as people and programs read it: what each device would do, in how many bytes, and what cannot fit.

Made from a ``planner.ChunkLayout``; decides nothing about the rows.
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

    ``share`` is a fraction of all rows. ``peak_nbytes`` is the network and its largest chunk, input and output, the
    last micro-batch padded to the full shape; what passes between layers is not in it. It is 0 without a chunk.
    ``rows_per_second`` is the device's speed where it was measured, else 0.
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
    """Sum a layout up per device.

    Parameters
    ----------
    layout
        Which rows form which chunk.
    names, labels, weights
        Of each device, in the order that ``layout``'s chunks count them in.
    row_in_nbytes, row_out_nbytes
        Bytes of one row of all inputs, and of all outputs.
    model_nbytes
        Bytes of the network on a device.
    speeds
        Rows/s of each device; 0 where that is unknown, nothing where all are.

    Returns
    -------
    tuple of DevicePlan
        One per device, also for those without rows.

    Examples
    --------
    >>> from daskinfer.scheduling.chunking import lay_out
    >>> layout = lay_out(8, [1.0], batch_size=2)
    >>> one = make_device_plans(
    ...     layout, names=["cpu:0"], labels=["CPU"], weights=[1.0], row_in_nbytes=8, row_out_nbytes=4, model_nbytes=9
    ... )[0]
    >>> one.n_rows, one.n_chunks, one.input_nbytes, one.output_nbytes, one.peak_nbytes
    (8, 4, 64, 32, 33)
    """
    row_nbytes = row_in_nbytes + row_out_nbytes
    n_chunks = Counter(chunk.device_index for chunk in layout.chunks)
    n_rows_of = layout.rows_per_device(len(names))
    parts = zip(names, labels, weights, n_rows_of, layout.largest_chunks(len(names)), strict=True)
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
        for index, (name, label, weight, n_rows, largest) in enumerate(parts)
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """What would run where, in which chunks, with how many bytes; printed as a table, in notebooks as HTML.

    Parameters
    ----------
    devices
        One record per device, in the order of ``device_weights``.
    layout
        The chunks: rows ``start:stop`` each, and the position of their device.
    weights_assumed
        Whether the weights are a prior that no run has measured yet.
    model
        A short name of the network.
    inputs, outputs
        One line per port, like ``"x: (200000, 1, 8, 8) float32"``.
    notes
        Whatever else is worth knowing before it runs, a sentence each.
    balanced
        Whether devices get rows by their measured speed while it runs; else exactly the layout's chunks.

    Examples
    --------
    >>> from daskinfer.scheduling.chunking import lay_out
    >>> layout = lay_out(1000, [3.0, 1.0], batch_size=10)
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
    device  name  weight (assumed)  share   rows  chunks  micro-batch        in       out     needs
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
        """Expected seconds, workers there and loaded; None where not all devices that get rows were measured."""
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
        """Chunks on all devices together."""
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
        """The plan as plain strings, numbers, lists and dicts; a chunk is ``[start, stop, position of its device]``."""
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
            "chunks": [[chunk.start, chunk.stop, chunk.device_index] for chunk in self.layout.chunks],
            "seconds": self.seconds,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        table = format_text_table(self._get_column_names(), [*self._format_device_cells(), self._format_total_cells()])
        return "\n".join([*self._format_header_lines(), "", table, *(f"note: {note}" for note in self.notes)])

    __repr__ = __str__  # what a notebook without HTML and the interpreter's prompt show

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
        return ["device", "name", weight, *speed, "share", "rows", "chunks", "micro-batch", "in", "out", "needs"]

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


_TIME_CAVEAT = "by the speeds measured, once workers run; more where storage, or other work, holds them up"


def find_memory_problems(
    devices: Sequence[DevicePlan], layout: ChunkLayout, limits: Sequence[int], *, row_nbytes: int, model_nbytes: int
) -> list[str]:
    """Say which devices a plan cannot fit on, in sentences, worst offender first.

    Parameters
    ----------
    devices, layout
        As ``make_device_plans`` made the one of the other.
    limits
        Free bytes of each device; a limit of 0 is unknown and never refused.
    row_nbytes
        Bytes of one row of all inputs and outputs.
    model_nbytes
        Bytes of the network on a device.

    Returns
    -------
    list of str
        One entry per device whose largest chunk does not fit; empty when all fit.

    Examples
    --------
    >>> from daskinfer.scheduling.chunking import lay_out
    >>> layout = lay_out(1000, [1.0], batch_size=250)
    >>> plan = make_device_plans(
    ...     layout, names=["cuda:0"], labels=[""], weights=[1.0], row_in_nbytes=1000, row_out_nbytes=24, model_nbytes=0
    ... )
    >>> sentence = find_memory_problems(plan, layout, [200 << 10], row_nbytes=1024, model_nbytes=0)[0]
    >>> sentence.removesuffix(" Use batch_size=200 or less (--batch-size).")
    'chunk 0 (rows 0:250) needs 250.0 KiB on cuda:0 at batch_size=250; 200.0 KiB is free.'
    """
    found = []
    for device, limit, chunk in zip(devices, limits, layout.largest_chunks(len(devices)), strict=True):
        if chunk and 0 < limit < device.peak_nbytes:
            sentence = (
                f"chunk {chunk.index} (rows {chunk.start}:{chunk.stop}) needs {format_nbytes(device.peak_nbytes)} "
                f"on {device.device} at batch_size={layout.batch_size}; {format_nbytes(limit)} is free. "
                f"{_suggest_fix(layout, device.device, limit - model_nbytes, row_nbytes)}"
            )
            found.append((device.peak_nbytes - limit, sentence))
    return [sentence for _, sentence in sorted(found, key=lambda pair: -pair[0])]


def _suggest_fix(layout: ChunkLayout, device: str, nbytes: int, row_nbytes: int) -> str:
    rows = nbytes // max(1, row_nbytes)
    if rows < 1:
        return f"Not even one row fits beside the network: leave {device} out, or use one with more memory."
    if rows >= layout.cell_rows:
        return f"Cut the input into chunks of {rows} rows or less."
    if layout.cell_rows > layout.batch_size:
        return f"Use an output whose write-units (its chunks or shards) hold {rows} rows or less."
    return f"Use batch_size={rows} or less (--batch-size)."
