"""Pictures say what they were made from: a PNG carries its script's name, the figures it shows, and a hash of both.

A test fails if the script has changed since, so that no picture shows what the code no longer draws. A script ends with::

    stamp_picture("notebooks/pictures/demo.png", script=__file__, figures={"seconds": 2.1})

and ``python -m tests.support.pictures PICTURE SCRIPT [FIGURES.json]`` does the same for one that was made by hand, as from a
browser. The figures travel in the picture, so it can be drawn again without measuring again (:func:`read_figures`).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

ROOT = Path(__file__).parents[2]
SOURCE, SCRIPT, FIGURES = "daskinfer-source", "daskinfer-script", "daskinfer-figures"  # keys of the PNG's text

StrPath = str | os.PathLike[str]


def stamp_picture(picture: StrPath, *, script: StrPath, figures: Any = None) -> None:
    """Write into a PNG what it was made from.

    Parameters
    ----------
    picture
        The PNG, which is written again with the same pixels.
    script
        The file of this repository that draws it.
    figures
        What it shows, as JSON can hold it; None: nothing that was measured.
    """
    name = str(Path(script).resolve().relative_to(ROOT))
    text = json.dumps(figures, sort_keys=True)
    info = PngInfo()
    for key, value in ((SCRIPT, name), (FIGURES, text), (SOURCE, compute_source_hash(name, text))):
        info.add_itxt(key, value)
    with Image.open(picture) as image:
        image.load()
        image.save(picture, "PNG", pnginfo=info, dpi=image.info.get("dpi"), optimize=True)


def compute_source_hash(script: str, figures: str) -> str:
    """Return the SHA-256 over the text of a script, by its path in the repository, and the figures as JSON."""
    return hashlib.sha256((ROOT / script).read_bytes() + b"\0" + figures.encode()).hexdigest()


def read_figures(picture: StrPath) -> Any:
    """Return the figures that a stamped picture shows."""
    return json.loads(_read_texts(picture)[FIGURES])


def find_problem(picture: StrPath) -> str:
    """Return why a picture does not show what its script draws; empty if it does."""
    if not Path(picture).is_file():
        return "does not exist"
    texts = _read_texts(picture)
    if missing := {SOURCE, SCRIPT, FIGURES} - texts.keys():
        return f"does not say what it was made from: its metadata has no {', '.join(sorted(missing))}"
    if not (ROOT / texts[SCRIPT]).is_file():
        return f"was made by {texts[SCRIPT]}, which does not exist"
    if compute_source_hash(texts[SCRIPT], texts[FIGURES]) != texts[SOURCE]:
        return f"was made by an earlier {texts[SCRIPT]}: make it again"
    return ""


def _read_texts(picture: StrPath) -> dict[str, str]:
    with Image.open(picture) as image:
        image.load()
        return dict(getattr(image, "text", {}))


def main(picture: str, script: str, figures: str | None = None) -> None:
    """Stamp a picture; ``figures`` is the path of a JSON file."""
    stamp_picture(picture, script=script, figures=json.loads(Path(figures).read_text()) if figures else None)


if __name__ == "__main__":
    main(*sys.argv[1:])
