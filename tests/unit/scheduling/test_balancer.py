"""Balancers in simulated time: no clock, no sleep, the same figures on every machine."""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daskinfer.core.chunks import Chunk
from daskinfer.core.row_ranges import merge_ranges
from daskinfer.scheduling.balancer import (
    MAX_CHUNKS_PER_TASK,
    MAX_TASK_SECONDS,
    MIN_TASK_SECONDS,
    DynamicBalancer,
    LoadBalancer,
    StaticBalancer,
)
from daskinfer.scheduling.chunking import CHUNK_NBYTES, ChunkLayout, assign_chunks, make_chunks
from tests.support.simulated_devices import (
    IDEAL,
    LATENCY,
    WINDOW,
    Devices,
    RecordingBalancer,
    Task,
    drain,
    drain_around,
    make_grid,
    measure_all,
)

UNEQUAL = [[1, 1], [1, 4], [4, 1], [1, 20], [20, 1], [8, 8, 1, 1]]


weights = st.lists(st.sampled_from([0.0, 1e-9, 0.3, 1.0, 1.0, 8.0, 1e9]), min_size=1, max_size=4).filter(any)


@given(
    n_rows=st.integers(0, 400),
    cell_rows=st.integers(1, 30),
    priors=weights,
    chunk_nbytes=st.sampled_from([1, 300, 1 << 20]),
    look_ahead=st.sampled_from([None, 1, 50]),
    data=st.data(),
)
def test_a_grid_is_assigned_in_order_and_once(
    n_rows: int, cell_rows: int, priors: list[float], chunk_nbytes: int, look_ahead: int | None, data: st.DataObject
) -> None:
    """However tasks end, every row is assigned once, in order, in whole cells, within the bytes, to devices with a prior."""
    balancer = RecordingBalancer(
        DynamicBalancer.from_grid(n_rows, cell_rows, priors, row_nbytes=10, chunk_nbytes=chunk_nbytes)
    )
    drain(balancer, len(priors), data, look_ahead)
    assert [row for c in balancer.chunks for row in range(c.start, c.stop)] == list(range(n_rows))
    assert [c.index for c in balancer.chunks] == list(range(len(balancer.chunks)))
    assert all(len(task) == 1 for task in balancer.tasks)
    assert all(c.n_rows and c.start % cell_rows == 0 for c in balancer.chunks)
    assert all(c.n_rows <= cell_rows or c.n_rows * 10 <= chunk_nbytes for c in balancer.chunks)
    assert all(priors[device] for _, device in balancer.assigned)


@given(
    row_chunks=st.lists(st.integers(0, 20), max_size=60),
    priors=weights,
    chunk_nbytes=st.sampled_from([1, 300, 1 << 20]),
    look_ahead=st.sampled_from([None, 1, 50]),
    data=st.data(),
)
def test_given_chunks_are_assigned_in_order_and_once(
    row_chunks: list[int], priors: list[float], chunk_nbytes: int, look_ahead: int | None, data: st.DataObject
) -> None:
    """However tasks end, every chunk is assigned once, whole, in order, within the bytes and the chunks of a task."""
    balancer = RecordingBalancer(DynamicBalancer.from_chunks(row_chunks, priors, row_nbytes=10, chunk_nbytes=chunk_nbytes))
    drain(balancer, len(priors), data, look_ahead)
    assert [c.n_rows for c in balancer.chunks] == row_chunks
    assert [c.index for c in balancer.chunks] == list(range(len(row_chunks)))
    assert [c.start for c in balancer.chunks] == [sum(row_chunks[:i]) for i in range(len(row_chunks))]
    with_rows = [[c for c in task if c.n_rows] for task in balancer.tasks]
    assert all(len(task) <= 1 or sum(c.n_rows for c in task) * 10 <= chunk_nbytes for task in with_rows)
    assert all(len(task) <= MAX_CHUNKS_PER_TASK for task in with_rows)
    assert all(priors[device] for _, device in balancer.assigned)


@given(
    row_chunks=st.lists(st.integers(0, 20), max_size=60),
    weights=weights,
    look_ahead=st.sampled_from([None, 1, 50]),
    row_nbytes=st.sampled_from([0, 10, CHUNK_NBYTES // 30]),
    data=st.data(),
)
def test_a_plan_is_assigned_as_it_is(
    row_chunks: list[int], weights: list[float], look_ahead: int | None, row_nbytes: int, data: st.DataObject
) -> None:
    """However tasks end, each device gets exactly the layout's chunks for it, in row order, within the bytes of a task."""
    layout = assign_chunks(row_chunks, weights, batch_size=1)
    balancer = RecordingBalancer(StaticBalancer(layout, row_nbytes, n_devices=len(weights)))
    drain(balancer, len(weights), data, look_ahead)
    for device in range(len(weights)):
        own = [c for c, d in zip(layout.chunks, layout.devices, strict=True) if d == device]
        assert [c for c, d in balancer.assigned if d == device] == own
    with_rows = [[c for c in task if c.n_rows] for task in balancer.tasks]
    assert all(len(task) <= 1 or sum(c.n_rows for c in task) * row_nbytes <= CHUNK_NBYTES for task in with_rows)


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("speeds", UNEQUAL, ids=str)
def test_unequal_devices_finish_together(speeds: list[int], noise: float) -> None:
    """Devices of unequal, unknown speed take at most 4 % longer than rows / sum of speeds."""
    for seed in range(20 if noise else 1):
        devices = Devices([1e4 * s for s in speeds], noise=noise, seed=seed)
        assert devices.run(make_grid(devices.speeds)) <= 1.04 * devices.ideal()
        assert math.isclose(devices.ideal(), IDEAL, rel_tol=1e-9 if not noise else 0.1)


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("speeds", UNEQUAL, ids=str)
def test_a_device_that_slows_down_gets_less(speeds: list[int], noise: float) -> None:
    """If any device becomes 4 times slower midway, the job takes at most 8 % longer than the piecewise ideal."""
    for slow, seed in [(slow, seed) for slow in range(len(speeds)) for seed in range(10 if noise else 1)]:
        devices = Devices([1e4 * s for s in speeds], slow=(slow, IDEAL / 2, 4.0), noise=noise, seed=seed)
        assert devices.run(make_grid(devices.speeds)) <= 1.08 * devices.ideal()


@pytest.mark.parametrize("speeds", UNEQUAL, ids=str)
def test_tiny_cells_cost_no_more(speeds: list[int]) -> None:
    """If a cell takes a millisecond at most, tasks grow, and the job takes at most 4 % longer than the ideal."""
    devices = Devices([1e4 * s for s in speeds])
    balancer = RecordingBalancer(make_grid(devices.speeds, cell_seconds=1e-3))
    assert devices.run(balancer) <= 1.04 * IDEAL
    assert len(balancer.tasks) < 400


@pytest.mark.parametrize("cell_seconds", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("speeds", UNEQUAL, ids=str)
def test_a_slow_device_is_last_by_no_more_than_a_cell(speeds: list[int], cell_seconds: float) -> None:
    """If cells take the slowest device seconds, the job ends within one cell's time of the ideal."""
    devices = Devices([100.0 * s for s in speeds])
    assert devices.run(make_grid(devices.speeds, cell_seconds)) <= 1.01 * IDEAL + cell_seconds


def test_a_slow_device_gets_only_its_probe_in_a_short_job() -> None:
    """A device 20 times slower that needs longer for its first cell than the other for all rows gets only that cell."""
    balancer = RecordingBalancer(make_grid([100.0, 2000.0], cell_seconds=5.0, seconds=2.0))
    assert Devices([100.0, 2000.0]).run(balancer) == pytest.approx(5.0 + LATENCY)
    assert [c.n_rows for c, device in balancer.assigned if device == 0] == [500]


def test_the_first_task_may_load_the_model() -> None:
    """Three seconds of loading in each device's first task do not count for its speed once a second task has ended."""
    balancer = DynamicBalancer.from_grid(1000, 10, [1.0])
    for seconds in (3.0, 0.1):
        task = balancer.next_task(0)
        balancer.record(0, task, seconds)
    assert balancer.speeds == (task[0].n_rows / 0.1,)
    devices = Devices([1e4, 4e4], load_seconds=3.0)
    assert devices.run(make_grid(devices.speeds)) <= 1.02 * IDEAL + 3.0


def test_given_chunks_are_balanced_too() -> None:
    """Irregular chunks are balanced among unequal devices as well as a grid."""
    rng, devices = random.Random(0), Devices([1e4, 2e5])
    row_chunks: list[int] = []
    while sum(row_chunks) < 20 * 2.1e5:
        row_chunks.append(rng.randrange(100, 2000))
    assert devices.run(DynamicBalancer.from_chunks(row_chunks, [1.0, 1.0])) <= 1.04 * devices.ideal()


def test_a_plan_of_tiny_chunks_makes_few_tasks() -> None:
    """Fifty thousand chunks of a tenth of a millisecond are assigned in tasks of up to 64."""
    layout = make_chunks(500_000, [3.0, 1.0], batch_size=10, row_nbytes=1, chunk_nbytes=10)
    balancer = RecordingBalancer(StaticBalancer(layout, 1, n_devices=2))
    Devices([3e5, 1e5]).run(balancer)
    assert layout.rows_per_device(2) == tuple(sum(c.n_rows for c, own in balancer.assigned if own == d) for d in (0, 1))
    assert len(balancer.tasks) < 50_000 / MAX_CHUNKS_PER_TASK + 40


def make_dynamic(row_chunks: list[int]) -> LoadBalancer:
    """Make a balancer by speed of these chunks for two devices."""
    return DynamicBalancer.from_chunks(row_chunks, [1.0, 1.0])


def make_static(row_chunks: list[int]) -> LoadBalancer:
    """Make a balancer by plan of these chunks for two devices."""
    return StaticBalancer(assign_chunks(row_chunks, [1.0, 1.0], batch_size=1), 1, n_devices=2)


@pytest.mark.parametrize("make", [make_dynamic, make_static])
def test_a_chunk_costs_the_same_among_many(
    make: Callable[[list[int]], LoadBalancer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of looks at a chunk does not grow with the number of chunks."""
    n_reads = Counter[str]()
    read_n_rows = Chunk.n_rows.fget  # type: ignore[attr-defined]  # a property

    def count_reads(chunk: Chunk) -> int:
        n_reads["n_rows"] += 1
        return read_n_rows(chunk)  # type: ignore[no-any-return]

    monkeypatch.setattr(Chunk, "n_rows", property(count_reads))
    costs = []
    for n_chunks in (1000, 50_000):
        balancer = make([10] * n_chunks)
        n_reads.clear()
        Devices([1e5, 1e5]).run(balancer)
        costs.append(n_reads["n_rows"] / n_chunks)
    assert costs[1] <= 1.01 * costs[0] <= 10


def test_tasks_of_a_plan_double_while_they_are_short_and_halve_when_long() -> None:
    """A device's tasks double from 1 to 64 chunks while short, then stay, and halve if long; the other device's do not."""
    balancer = StaticBalancer(make_chunks(4000, [1.0, 1.0], batch_size=1, row_nbytes=1, chunk_nbytes=1), 1, n_devices=2)
    sizes = []
    for seconds in [MIN_TASK_SECONDS / 2] * 8 + [MIN_TASK_SECONDS * 2] + [MAX_TASK_SECONDS * 2] * 2 + [0.1]:
        task = balancer.next_task(0)
        sizes.append(len(task))
        balancer.record(0, task, seconds)
    assert sizes == [1, 2, 4, 8, 16, 32, 64, 64, 64, 64, 32, 16]
    assert len(balancer.next_task(1)) == 1


def test_tasks_of_a_plan_double_once_for_a_whole_window() -> None:
    """Three short tasks of one size that were in flight together double the next one only once."""
    balancer = StaticBalancer(make_chunks(100, [1.0], batch_size=1, row_nbytes=1, chunk_nbytes=1), 1, n_devices=1)
    for task in [balancer.next_task(0) for _ in range(WINDOW)]:
        balancer.record(0, task, 0.001)
    assert len(balancer.next_task(0)) == 2


def test_a_plan_assigns_nothing_beyond_the_row_limit() -> None:
    """No chunk starts at the limit or later, and a device whose next chunk does gets no task."""
    balancer = StaticBalancer(
        ChunkLayout(40, 10, 10, tuple(Chunk(i, 10 * i, 10 * i + 10) for i in range(4)), (0, 0, 0, 1)), 1, n_devices=2
    )
    balancer.record(0, balancer.next_task(0, row_limit=1), 0.001)
    assert (balancer.next_task(0, row_limit=10), balancer.next_task(1, row_limit=30)) == ((), ())
    assert [c.index for c in balancer.next_task(0, row_limit=11)] == [1]
    assert [c.index for c in balancer.next_task(1, row_limit=31)] == [3]
    assert balancer.n_rows_left == 10


def test_a_device_without_chunks_gets_none() -> None:
    """A device of weight 0 gets no task and no speed, from either balancer."""
    for balancer in (
        StaticBalancer(make_chunks(9, [1.0, 0.0], batch_size=1), 0, n_devices=2),
        DynamicBalancer.from_grid(9, 1, [1.0, 0.0]),
    ):
        assert balancer.next_task(1) == ()
        Devices([10.0, 10.0]).run(balancer)
        assert (balancer.n_rows_left, balancer.speeds[1]) == (0, None)
        assert balancer.speeds[0] == pytest.approx(10.0, rel=0.1)


def test_chunks_without_rows_join_a_task() -> None:
    """A chunk without rows joins the chunk before it, or the first one, despite the limits; alone it is a task."""
    balancer = DynamicBalancer.from_chunks((0, 0, 7, 0, 5, 0), [1.0])
    assert [c.index for c in balancer.next_task(0, row_limit=7)] == [0, 1, 2, 3]
    assert balancer.next_task(0, row_limit=7) == ()
    assert balancer.n_rows_left == 5
    empty = DynamicBalancer.from_chunks((0, 0), [1.0])
    task = empty.next_task(0)
    empty.record(0, task, 0.1)
    assert ([c.index for c in task], empty.n_rows_left, empty.speeds) == ([0, 1], 0, (None,))


@pytest.mark.parametrize(("n_cells", "n_probes"), [(1, 1), (190, 2), (200, 3), (10_000, 3)])
def test_further_probes_are_for_large_jobs(n_cells: int, n_probes: int) -> None:
    """An unmeasured device gets a second and third probe only if they are a small part of its even share."""
    balancer = DynamicBalancer.from_grid(10 * n_cells, 10, [1.0, 1.0])
    tasks = [balancer.next_task(0) for _ in range(WINDOW)]
    assert [sum(c.n_rows for c in task) for task in tasks] == [10] * n_probes + [0] * (WINDOW - n_probes)


def test_priors_count_until_speeds_are_known() -> None:
    """The last cell goes to the device with the higher prior, or, once speeds are measured, to the faster one."""
    balancer = DynamicBalancer.from_grid(10, 10, [8.0, 1.0])
    assert balancer.next_task(1) == ()
    assert len(balancer.next_task(0)) == 1
    balancer = DynamicBalancer.from_grid(30, 10, [2.0, 1.0])
    measure_all(balancer, [100.0, 1000.0])
    assert balancer.next_task(0) == ()
    assert len(balancer.next_task(1)) == 1


def test_priors_are_scaled_to_measured_speeds() -> None:
    """The speed of an unmeasured device is estimated from the measured ones, in proportion to the priors."""
    balancer = DynamicBalancer.from_grid(85, 10, [1.0, 8.0])
    task = balancer.next_task(0)
    balancer.record(
        0, task, 1.0
    )  # 10 rows/s, so 80 are assumed of the other, and the remaining 75 take it less than a second
    assert (len(task), balancer.next_task(0)) == (1, ())
    assert len(balancer.next_task(1)) == 1


def test_a_device_that_is_busy_for_long_takes_no_more() -> None:
    """A device busy with its own tasks does not count for the remaining rows, so a slow device does not wait for it."""
    balancer = DynamicBalancer.from_grid(180, 10, [1.0, 1.0, 1.0])
    measure_all(balancer, [1000.0, 10.0, 100.0])
    long_tasks = [balancer.next_task(0) for _ in range(WINDOW)]
    balancer.record(0, long_tasks[0], 40.0)
    assert balancer.n_rows_left == 90
    assert balancer.next_task(1) == ()  # a second for a cell, and 0.9 s for all of them on the third device
    assert len(balancer.next_task(2)) == 1


@pytest.mark.parametrize("speeds", UNEQUAL, ids=str)
def test_tasks_shrink_towards_the_end(speeds: list[int]) -> None:
    """The last task of every device is short, but long compared with its overhead; the very last one is the rest."""
    balancer = RecordingBalancer(make_grid([1e4 * s for s in speeds], cell_seconds=1e-3))
    Devices([1e4 * s for s in speeds]).run(balancer)
    last = {device: c.n_rows / (1e4 * speeds[device]) for c, device in balancer.assigned[:-1]}
    assert all(0.8 * MIN_TASK_SECONDS < seconds < 2 * MIN_TASK_SECONDS for seconds in last.values())


def test_a_task_is_no_longer_than_half_a_second() -> None:
    """Even if many rows remain, a measured device gets at most half a second of rows, and tasks at most double."""
    balancer = DynamicBalancer.from_grid(10**9, 1, [1.0])
    sizes = []
    for _ in range(20):
        task = balancer.next_task(0)
        sizes.append(task[0].n_rows)
        balancer.record(0, task, sizes[-1] / 1e4)
    assert sizes == [pytest.approx(min(2**i, 5000), abs=1) for i in range(20)]


def test_speeds_follow_a_slowdown_and_not_one_odd_task() -> None:
    """One task three times as long reduces a speed by less than half; four that are 4 times as long, to nearly a quarter."""
    balancer, speeds = DynamicBalancer.from_grid(10**6, 100, [1.0]), []
    for times in [1.0] * 8 + [3.0] + [1.0] * 8 + [4.0] * 4:
        task = balancer.next_task(0)
        balancer.record(0, task, task[0].n_rows / 1000 * times)
        speeds.append(balancer.speeds[0] or 0.0)
    assert speeds[7] == pytest.approx(1000)
    assert 500 < speeds[8] < 800
    assert speeds[16] > 900
    assert 250 < speeds[-1] < 400


def test_a_task_that_took_no_time() -> None:
    """A task of 0 s makes a device very fast, but not infinitely, and the next task corrects it."""
    balancer = DynamicBalancer.from_grid(10_000, 10, [1.0, 1.0])
    for seconds in (0.1, 0.0, 0.1):
        balancer.record(0, balancer.next_task(0), seconds)
    assert math.isfinite(balancer.speeds[0] or math.inf)
    assert balancer.speeds[0] == pytest.approx(400, rel=0.5)


def test_tasks_of_a_lost_device_run_elsewhere() -> None:
    """Rows that a lost fast device would get are assigned to it, and count for the device that runs them."""
    balancer = DynamicBalancer.from_grid(40, 10, [1.0, 1.0])
    measure_all(balancer, [1000.0, 10.0])
    while balancer.n_rows_left:
        assert balancer.next_task(1) == ()
        task = balancer.next_task(0)
        assert len(task) == 1
        balancer.record(1, task, task[0].n_rows / 10.0)
    assert balancer.speeds == pytest.approx((1000.0, 10.0))


def test_tasks_that_ended_elsewhere_are_no_longer_in_flight() -> None:
    """A device whose tasks ran on another one has nothing in flight, and gets its share again."""
    balancer = DynamicBalancer.from_grid(90, 10, [1.0, 1.0])
    measure_all(balancer, [100.0, 100.0])
    for task in [balancer.next_task(0) for _ in range(WINDOW)]:
        balancer.record(1, task, task[0].n_rows / 100.0)
    assert balancer.n_rows_left == 40
    while balancer.n_rows_left:
        assert balancer.next_task(0)
        assert balancer.next_task(1)


def test_only_chunks_in_flight_have_an_assigned_device() -> None:
    """A balancer knows the device of each chunk in flight, until the chunk ends, on whatever device, or is given up."""
    balancer = DynamicBalancer.from_chunks((10, 0, 10, 10, 0), [1.0, 1.0])
    tasks = [balancer.next_task(0), balancer.next_task(1)]
    assert [[c.index for c in task] for task in tasks] == [[0, 1], [2]]
    assert balancer._assigned_devices == {0: 0, 2: 1}
    balancer.record(1, tasks[0], 0.1)
    balancer.discard(tasks[1][0])
    assert (balancer._assigned_devices, balancer._in_flight_rows) == ({}, [0, 0])


def test_the_mean_over_noise_is_close() -> None:
    """Over many noisy runs the mean loss is under 2 %, so the bounds above do not hold by chance."""
    losses = []
    for seed in range(40):
        devices = Devices([8e4, 8e4, 1e4, 1e4], noise=0.1, seed=seed)
        losses.append(devices.run(make_grid(devices.speeds)) / devices.ideal())
    assert statistics.mean(losses) < 1.02


def test_a_device_that_joins_gets_rows() -> None:
    """A device with a prior of 0 gets nothing until its prior changes; then it gets its probe and its share."""
    balancer = DynamicBalancer.from_grid(10_000, 10, [1.0, 0.0])
    assert (len(balancer.next_task(0)), balancer.next_task(1)) == (1, ())
    balancer.set_weight(1, 1.0)
    probe = balancer.next_task(1)
    balancer.record(1, probe, 0.01)
    assert (probe[0].n_rows, balancer.speeds) == (10, (None, 1000.0))
    assert balancer.next_task(1)[0].n_rows == 20


def test_a_device_that_leaves_gets_no_more() -> None:
    """A device that left gets nothing more, the others get its rows, and what it had in flight still counts."""
    balancer = RecordingBalancer(inner := DynamicBalancer.from_grid(10_000, 10, [1.0, 1.0]))
    measure_all(balancer, [1000.0, 1000.0])
    last = balancer.next_task(0)
    inner.set_weight(0, 0.0)
    assert (len(last), balancer.next_task(0)) == (1, ())
    balancer.record(0, last, 0.02)
    Devices([1e3, 1e3]).run(balancer)
    assert [row for c in balancer.chunks for row in range(c.start, c.stop)] == list(range(10_000))
    assert sum(c.n_rows for c, device in balancer.assigned if device == 0) == 10 + last[0].n_rows
    assert balancer.speeds[0] == pytest.approx(1000, rel=0.1)


def test_a_device_that_left_is_not_waited_for() -> None:
    """A slow device gets the last cell if the fast one that would have finished it sooner has left."""
    balancer = DynamicBalancer.from_grid(30, 10, [1.0, 1.0])
    measure_all(balancer, [1000.0, 10.0])
    assert balancer.next_task(1) == ()
    balancer.set_weight(0, 0.0)
    assert len(balancer.next_task(1)) == 1


def test_a_device_that_comes_back_is_as_fast_as_it_was() -> None:
    """The measured speed of a device is still known when it joins again."""
    balancer = DynamicBalancer.from_grid(10_000, 10, [1.0, 1.0])
    measure_all(balancer, [1000.0, 10.0])
    for prior in (0.0, 1.0):
        balancer.set_weight(0, prior)
    assert balancer.speeds[0] == pytest.approx(1000)
    assert balancer.next_task(0)[0].n_rows == 20


@given(priors=st.lists(st.sampled_from([0.0, 1.0, 8.0]), min_size=3, max_size=3).filter(any), data=st.data())
def test_devices_that_come_and_go(priors: list[float], data: st.DataObject) -> None:
    """Whichever devices join and leave, every row is assigned once, in order, as long as one device remains."""
    balancer = DynamicBalancer.from_grid(200, 10, priors)
    rows: list[int] = []
    in_flight: list[tuple[int, Task]] = []
    while balancer.n_rows_left:
        device, prior = data.draw(st.integers(0, 2)), data.draw(st.sampled_from([0.0, 1.0, 8.0]))
        if any(p for d, p in enumerate(priors) if d != device) or prior:
            priors[device] = prior
            balancer.set_weight(device, prior)
        for other in range(3):
            if task := balancer.next_task(other):
                assert priors[other]
                in_flight.append((other, task))
                rows += range(task[0].start, task[-1].stop)
        assert in_flight  # a device is busy while rows remain
        balancer.record(*in_flight.pop(0), data.draw(st.sampled_from([1e-3, 0.1, 5.0])))
    assert rows == list(range(200))


def test_a_device_of_known_speed_needs_no_probe() -> None:
    """A device whose speed an earlier run measured gets its share at once, at most half a second of rows."""
    balancer = DynamicBalancer.from_grid(10**6, 10, [1.0, 1.0])
    balancer.seed_speed(0, 1000.0)
    assert balancer.speeds == (1000.0, None)
    assert [balancer.next_task(0)[0].n_rows for _ in range(WINDOW)] == [500] * WINDOW
    assert balancer.next_task(1)[0].n_rows == 10


def test_a_known_speed_scales_the_priors() -> None:
    """The speed of an unmeasured device is estimated from the known one, in proportion to the priors."""
    balancer = DynamicBalancer.from_grid(75, 10, [1.0, 8.0])
    balancer.seed_speed(0, 10.0)  # so 80 rows/s are assumed of the other, which needs less than a second for all
    assert balancer.next_task(0) == ()
    assert len(balancer.next_task(1)) == 1


def test_a_known_speed_that_is_outdated() -> None:
    """A few tasks correct the speed of a device that is 4 times slower now; one that needs 10 s for a row gets a row."""
    balancer = DynamicBalancer.from_grid(10**6, 1, [1.0])
    balancer.seed_speed(0, 1000.0)
    for _ in range(6):
        task = balancer.next_task(0)
        balancer.record(0, task, task[0].n_rows / 250)
    assert balancer.speeds[0] == pytest.approx(250, rel=0.2)
    slow = DynamicBalancer.from_grid(10, 1, [1.0])
    slow.seed_speed(0, 0.1)
    assert slow.next_task(0)[0].n_rows == 1


@pytest.mark.parametrize("speeds", UNEQUAL, ids=str)
def test_known_speeds_divide_a_short_job(speeds: list[int]) -> None:
    """If all speeds are known, unequal devices finish a job of one second together without a probe."""
    devices = Devices([1e4 * s for s in speeds])
    balancer = make_grid(devices.speeds, cell_seconds=1e-3, seconds=1.0)
    for device, speed in enumerate(devices.speeds):
        balancer.seed_speed(device, speed)
    assert devices.run(balancer) <= 1.1


@st.composite
def ranges(draw: st.DrawFn, n_rows: int, unit: int = 1) -> list[tuple[int, int]]:
    """Draw the row ranges that are done: whole units, in order, of ``n_rows`` rows."""
    units = sorted(draw(st.sets(st.integers(0, max(0, (n_rows - 1) // unit)))) if n_rows else ())
    return merge_ranges((i * unit, min(n_rows, (i + 1) * unit)) for i in units)


def list_rows(spans: Sequence[tuple[int, int]]) -> set[int]:
    """Return the rows of these ranges, one by one."""
    return {row for start, stop in spans for row in range(start, stop)}


def get_assigned_rows(balancer: RecordingBalancer) -> list[int]:
    """Return the rows that were assigned, one by one."""
    return [row for chunk in balancer.chunks for row in range(chunk.start, chunk.stop)]


@given(n_rows=st.integers(0, 200), cell_rows=st.integers(1, 20), priors=weights, data=st.data())
def test_a_grid_without_what_is_done(n_rows: int, cell_rows: int, priors: list[float], data: st.DataObject) -> None:
    """Every row that is not done is assigned once, in order, and no other row; no chunk spans a gap."""
    done = data.draw(ranges(n_rows, cell_rows))
    balancer = RecordingBalancer(DynamicBalancer.from_grid(n_rows, cell_rows, priors, done=done))
    drain_around(balancer, len(priors), data)
    assert get_assigned_rows(balancer) == sorted(set(range(n_rows)) - list_rows(done))
    assert [chunk.index for chunk in balancer.chunks] == list(range(len(balancer.chunks)))
    assert balancer.n_unassigned == 0


@given(row_chunks=st.lists(st.integers(0, 20), max_size=30), priors=weights, data=st.data())
def test_given_chunks_without_what_is_done(row_chunks: list[int], priors: list[float], data: st.DataObject) -> None:
    """A chunk that is done is not assigned; one that is done in part is assigned whole, and keeps its number."""
    done = data.draw(ranges(sum(row_chunks)))
    balancer = RecordingBalancer(DynamicBalancer.from_chunks(row_chunks, priors, done=done))
    drain_around(balancer, len(priors), data)
    starts = [sum(row_chunks[:i]) for i in range(len(row_chunks))]
    remaining = [i for i, n in enumerate(row_chunks) if not n or not set(range(starts[i], starts[i] + n)) <= list_rows(done)]
    assert [(c.index, c.start, c.n_rows) for c in balancer.chunks] == [(i, starts[i], row_chunks[i]) for i in remaining]
    assert balancer.n_unassigned == 0


@given(row_chunks=st.lists(st.integers(0, 20), max_size=30), weights=weights, whole=st.booleans(), data=st.data())
def test_a_plan_without_what_is_done(row_chunks: list[int], weights: list[float], whole: bool, data: st.DataObject) -> None:
    """A device gets the rest of its own chunks, each in pieces around what is done, or whole if ``whole_chunks``."""
    layout = assign_chunks(row_chunks, weights, batch_size=1)
    done = data.draw(ranges(sum(row_chunks)))
    balancer = RecordingBalancer(StaticBalancer(layout, 0, n_devices=len(weights), done=done, whole_chunks=whole))
    n_left = balancer.n_rows_left
    drain_around(balancer, len(weights), data)
    expected = []
    for chunk, device in zip(layout.chunks, layout.devices, strict=True):
        rows = [row for row in range(chunk.start, chunk.stop) if row not in list_rows(done)]
        expected += [(chunk.index, device, row) for row in (range(chunk.start, chunk.stop) if whole and rows else rows)]
    actual = [(chunk.index, device, row) for chunk, device in balancer.assigned for row in range(chunk.start, chunk.stop)]
    assert sorted(actual) == sorted(expected)
    assert n_left == len(expected)
    assert balancer.n_unassigned == 0


@pytest.mark.parametrize("make", [lambda: make_grid([1000.0, 1000.0]), lambda: make_static([10] * 40)], ids=["grid", "plan"])
def test_a_chunk_that_is_given_up_is_no_longer_in_flight(make: Callable[[], LoadBalancer]) -> None:
    """A device is not busy with a chunk that was given up, and the chunk does not count for its speed."""
    balancer = make()
    for chunk in balancer.next_task(0):
        balancer.discard(chunk)
    assert balancer.speeds[0] is None
    assert balancer.next_task(0)


def test_rows_of_a_lost_device() -> None:
    """By speed, a lost device gets nothing more and the others get all rows; by plan, its chunks stay assigned to it."""
    balancer = make_grid([1000.0, 1000.0], seconds=1.0)
    balancer.remove_device(0)
    assert balancer.next_task(0) == ()
    rows = 0
    while task := balancer.next_task(1):
        rows += task[0].n_rows
        balancer.record(1, task, task[0].n_rows / 1000.0)
    assert rows == 2000
    plan = make_static([10] * 4)
    plan.remove_device(0)
    assert plan.next_task(0)
