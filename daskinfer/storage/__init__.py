"""Arrays in files: read inputs, write outputs, and keep the manifest that lets a run resume and be verified.

Storage owns the formats (``formats``, one module per suffix), the manifest of an output (``manifest``, ``paths``,
``journal``), uncommitted data (``staging``), the outputs of a run that are committed together (``outputs``,
``output_request``), and ``verify``. It knows rows, bytes and checksums. It must not know Dask, devices, models or workers:
it is told which chunk was computed, with which batch size, and does not ask who computes the next one.

Two decisions, paid for with measurements, are kept here.

*Weighted chunks are irregular, Zarr's are not.* Device weights give chunks of any number of rows, while a Zarr array has
one chunk size, and ``dask.array.to_zarr`` rechunks irregular chunks to the largest of them. So outputs are written by
region into a store with regular chunks of its own, the *write-units* (for a sharded store the shard), and weights only
decide how many write-units a chunk holds. A source given by path is opened with the chunks of the plan and
``inline_array=True``, one task per chunk: a ``.rechunk`` afterwards took 40 tasks for 8 chunks. A user's own dask array
keeps its chunks along axis 0.

*Chunks are computed at least once, and committed exactly once.* An attempt writes under a name of its own; after the client
has its result it publishes the parts by a rename, and appends the receipt after that. Where no rename is possible (a region
of one ``.npy`` file, object stores), a chunk is retried only once its old process is known to be dead. Receipts carry the
checksums of the stored bytes, so that ``verify`` can find any change, and a run after a reboot can tell what reached the
disk.
"""
