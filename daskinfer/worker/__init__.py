"""What happens to a chunk inside a worker, which may also be the client's own process.

This package owns everything between the rows of a task and its results: reading, running the model and writing (``task``),
micro-batches and their retries (``model_runner``, ``batch_buffers``, ``output_checks``, ``bad_rows``), the model cache
(``loaded_models``), the device with its threads and its allocator (``current_device``, ``device_thread``, ``backends``,
``allocator``), measuring (``benchmark``), and what kind of error a chunk failed with (``error_kinds``). It must not know who
sends the task: no client, no plan, no cluster, and not the rest of the call. All device-specific code is in ``backends``;
any other module works with whatever torch device it is given.
``RunSpec``, which travels with every task, is defined in ``model_runner`` and not in ``task``: planning makes it, and
``task`` needs distributed, which planning must not know.

**Freed memory stays in the process.** Dask's nanny starts workers with ``MALLOC_TRIM_THRESHOLD_=65536``, so glibc returns
the memory of every large tensor to the system, and the next tensor pays for mapping it and faulting it in. On one core that
turned 0.31 s of a CNN into 0.77 s, and 0.105 s of an MLP into 0.187 s. ``allocator`` calls ``mallopt`` through ctypes to
undo it (mmap threshold 1 GiB, trim threshold 2 GiB) and does nothing on systems without glibc. Workers of a managed cluster
call it at startup; workers of an external cluster keep their allocator as it is. The nanny also sets ``OMP_NUM_THREADS=1``,
and ``torch.set_num_threads`` counts only for the thread that calls it: so the number of threads is set around each chunk,
in the thread that computes it.

**Results leave a task as NumPy arrays** (``tensors``). distributed's serializer for torch fails on tensors that are on a
GPU, and on bfloat16, which NumPy lacks and which is returned as float32.

**The caller's data never changes.** A model whose first layer works in place would overwrite a memory-mapped input, and
crashes with SIGSEGV on a read-only mapping. So every micro-batch is a copy in a buffer of the worker (``batch_buffers``),
and a retry, after out of memory for example, sees the rows as they were. ``preprocess`` gets copies for the same reason.
"""
