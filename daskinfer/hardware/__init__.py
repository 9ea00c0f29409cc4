"""What a machine has, and which of its devices a user means by ``"cuda,cpu*2"``.

This package owns the discovery of GPUs through NVML (``discovery``), the cores, memory and processor name of the host
(``host``), and the language of device specs (``device_spec``). It must not know torch, Dask or distributed: callers pass in
``torch.version.cuda`` to have a build of torch checked, and start workers themselves.

**The client never touches CUDA.** A process that has initialised CUDA can no longer be pinned to one GPU, and children that
it forks cannot use any. So GPUs are counted, named and measured through NVML, which leaves CUDA alone, and each worker is
pinned by the UUID of its GPU before torch is imported there. dask-cuda does not restrict ``CUDA_VISIBLE_DEVICES`` for a
worker but rotates it, so the GPU of a worker is always its torch device 0; the worker compares the UUID of that device with
the one that it was started for. If CUDA is initialised in a worker before it is pinned, the worker stops and names that as
the cause. CPU workers start with an empty ``CUDA_VISIBLE_DEVICES`` and can take no memory on a GPU.
"""
