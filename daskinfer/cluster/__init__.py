"""The processes that compute: clusters, their workers, and which of them a call uses.

This package starts and closes managed clusters (``local``, ``cuda``, ``nanny``, ``worker_spec``, ``shutdown``), reuses one
between calls (``process_cluster``), chooses the workers of a call (``placement``), checks, sets up and restarts them
(``preflight``, ``plugin``, ``restart``), and sends them the model (``broadcast``). It treats the cluster of a client that
the user passes as external: it changes nothing there that outlives the client. It must not know how a call is executed:
chunks, windows, retries and results belong to ``daskinfer.execution``, which registers what it keeps between calls with
``default_cluster.add_release_callback``.

**Tasks are placed by one Dask resource per device.** On a managed cluster, the resource is part of the options of each
nanny, so a restarted worker has it from the start: tasks that wait for a killed worker run 1.1 s later. A resource that a
plugin sets after the restart comes too late: ``add_resources`` does not wake waiting tasks, and they hang forever. External
workers lack the resource, so tasks are submitted by address to workers that are present, and those that wait for a lost
worker are cancelled and submitted again.

**A managed scheduler allows no failures** (``allowed-failures: 0``), since retrying is the client's task. With Dask's
default of 3, the client learns of a chunk that kills its worker only after four deaths, and ``cluster.close()`` hung in 6
of 10 trials; with 0 it hung in none of 3. Closing also has a deadline, after which the remaining processes are killed.

**A plain script works without a ``__main__`` guard.** Workers started by multiprocessing import the user's script again,
which without a guard starts another cluster in each of them: 194 log lines and a hang (measured). Workers started as
subprocesses do not: the same script took 2.7 s. So every nanny runs in a plain Python process that receives its options
over standard input, and imports nothing of the script. dask-cuda would start GPU workers by multiprocessing, so a script
with GPUs would have to stop with an error; its cluster gets the same processes instead, and no such error is needed.
"""
