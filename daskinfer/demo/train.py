"""How the demo's weights were made: ``python -m daskinfer.demo.train`` makes them again.

Seeds are fixed, so that two runs of one machine agree; another release of torch or another number of threads changes
the last bits, and with them the path of the training, but not the quality of the result.

The model's layers were chosen among seven by their accuracy on the last 287 digits of the training split, after
training on the 1,150 before them; the held-out digits are for the figure that is reported.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from daskinfer.demo import digits
from daskinfer.demo.net import DigitNet, make_model

SEED = 20
"""Of the initial weights and of the rows that training draws; arbitrary, and never tuned."""

STEPS = 4_000
"""Batches to train on: under a minute on one core; arbitrary."""

BATCH_SIZE = 128
"""Rows in a batch; arbitrary."""

PEAK_LEARNING_RATE = 3e-3
"""The learning rate at its highest; the usual one for Adam on a model of this size."""


def _iter_batches(rng: np.random.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Make training batches without end; many from one draw, since each draw reads the digits again."""
    while True:
        images, labels = digits.draw(digits.TRAINED, 64 * BATCH_SIZE, rng)
        for start in range(0, len(images), BATCH_SIZE):
            rows = slice(start, start + BATCH_SIZE)
            yield torch.from_numpy(images[rows]), torch.from_numpy(labels[rows])


def train(steps: int = STEPS) -> DigitNet:
    """Train a new model on digits made from the 1,437 of the training split, and on no others.

    Parameters
    ----------
    steps : int
        How many batches of 128 rows to learn from.

    Returns
    -------
    DigitNet
        On the CPU, in evaluation mode. The random state of the caller's torch is left as it was.

    Examples
    --------
    >>> from daskinfer.demo.train import train
    >>> train(steps=2).training
    False
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps)
        loss = nn.CrossEntropyLoss(label_smoothing=0.05)
        for images, labels in islice(_iter_batches(np.random.default_rng(SEED)), steps):
            optimizer.zero_grad()
            loss(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def compute_accuracy(model: DigitNet, images: digits.Images, labels: digits.Labels) -> float:
    """Count how often the model reads the right digit.

    Parameters
    ----------
    model : DigitNet
        In evaluation mode.
    images : ndarray, (n, 1, 8, 8) float32
        Brightness from 0 to 1.
    labels : ndarray, (n,) int64
        The digit that each image shows.

    Returns
    -------
    float
        The share of right answers, 0 to 1.

    Examples
    --------
    >>> from daskinfer.demo import digits
    >>> from daskinfer.demo.net import make_model
    >>> from daskinfer.demo.train import compute_accuracy
    >>> images, labels = next(digits.augment(100, seed=0))
    >>> 0 <= compute_accuracy(make_model().eval(), images, labels) <= 1
    True
    """
    with torch.inference_mode():
        read = model(torch.from_numpy(images)).argmax(1).numpy()  # (n,) int64
    return float(np.mean(read == labels))


def compute_held_out_accuracy(model: DigitNet) -> tuple[float, float]:
    """Measure the model on digits that it was not trained on.

    Parameters
    ----------
    model : DigitNet
        In evaluation mode.

    Returns
    -------
    clean : float
        The share of right answers, 0 to 1, on the 360 held-out digits as they are.
    augmented : float
        The same on 10,000 rows made from them with shifts and noise.

    Examples
    --------
    >>> from daskinfer.demo.train import compute_held_out_accuracy, train
    >>> clean, augmented = compute_held_out_accuracy(train(steps=2))
    """
    images, labels = digits.load()
    clean = compute_accuracy(model, images[digits.HELD_OUT, np.newaxis], labels[digits.HELD_OUT])
    return clean, compute_accuracy(model, *next(digits.augment(digits.BLOCK_ROWS, seed=0)))


def rebuild_digits(path: Path) -> None:
    """Rebuild ``digits.npy`` from scikit-learn's copy of the data set.

    Parameters
    ----------
    path : Path
        The file to write, (1797, 65) uint8; an existing file is replaced.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from daskinfer.demo.train import rebuild_digits
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     rebuild_digits(Path(folder, "digits.npy"))
    """
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # scikit-learn ships no annotations

    bunch = load_digits()
    np.save(path, np.column_stack([bunch.data, bunch.target]).astype(np.uint8))  # (1797, 65) uint8


def main(argv: Sequence[str] | None = None) -> None:
    """Train, print the accuracy on held-out digits, and write the weights.

    Parameters
    ----------
    argv : sequence of str, optional
        The command's arguments; None takes those of this process.

    Examples
    --------
    >>> import tempfile
    >>> from daskinfer.demo.train import main
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     main(["--steps", "2", "--folder", folder])  # doctest: +ELLIPSIS
    held-out digits: ... % right; with shifts and noise: ... % right
    wrote ...digits.safetensors
    """
    parser = argparse.ArgumentParser(prog="python -m daskinfer.demo.train", description="Train the demo's model.")
    parser.add_argument("--steps", type=int, default=STEPS, help="batches to train on (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path(__file__).parent, help="where the weights go (default: the package)"
    )
    options = parser.parse_args(argv)
    model = train(options.steps)
    clean, augmented = compute_held_out_accuracy(model)
    print(f"held-out digits: {clean:.2%} right; with shifts and noise: {augmented:.2%} right".replace("%", " %"))
    path = options.folder / "digits.safetensors"
    save_file(model.state_dict(), path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
