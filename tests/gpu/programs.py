"""Programs that the GPU check runs in processes of their own; each prints a line that starts with "RESULT"."""

PREDICT = """
import time
import numpy as np, torch
import daskinfer as di

model = torch.nn.Linear(64, 8)
x = np.random.default_rng(0).standard_normal((100_000, 64)).astype("float32")
seconds = []
for _ in range(2):
    started = time.perf_counter()
    y = di.predict(model, x, devices="cuda")
    seconds.append(round(time.perf_counter() - started, 2))
difference = float(abs(y - model(torch.from_numpy(x)).detach().numpy()).max())
is_mapped = "libcuda.so" in open("/proc/self/maps").read()
assert not torch.cuda.is_initialized()
print("RESULT first call", seconds[0], "s, second", seconds[1], "s, differ by", difference, ", libcuda mapped", is_mapped)
di.close()
"""

PIPELINE = """
import numpy as np, torch
from tests.gpu.pipeline import TransferPipeline

device = torch.device("cuda:0")
model = torch.nn.Linear(64, 8).to(device).requires_grad_(False)
rows, result = np.ones((5000, 64), "float32"), np.zeros((5000, 8), "float32")
TransferPipeline(model, device, 64, 640, rows[:1], result[:1]).run(rows, result, 640)
assert np.ptp(result, axis=0).max() < 1e-5
print("RESULT clean")
"""

BAD_INDEX = """
import numpy as np, torch
import daskinfer as di

class Embed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(100, 4)

    def forward(self, x):
        return self.embedding(x).sum(1)

x = np.random.default_rng(0).integers(0, 100, (40_000, 8))
x[1234, 3] = 100
y = di.predict(Embed(), x, devices="cuda", on_error="skip", output=np.empty((0, 4), "float32"))
print("RESULT rows lost:", int(np.isnan(y).any(1).sum()))
di.close()
"""

SECOND_CALL = """
import numpy as np, torch
import daskinfer as di

class Greedy(torch.nn.Module):
    def forward(self, x):
        if x.is_cuda:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.empty(int(0.97 * total) - (2 << 30), dtype=torch.uint8, device=x.device)
        return x * 2

di.predict(Greedy(), np.ones((1000, 64), "float32"), devices="cuda", batch_size=500)
model, x = torch.nn.Linear(20_000, 40_000), np.ones((64, 20_000), "float32")
try:
    di.predict(model, x, devices="cuda", batch_size=32, output=np.empty((0, 40_000), "float32"))
    print("RESULT fine")
except di.DaskInferError as error:
    print("RESULT", type(error).__name__, str(error)[:200])
di.close()
"""
