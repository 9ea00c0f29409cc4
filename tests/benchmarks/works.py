"""The works that everyone is timed on: networks and inputs, pinned by seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import nn

LEAST_ROWS = 256  # of a work that is shrunk for development
TOLERANCE = 1e-4  # between answers: the last bits depend on the batch's shape and the threads
_SEED = 20  # arbitrary, fixed for good
_MADE_ROWS = 10_000  # made at a time, so that making an input takes little memory


@dataclass(frozen=True)
class Work:
    """One network over one input of ``n_rows`` rows of ``row_shape``, float32."""

    name: str
    n_rows: int
    row_shape: tuple[int, ...]
    answer_shape: tuple[int, ...]
    batch_size: int
    layers: Callable[[], nn.Module]

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row of input."""
        return 4 * int(np.prod(self.row_shape))

    def scaled(self, factor: float) -> Work:
        """The same with fewer rows."""
        return replace(self, n_rows=max(LEAST_ROWS, round(self.n_rows * factor)))

    def net(self) -> nn.Module:
        """The network, its weights always the same, ready for inference."""
        net = self.layers().eval().requires_grad_(False)
        made = np.random.default_rng(_SEED)  # not torch's own, which threads share
        for weights in net.parameters():
            scale = (weights[0].numel() or 1) ** -0.5
            weights.copy_(torch.from_numpy(scale * made.standard_normal(weights.shape, dtype=np.float32)))
        return net

    def rows(self) -> Iterator[np.ndarray]:
        """The input, part by part."""
        made = np.random.default_rng(_SEED)
        for start in range(0, self.n_rows, _MADE_ROWS):
            n = min(_MADE_ROWS, self.n_rows - start)
            yield made.standard_normal((n, *self.row_shape), dtype=np.float32)

    def write(self, path: Path) -> None:
        """Write the input as ``.npy``."""
        out = open_memmap(path, mode="w+", dtype=np.float32, shape=(self.n_rows, *self.row_shape))
        start = 0
        for part in self.rows():
            out[start : start + len(part)] = part
            start += len(part)
        out.flush()


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Linear(16 * 8 * 8, 10),
    )


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))


def _large() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1))


_IMAGE = (3, 32, 32)
WORKS = {
    work.name: work
    for work in (
        Work("cnn", 40_000, _IMAGE, (10,), 64, _cnn),
        Work("mlp", 2_000_000, (64,), (10,), 1024, _mlp),
        Work("large", 40_000, _IMAGE, _IMAGE, 256, _large),
        Work("few images", 2_000, _IMAGE, (10,), 64, _cnn),
        Work("few rows", 100_000, (64,), (10,), 1024, _mlp),
    )
}


def difference(answer: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference between an answer, perhaps of the first rows only, and what was expected of all."""
    if answer.shape[1:] != expected.shape[1:] or len(answer) > len(expected) or not len(answer):
        return float("inf")
    expected = expected[: len(answer)]
    worst = (np.abs(a - b).max() for a, b in zip(_parts(answer), _parts(expected), strict=True))
    return float(np.max([*worst]))


def _parts(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[start : start + _MADE_ROWS] for start in range(0, len(rows), _MADE_ROWS))
