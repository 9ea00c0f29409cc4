"""Targets that are ratios to peers: full works warm, large outputs, small works and clusters cold."""

from __future__ import annotations

from collections.abc import Callable

from tests.benchmarks.judging import Verdict, Verdicts, at_least, at_most, failed, skipped
from tests.benchmarks.processes import Failed, Unavailable
from tests.benchmarks.session import OTHER_TOOLS, REFERENCE, Race, Session

WARM_REPEATS = 5  # calls after the first, of which the median counts
TOOL_STARTS = 3  # of the tools that are far slower; their figure need not be as fine
FASTER_THAN_TOOLS = 3.0

OURS, OURS_AUTO, OURS_BARE = "daskinfer", "daskinfer, devices auto", "daskinfer, no dashboard"
ONE_THREAD, ALL_THREADS = REFERENCE, "plain loop, all threads"
BY_HAND, BY_HAND_TUNED = "two processes by hand", "two processes by hand, allocator tuned"
ONE_BY_ONE = "one example at a time"

# work -> what daskinfer's time may be of each peer's
_BOUNDS = {
    "cnn": {BY_HAND: 0.95, BY_HAND_TUNED: 1.15, ONE_THREAD: 1.0},
    "mlp": {BY_HAND: 1.2, BY_HAND_TUNED: 1.5, ONE_THREAD: 1.0},
}


def warm(session: Session) -> Verdicts:
    """Both full works with two workers, beside everybody."""
    many = (ONE_THREAD, ALL_THREADS, BY_HAND, BY_HAND_TUNED, OURS, OURS_AUTO)
    few = (*OTHER_TOOLS, ONE_BY_ONE)
    rounds = dict.fromkeys(many, session.starts) | dict.fromkeys(few, min(session.starts, TOOL_STARTS))
    for work, bounds in _BOUNDS.items():
        race = _race(session, work, rounds)
        for peer, bound in bounds.items():
            yield _ratio(f"{work}, warm: daskinfer / {peer}", race, OURS, peer, bound)
        yield from _beside_tools(work, race)


def _race(session: Session, work: str, rounds: dict[str, int]) -> Race:
    """The race of one full work, run once per session: the first target that needs it says who takes part."""
    races: dict[str, Race] = session.raw.setdefault("races", {})
    if work not in races:
        races[work] = Race(session, work, repeats=WARM_REPEATS).run(rounds)
    return races[work]


def _beside_tools(work: str, race: Race) -> Verdicts:
    yield from (
        skipped(f"{work}, warm: {peer}", str(race.lost[peer]))
        if isinstance(race.lost[peer], Unavailable)
        else failed(f"{work}, warm: {peer}", str(race.lost[peer]))
        for peer in OTHER_TOOLS
        if peer in race.lost
    )
    there = [peer for peer in OTHER_TOOLS if peer not in race.lost]
    target = f"{work}, warm: best of other tools / daskinfer"
    if there:
        best = min(there, key=race.seconds)
        yield _judged(
            f"{target} ({best})",
            lambda name: at_least(name, race.seconds(best) / race.seconds(OURS), FASTER_THAN_TOOLS),
        )


def auto_warm(session: Session) -> Verdicts:
    """Both full works as the user who says nothing gets them."""
    rounds = dict.fromkeys((ONE_THREAD, ALL_THREADS, OURS_AUTO), session.starts)
    for work in _BOUNDS:
        race = _race(session, work, rounds)
        best = min((p for p in (ONE_THREAD, ALL_THREADS) if p not in race.lost), key=race.seconds, default=ONE_THREAD)
        yield _ratio(f"{work}, warm, devices auto: daskinfer / {best}", race, OURS_AUTO, best, 1.1)


def auto_cold(session: Session) -> Verdicts:
    """Small works in a fresh process: the first call."""
    for work in ("few images", "few rows"):
        race = Race(session, work, repeats=0).run(dict.fromkeys((ALL_THREADS, OURS_AUTO), session.starts))
        session.raw.setdefault("races", {})[work] = race
        yield _ratio(f"{work}, cold, devices auto: daskinfer / {ALL_THREADS}", race, OURS_AUTO, ALL_THREADS, 1.1, "first")


def large(session: Session) -> Verdicts:
    """Answers as large as the input."""
    race = Race(session, "large", repeats=3).run(dict.fromkeys((BY_HAND, BY_HAND_TUNED, OURS), session.starts))
    session.raw.setdefault("races", {})["large"] = race
    yield _ratio(f"large outputs, second call on: daskinfer / {BY_HAND}", race, OURS, BY_HAND, 1.3)


def cold(session: Session) -> Verdicts:
    """The first call with the start of the workers, and the second without."""
    for work in _BOUNDS:
        race = Race(session, work, repeats=3).run(dict.fromkeys((BY_HAND, OURS_BARE), session.starts))
        session.raw.setdefault("races", {})[f"{work}, cold"] = race
        yield _ratio(f"{work}, cold with start: daskinfer / {BY_HAND}", race, OURS_BARE, BY_HAND, 1.5, "cold")
        yield _judged(
            f"{work}, second call / later calls",
            lambda name, race=race: at_most(
                name, race.seconds(OURS_BARE, "second") / race.seconds(OURS_BARE), 1.25
            ),  # 1.25: no start of workers hides in that
        )


def _ratio(target: str, race: Race, ours: str, theirs: str, bound: float, what: str = "warm") -> Verdict:
    return _judged(target, lambda name: at_most(name, race.seconds(ours, what) / race.seconds(theirs, what), bound))


def _judged(target: str, judge: Callable[[str], Verdict]) -> Verdict:
    try:
        return judge(target)
    except Unavailable as error:
        return skipped(target, str(error))
    except Failed as error:
        return failed(target, str(error))
