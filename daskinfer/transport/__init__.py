"""How rows reach a worker, and how results come back.

This package owns the ways that bytes take between the client and one worker: the client's own memory, read in place
(``process_memory``), memory that both processes map (``shared_memory``), and the records that say where the rows of a task
are (``row_sources``), which are small enough to travel through Dask. It must not know what is computed with the rows: no
model, no device, no plan.

**In-memory arrays never pass through the scheduler.** ``dask.array.from_array`` on 0.5 GB took 3.9 s for work that takes
1.3 s without Dask. Slots of shared memory that are reused from chunk to chunk, filled by the client while workers compute,
brought that to 1.1 s; they are reused because fresh pages are the cost, 0.35 to 1.5 s per 0.5 GB. The memory in use is
bounded by the tasks in flight, not by the size of the input. A slot is used again only after its attempt has responded or
its process has ended, so that a late writer never overwrites the rows of another task.

What the first design did is now done better in two places. Inputs mostly skip the slots: a worker on the same host
reads them from the client's memory, micro-batch by micro-batch; with slots, a CNN over 0.49 GB took 1.3 times as long as by
hand. Results still use slots, because a late writer must not reach an array of the caller's. And the slots are in a
``memfd``, which has no name that could be left behind and does not count against ``/dev/shm`` (64 MiB in many containers).
Without ``memfd`` they are in a file whose space is allocated before it is mapped: on a full disk, mapping beyond the
end succeeds, and the first write kills the process with SIGBUS. The owner holds a lock on the file, and files without an
owner are removed by the next pool. ``multiprocessing.shared_memory`` is not used, since its resource tracker unlinks memory
that is still in use.

Workers on other hosts get large rows through Dask's comms and small ones inside the task.
"""
