"""The colours of everything that is drawn: one palette for devices, another for what they do, a third for what goes wrong.

A colour means one thing wherever it is seen, in ``RunReport.plot()``, in ``report.html`` and on the dashboard: a device has
a hue, a phase is a grey or a hatch, and a problem is red or orange. The devices' hues are told apart with any colour vision,
and all of them stand out on white (``tests/unit/diagnostics/test_palette.py`` computes both).
"""

from __future__ import annotations

from dataclasses import dataclass

DEVICE_COLORS = ("#0072b2", "#009e73", "#cc79a7", "#332288", "#882255", "#1a85ff", "#117733", "#999933")
OTHERS_COLOR = "#6b5344"  # of devices beyond those that are told apart

INK = "#333333"  # of lines, hatches and text


@dataclass(frozen=True, slots=True)
class Phase:
    """What a device does, or how rows stand: a grey, and lines over it ("/", "\\\\", "x", "." or none)."""

    label: str
    color: str
    hatch: str = ""

    @property
    def css(self) -> str:
        """Its look as the background of an HTML element."""
        lines = ", ".join(
            f"repeating-linear-gradient({angle}, {INK} 0 1px, transparent 1px 4px)" for angle in _ANGLES[self.hatch]
        )
        dots = f"radial-gradient({INK} 25%, transparent 30%) 0 0 / 5px 5px" if self.hatch == "." else ""
        return f"background: {', '.join(filter(None, [lines, dots, self.color]))}"


_ANGLES = {"": (), "/": ("-45deg",), "\\": ("45deg",), "x": ("-45deg", "45deg"), ".": ()}

READ = Phase("read", "#bdbdbd", "/")
LOAD = Phase("load the model", "#d4d4d4", "x")
FIRST_CALL = Phase("first call", "#a0a0a0", "\\")
COMPUTE = Phase("compute", "#595959")
WRITE = Phase("write", "#8a8a8a", ".")
IDLE = Phase("idle", "#f0f0f0")
PENDING = Phase("pending", "#e6e6e6")
DONE_EARLIER = Phase("done earlier", "#7a7a7a")
PHASES = (READ, LOAD, FIRST_CALL, COMPUTE, WRITE, IDLE, PENDING, DONE_EARLIER)

FAILED_COLOR, RETRYING_COLOR = "#c1121f", "#ff8c00"


def get_device_color(position: int) -> str:
    """Return the colour of a device by its position; they repeat once all are used."""
    return DEVICE_COLORS[position % len(DEVICE_COLORS)]
