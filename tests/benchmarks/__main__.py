"""``python -m tests.benchmarks``: one line per target, and exit code 1 if any fails."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from tests.benchmarks import chunks, planning, quotas, races, storage, table, unlike
from tests.benchmarks.judging import Verdict, Verdicts, failed, skipped
from tests.benchmarks.processes import Failed, Unavailable
from tests.benchmarks.session import Race, Session

TARGETS: dict[str, Callable[[Session], Verdicts]] = {
    "warm": races.warm,
    "auto-warm": races.auto_warm,
    "auto-cold": races.auto_cold,
    "large": races.large,
    "cold": races.cold,
    "unlike": unlike.unlike,
    "slowing": unlike.slowing,
    "quotas": quotas.quotas,
    "storage": storage.storage,
    "chunks": chunks.chunks,
    "plan": planning.plan,
}
FULL_SCALE = 1.0


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", multiple=True, type=click.Choice(list(TARGETS)), help="Measure this target; may be repeated.")
@click.option("--starts", default=9, show_default=True, type=click.IntRange(1), help="Fresh starts of each peer.")
@click.option(
    "--scale", default=FULL_SCALE, show_default=True, type=click.FloatRange(0, min_open=True), help="Of the works."
)
@click.option("--peers-python", default=sys.executable, help="Interpreter that has Ray, Daft and Spark.")
@click.option("--folder", type=click.Path(exists=True, file_okay=False), help="Where the inputs are made; 16 GB at scale 1.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all raw figures there.")
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the table as a picture.")
@click.option(
    "--redraw", type=click.Path(exists=True, path_type=Path), help="Draw this picture again and end: it has its figures."
)
@click.option("--markdown", is_flag=True, help="Print the table for the guide on performance at the end.")
def main(
    only: Sequence[str],
    starts: int,
    scale: float,
    peers_python: str,
    folder: str | None,
    json_path: Path | None,
    plot_path: Path | None,
    redraw: Path | None,
    markdown: bool,
) -> None:
    """Measure daskinfer beside its peers, and judge each figure by its target."""
    if redraw:
        from tests.support.pictures import read_figures  # needs pillow, which comes with matplotlib

        table.plot(read_figures(redraw), redraw)
        return
    if plot_path:
        table.check_plotting()  # now, not at the end of an hour
    with tempfile.TemporaryDirectory(prefix="benchmarks-", dir=folder) as temporary:
        session = Session(Path(temporary), starts, scale, peers_python)
        verdicts: list[Verdict] = []
        try:
            verdicts.extend(_shown(session, [name for name in TARGETS if not only or name in only]))
        except KeyboardInterrupt:
            click.echo("interrupted; what was measured so far is kept", err=True)
    full = {work: race for work, race in session.raw.get("races", {}).items() if work in ("cnn", "mlp")}
    caption = table.caption(session.machine(), session.versions)
    if markdown:
        click.echo(f"\n{table.markdown(full, caption)}")
    if json_path:
        json_path.write_text(json.dumps(_everything(session, verdicts), default=Race.record, indent=1))
    if plot_path and full:
        table.plot(table.make_figures(full, caption), plot_path)
    sys.exit(any(verdict.passed is False for verdict in verdicts))


def _shown(session: Session, names: Iterable[str]) -> Verdicts:
    """Print each verdict as it is reached."""
    if session.scale != FULL_SCALE:
        click.echo(f"at {session.scale:g} of the works' size: for development, the targets are for 1")
    for name in names:
        for verdict in _caught(session, name):
            click.echo(str(verdict))
            yield verdict


def _caught(session: Session, name: str) -> Verdicts:
    """A target's verdicts; what goes wrong in one does not end the others."""
    try:
        yield from TARGETS[name](session)
    except Unavailable as error:
        yield skipped(name, str(error))
    except Failed as error:
        yield failed(name, str(error))


def _everything(session: Session, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    return {
        "machine": session.machine(),
        "versions": session.versions,
        "starts": session.starts,
        "scale": session.scale,
        "verdicts": [verdict.as_dict() for verdict in verdicts],
        "raw": session.raw,
    }


if __name__ == "__main__":
    main()
