"""Environment variables and limits that client and workers have to agree on.

The variables tell a worker of a managed cluster which device it serves; they are set before its Python starts.
"""

DEVICE = "DASKINFER_DEVICE"  # name of the worker's device in the plan, "cuda:1"
UUID = "DASKINFER_DEVICE_UUID"  # "GPU-…"; empty for CPUs
THREADS = "DASKINFER_TORCH_THREADS"  # torch threads that a CPU worker computes a chunk with
SCRATCH = "DASKINFER_SCRATCH"  # the cluster's scratch folder, removed with it; models are sent there

MAX_PREFETCH = 6  # chunks read ahead per device; arbitrary: storage that needs more is better served by larger chunks
MAX_TASKS_IN_FLIGHT = MAX_PREFETCH + 2  # per worker of a managed cluster: one computes, one writes, the rest read
