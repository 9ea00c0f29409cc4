"""Handwritten digits: 1,797 real ones, and as many made from them as a demonstration wants.

The split is by position: the model was trained on the first 1,437 digits and never saw the last 360. Made digits
come from these 360 alone, so that its accuracy on them is that on digits it does not know.

They come in blocks of 10,000 rows, and block ``b`` of seed ``s`` is drawn by ``default_rng([s, b])`` alone: any
block can be made without those before it, and fewer rows are always the beginning of more.
"""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import numpy as np
import zarr
from numpy.typing import NDArray

Images: TypeAlias = NDArray[np.float32]
Labels: TypeAlias = NDArray[np.int64]

DIGITS_PATH = Path(__file__).with_name("digits.npy")
"""(1797, 65) uint8: 64 pixels of 0..16, row by row, and the label; see CREDITS.md."""

TRAINED = slice(0, 1437)
"""The digits that the model was trained on: four fifths."""

HELD_OUT = slice(1437, 1797)
"""The digits that it never saw: one fifth."""

BLOCK_ROWS = 10_000
"""Rows drawn by one generator: 2.5 MiB of float32 images; arbitrary."""

CHUNK_ROWS = 5_000
"""Rows in a chunk of the store, 1.2 MiB; divides BLOCK, so that no chunk is written twice."""

NOISE_STD = 0.1
"""Standard deviation of the noise on a pixel of 0..1: visible, and a person still reads the digit; arbitrary."""


def load() -> tuple[Images, Labels]:
    """Read the 1,797 digits that come with the package.

    Returns
    -------
    images : ndarray, (1797, 8, 8) float32
        Brightness from 0 (paper) to 1 (ink).
    labels : ndarray, (1797,) int64
        The digit that each image shows, 0 to 9.

    Examples
    --------
    >>> from daskinfer.demo import digits
    >>> images, labels = digits.load()
    >>> images.shape, labels[:5].tolist()
    ((1797, 8, 8), [0, 1, 2, 3, 4])
    """
    table = np.load(DIGITS_PATH)  # (1797, 65) uint8
    images = table[:, :64].reshape(-1, 8, 8).astype(np.float32) / np.float32(16)  # (1797, 8, 8) float32
    return images, table[:, 64].astype(np.int64)


def draw(rows: slice, n_rows: int, rng: np.random.Generator) -> tuple[Images, Labels]:
    """Draw digits at random, each shifted by up to a pixel in both axes and with noise on every pixel.

    Parameters
    ----------
    rows : slice
        Which of the 1,797 digits to draw from: `TRAINED` or `HELD_OUT`.
    n_rows : int
        How many to draw, with replacement.
    rng : numpy.random.Generator
        The source of randomness; drawing advances it.

    Returns
    -------
    images : ndarray, (n_rows, 1, 8, 8) float32
        Brightness from 0 to 1.
    labels : ndarray, (n_rows,) int64
        The digit that each image shows, 0 to 9.

    Examples
    --------
    >>> import numpy as np
    >>> from daskinfer.demo import digits
    >>> images, labels = digits.draw(digits.TRAINED, 32, np.random.default_rng(0))
    >>> images.shape, labels.shape
    ((32, 1, 8, 8), (32,))
    """
    images, labels = load()
    images, labels = images[rows], labels[rows]
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))  # (m, 10, 10) float32
    shifted = np.stack([padded[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)])  # (9, m, 8, 8)
    source = rng.integers(len(images), size=n_rows)  # (n_rows,) int64
    drawn = shifted[rng.integers(9, size=n_rows), source]  # (n_rows, 8, 8) float32
    drawn += np.float32(NOISE_STD) * rng.standard_normal(drawn.shape, dtype=np.float32)
    return np.clip(drawn, 0, 1, out=drawn)[:, np.newaxis], labels[source]


def augment(n_rows: int, seed: int) -> Iterator[tuple[Images, Labels]]:
    """Make digits from the held-out ones, block by block; the same seed always makes the same rows.

    Parameters
    ----------
    n_rows : int
        How many rows in all; fewer are the beginning of more.
    seed : int
        0 or more.

    Yields
    ------
    images : ndarray, (10000, 1, 8, 8) float32
        Brightness from 0 to 1; the last block holds what is left of `n_rows`.
    labels : ndarray, (10000,) int64
        The digit that each image shows, 0 to 9.

    Examples
    --------
    >>> from daskinfer.demo import digits
    >>> [images.shape for images, labels in digits.augment(12_000, seed=0)]
    [(10000, 1, 8, 8), (2000, 1, 8, 8)]
    """
    for block, start in enumerate(range(0, n_rows, BLOCK_ROWS)):
        images, labels = draw(HELD_OUT, BLOCK_ROWS, np.random.default_rng([seed, block]))
        yield images[: n_rows - start], labels[: n_rows - start]


def write(path: str | PathLike[str], n_rows: int, seed: int) -> Labels:
    """Write made digits to a new Zarr array, holding one block of them in memory.

    Parameters
    ----------
    path : str or path
        The array's path: a folder that does not exist yet.
    n_rows : int
        How many rows; 256 bytes each, stored as they are (noise does not compress).
    seed : int
        0 or more; the rows are those of `augment`.

    Returns
    -------
    ndarray, (n_rows,) int64
        The digit that each image of the (n_rows, 1, 8, 8) float32 array shows, 0 to 9.

    Raises
    ------
    zarr.errors.ContainsArrayError
        An array is at `path` already (also a ValueError); it was not touched.

    Examples
    --------
    >>> import tempfile
    >>> from daskinfer.demo import digits
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     digits.write(f"{folder}/digits.zarr", 3, seed=0).shape
    (3,)
    """
    shape, chunks = (n_rows, 1, 8, 8), (CHUNK_ROWS, 1, 8, 8)
    array = zarr.create_array(str(path), shape=shape, chunks=chunks, dtype="float32", compressors=None, zarr_format=3)
    labels = np.empty(n_rows, np.int64)
    for start, block in zip(range(0, n_rows, BLOCK_ROWS), augment(n_rows, seed), strict=True):
        rows = slice(start, start + len(block[1]))
        array[rows], labels[rows] = block
    return labels
