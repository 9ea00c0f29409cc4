"""Names and numbers on which client and workers have to agree.

The environment variables tell a worker of our own cluster what it is; they are set before its Python starts.
"""

DEVICE = "DASKINFER_DEVICE"  # the device's name in the plan, "cuda:1"
UUID = "DASKINFER_DEVICE_UUID"  # "GPU-…"; empty for CPUs
THREADS = "DASKINFER_TORCH_THREADS"  # of a CPU worker's chunks
SCRATCH = "DASKINFER_SCRATCH"  # the cluster's folder, removed with it; shipped networks lie there

MAX_PREFETCH = 6  # chunks that are read ahead per device; arbitrary, storage that needs more wants larger chunks
MAX_TASKS_IN_FLIGHT = MAX_PREFETCH + 2  # in flight on a worker of ours at most: one computes, one writes, the others read
