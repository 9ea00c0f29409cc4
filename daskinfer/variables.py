"""The environment variables by which a worker of our own cluster learns what it is; set before its Python starts."""

DEVICE = "DASKINFER_DEVICE"  # the device's name in the plan, "cuda:1"
UUID = "DASKINFER_DEVICE_UUID"  # "GPU-…"; empty for CPUs
THREADS = "DASKINFER_TORCH_THREADS"  # of a CPU worker's chunks
SCRATCH = "DASKINFER_SCRATCH"  # the cluster's folder, removed with it; shipped networks lie there
