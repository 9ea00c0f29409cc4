"""Execution: from a job to its results.

This package owns a call while it runs (``run``). It chooses between this process and workers (``executor_choice``,
``executors``), prepares the workers (``worker_setup``), measures batch sizes (``tuning``), turns chunks into tasks
(``task_builder``, ``dask_inputs``), keeps a few tasks in flight per device (``window``, ``device_queue``), fetches their
results (``results``), passes these to a sink (``sinks``, ``result_buffers``), and drains the call at Ctrl-C
(``signals``). It acts, and ``scheduling`` decides: which chunk is next, what is retried, which batch size is best. It must
not know how a job is made from arguments, how a worker computes a chunk, or how outputs are stored: it gets an
``InferenceJob``, and passes on a ``ChunkResult`` for each chunk.

**Tasks are submitted through a bounded window per device**, not as one large graph whose tasks are restricted to devices.
A few chunks are in flight on each device at any time, and the next is submitted when one returns. One graph fails in five
ways:

- The scheduler holds back only tasks that look like root tasks, and restricted ones never do (``is_rootish`` is False): it
  sends all of them to the workers at once.
- Annotations of an array, which would carry the restrictions, are lost when Dask fuses blocks.
- A callable as the ``resources`` annotation crashes the fusion of blockwise layers.
- A restriction to a worker's name is turned into its address at submission, and a restarted worker has another one.
- If a worker dies, every chunk that waits for it is blamed. Of 40 chunks, 3 of which killed their worker, one graph lost 17
  innocent ones. The window, which retries each chunk of a dead worker in isolation, lost none.

The scheduler knows the tasks of the window only, so a million chunks cost the same per chunk as a thousand.

The window can serve every input whose chunks are independent: paths, memory-mapped files, arrays in memory, and dask
arrays with independent blocks. If the blocks of a dask array depend on each other, computing them one by one repeats their
upstream: ``x - x.mean(0)`` took 1,679 loads block by block, and 80 in one graph. The upstream of such an array is first
computed as one plain graph, and one DEBUG line says so (``dask_inputs``).
"""
