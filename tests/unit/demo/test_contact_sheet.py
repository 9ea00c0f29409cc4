from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from daskinfer.demo import digits
from daskinfer.demo.contact_sheet import draw_contact_sheet

RED = (198, 40, 40)


def count_red(path: Path) -> int:
    """Return how many pixels are red."""
    return int((read_picture(path) == RED).all(axis=2).sum())


def read_picture(path: Path) -> NDArray[np.uint8]:
    """Return the pixels, (height, width, 3) uint8."""
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_wrong_digits_are_marked(tmp_path: Path) -> None:
    """Right digits are drawn without red, and each wrong one has a red frame."""
    images, labels = next(digits.augment(40, seed=1))
    path = tmp_path / "digits.png"
    draw_contact_sheet(path, images, labels, labels)
    assert count_red(path) == 0
    read = labels.copy()
    read[[3, 20]] = (read[[3, 20]] + 1) % 10
    draw_contact_sheet(path, images, read, labels)
    frame = 4 * 2 * (42 - 2)  # two pixels wide around 42 by 42
    assert 2 * frame <= count_red(path) <= 3 * frame


def test_images_are_drawn_in_order(tmp_path: Path) -> None:
    """The image in row 1, column 2 of the sheet is the 19th."""
    images, labels = next(digits.augment(40, seed=1))
    draw_contact_sheet(tmp_path / "digits.png", images, labels, labels)
    sheet = read_picture(tmp_path / "digits.png")[..., 0]
    x, y = 2 * 52 + 6, 34 + 64
    np.testing.assert_allclose(sheet[y : y + 40 : 5, x : x + 40 : 5], np.uint8(255 * (1 - images[18, 0])), atol=1)


def test_few_images_make_a_small_sheet(tmp_path: Path) -> None:
    """Three images take one row of the sheet."""
    images, labels = next(digits.augment(3, seed=1))
    draw_contact_sheet(tmp_path / "digits.png", images, labels, labels)
    assert read_picture(tmp_path / "digits.png").shape == (34 + 64, 16 * 52, 3)
