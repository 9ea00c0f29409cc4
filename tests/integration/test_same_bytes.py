"""The same bytes, however the work is cut: what ``daskinfer.scheduling`` promises, on real clusters of several sizes."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
import torch

import daskinfer as di

BATCH_SIZE = 24  # does not divide the 1000 rows, nor the chunks below
WEIGHTS = {1: ["even"], 2: ["even", [1, 2], [9, 0.1]], 3: ["even", [1, 2, 3], [9, 0.1, 0]]}
CHUNKS = [(1000,), (7, 0, 493, 500), (333, 333, 334)]


@pytest.mark.slow
def test_same_bytes_for_any_number_of_workers_weights_and_chunks() -> None:
    """With a fixed batch size the bytes are the same on 1, 2 and 3 workers, for any weights and any chunking."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(48, 4))
    x = np.random.default_rng(0).normal(size=(1000, 2, 6, 6)).astype(np.float32)
    chunked = [da.from_array(x, chunks=(chunks, 2, 6, 6)) for chunks in CHUNKS]
    outputs = set()
    for n_workers, weights in WEIGHTS.items():
        with di.LocalDeviceCluster(["cpu"] * n_workers) as cluster, cluster.get_client() as client:
            keywords = {"client": client, "batch_size": BATCH_SIZE}
            outputs |= {di.predict(model, x, device_weights=w, **keywords).tobytes() for w in weights}
            outputs |= {di.predict(model, lazy, **keywords).tobytes() for lazy in chunked}
    assert len(outputs) == 1
