"""A picture of the demo's images with the digits that the model read in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from daskinfer.demo.digits import Images, Labels

N_COLUMNS, N_ROWS = 16, 8  # of the sheet
_SCALE = 5  # pixels of the sheet per pixel of an image
_TILE_WIDTH, _TILE_HEIGHT = 52, 64  # pixels
_CAPTION_HEIGHT = 34  # pixels
_PAPER, _INK, _EDGE, _WRONG = "#ffffff", "#333333", "#dddddd", "#c62828"


def draw_contact_sheet(path: Path, images: Images, read: Labels, labels: Labels) -> None:
    """Draw the first 128 images, each with the digit that the model read; wrong ones have a frame and show the right digit.

    Parameters
    ----------
    path : Path
        The PNG file to write.
    images : ndarray, (n, 1, 8, 8) float32
        Brightness from 0 (paper) to 1 (ink).
    read, labels : ndarray, (n,) int64
        The digits that the model read, and those that the images show.

    Examples
    --------
    >>> import tempfile
    >>> from daskinfer.demo import digits
    >>> images, labels = next(digits.augment(20, seed=0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     draw_contact_sheet(Path(folder, "digits.png"), images, labels, labels)
    ...     with Image.open(Path(folder, "digits.png")) as sheet:
    ...         sheet.size
    (832, 162)
    """
    n_shown = min(len(images), N_COLUMNS * N_ROWS)
    height = _CAPTION_HEIGHT + _TILE_HEIGHT * -(-n_shown // N_COLUMNS)
    sheet = Image.new("RGB", (N_COLUMNS * _TILE_WIDTH, height), _PAPER)
    canvas = ImageDraw.Draw(sheet)
    n_wrong = int((read[:n_shown] != labels[:n_shown]).sum())
    caption = f"the first {n_shown} images, with the digit that the model read; {n_wrong} wrong, in red with the right digit"
    canvas.text((10, 8), caption, fill=_INK, font=ImageFont.load_default(15))
    for i in range(n_shown):
        corner = (i % N_COLUMNS * _TILE_WIDTH, _CAPTION_HEIGHT + i // N_COLUMNS * _TILE_HEIGHT)
        _draw_tile(canvas, sheet, corner, images[i, 0], int(read[i]), int(labels[i]))
    sheet.save(path)


def _draw_tile(
    canvas: ImageDraw.ImageDraw,
    sheet: Image.Image,
    corner: tuple[int, int],
    image: Images,  # (8, 8)
    read: int,
    label: int,
) -> None:
    brightness = np.uint8(255 * (1 - image)).repeat(_SCALE, axis=0).repeat(_SCALE, axis=1)  # (40, 40) uint8
    x, y = corner[0] + (_TILE_WIDTH - brightness.shape[1]) // 2, corner[1]
    sheet.paste(Image.fromarray(brightness), (x, y))
    side = brightness.shape[0]
    text, color, frame, width = (str(read), _INK, _EDGE, 1) if read == label else (f"{read}, not {label}", _WRONG, _WRONG, 2)
    canvas.rectangle((x - 1, y - 1, x + side, y + side), outline=frame, width=width)
    below = (corner[0] + _TILE_WIDTH / 2, y + side + 10)
    canvas.text(below, text, fill=color, font=ImageFont.load_default(12), anchor="mm")
