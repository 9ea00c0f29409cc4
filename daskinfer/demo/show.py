"""``daskinfer demo``: a trained model applied to 200,000 images on every device, compared with a plain loop."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import zarr

from daskinfer import Model, run
from daskinfer.core.arrays import Array
from daskinfer.demo import digits

SEED = 2026
WEIGHTS = Path(__file__).parent / "digits.safetensors"
LOOP_BATCH_SIZE = 2048  # of the plain loop's batches; a whole Zarr chunk or less, arbitrary
TOLERANCE = 1e-4  # of logits of about 10; the last bits depend on the batch's shape and the number of threads


def run_demo(folder: Path, n_rows: int, devices: str) -> Iterator[str]:
    """Make the images, classify them, and report line by line.

    Parameters
    ----------
    folder
        An existing folder, in which ``images.zarr`` and ``scores.zarr`` are created.
    n_rows
        How many images.
    devices
        As for ``predict``.
    """
    images, scores = folder / "images.zarr", folder / "scores.zarr"
    labels = digits.write(images, n_rows, SEED)
    yield f"{n_rows:,} images of handwritten digits, shifted and noisy, made from 360 that the model never saw."
    yield "Classifying them …"
    model = Model(os.fspath(WEIGHTS), factory="daskinfer.demo.net:make_model")
    report = run(model, images, scores, devices=devices)
    yield ""
    yield str(report)
    yield ""
    output = np.asarray(zarr.open_array(scores, mode="r")[:])
    n_right = int((np.argmax(output, axis=1) == labels).sum())
    yield f"accuracy        {n_right / n_rows:.2%} ({n_right:,} of {n_rows:,} digits right)"
    yield f"checked         {_compare_outputs(output, run_plain_loop(images))}"
    yield f"output          {scores}"


def run_plain_loop(images: Path) -> Array:
    """Return what a plain loop over batches of the images gives, without daskinfer, (n, 10) float32."""
    model = Model(os.fspath(WEIGHTS), factory="daskinfer.demo.net:make_model").make_loader().load(torch.device("cpu")).run
    rows = zarr.open_array(images, mode="r")
    with torch.inference_mode():
        batches = [model(torch.from_numpy(rows[i : i + LOOP_BATCH_SIZE])) for i in range(0, rows.shape[0], LOOP_BATCH_SIZE)]
    return np.asarray(torch.cat(batches).numpy())


def _compare_outputs(output: Array, expected: Array) -> str:
    difference = float(np.abs(output - expected).max())
    verdict = "equals" if difference <= TOLERANCE else "DIFFERS FROM"
    return f"the output {verdict} a plain torch loop's, in the same order (largest difference {difference:.1g})"
