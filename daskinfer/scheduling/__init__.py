"""Scheduling: which rows form a batch, a chunk and a task, which device gets them, and what runs again after an error.

The package decides, ``execution`` acts. It gets plain numbers (rows, bytes, weights, measured seconds) and returns numbers,
chunks and choices, so its tests run in simulated time and give the same result on every machine. It must not import torch,
Dask, distributed or Zarr, and knows no device, file, process or model; the kind of an error comes to it as an ``ErrorKind``.

- ``batching``: the automatic batch size, and the cells of the grid.
- ``weights``: from ``device_weights`` to one number per device.
- ``chunking``: the layout of chunks in rounds, and the device of each.
- ``balancer``: which device gets which task next, as planned or by measured speed.
- ``autotune``: the fastest batch size and memory format.
- ``throughput_history``: what earlier calls of this process measured.
- ``retry``: which faults are retried, how often, and whether in isolation.

**The same bytes, however the work is cut.** The last bits of a torch result depend on the shape of the batch and on the
number of threads. Measured with a small CNN on 1,000 rows: all 1,000 differed in some bit between 1 and 2 threads, and all
1,000 between batches of 7 and of 64; on a grid of fixed micro-batches, padded with zeros, none did. Therefore the cells of
one grid, anchored at row 0 of the whole input, hold whole micro-batches, chunks are whole cells, and a short micro-batch is
padded to the common shape. (Chunks of the caller's dask array may cut a cell, but no row changes its place in its
micro-batch.) With the batch size, the kind of device and the number of threads fixed, the bytes of the output do not depend
on chunks, shares, workers or retries. If one of these three changes, outputs agree within a small tolerance, and the record
of each chunk names its batch size and its device. A model whose output for one row depends on other rows in the batch, or
that cannot take zeros, runs with ``pad=False`` and without this guarantee.
"""
