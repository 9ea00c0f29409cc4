"""How to install one of daskinfer's extras into the environment at hand.

daskinfer is on no package index, so a command names where this installation came from: its checkout, as pip recorded it in
``direct_url.json`` (PEP 610), or the address of its repository.
"""

from __future__ import annotations

import json
import os
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname


def describe_install(extra: str) -> str:
    """Return the command that installs an extra, to be typed where this process was started.

    Without a known origin it is the command for a checkout, as the working directory.

    Examples
    --------
    >>> describe_install("plot").startswith("pip install ")
    True
    """
    origin = _read_origin()
    if "vcs_info" in origin:
        vcs = origin["vcs_info"]
        return f'pip install "daskinfer[{extra}] @ {vcs["vcs"]}+{origin["url"]}@{vcs["commit_id"]}"'
    folder = _find_checkout(origin)
    place = "." if folder is None or os.path.samefile(folder, os.curdir) else folder
    is_editable = origin.get("dir_info", {}).get("editable", False)  # it stays so
    return f'pip install {"-e " if is_editable else ""}"{place}[{extra}]"'


def describe_cuda_install(cuda_major: int) -> str:
    """Return the command that installs what GPU workers need, for torch's or the driver's version of CUDA.

    Examples
    --------
    >>> describe_cuda_install(12).endswith('[cuda12]"'), describe_cuda_install(14).endswith('[cuda13]"')
    (True, True)
    """
    return describe_install("cuda12" if cuda_major <= 12 else "cuda13")


def _read_origin() -> dict[str, Any]:
    """Return what pip recorded about where it installed daskinfer from; empty if nothing."""
    try:
        text = distribution("daskinfer").read_text("direct_url.json")
    except PackageNotFoundError:
        return {}
    return dict(json.loads(text)) if text else {}


def _find_checkout(origin: dict[str, Any]) -> Path | None:
    """Return the folder of the checkout that this module is in, or that pip installed; None if there is none (any more)."""
    folders = [Path(__file__).parents[2]]
    if "dir_info" in origin:
        folders.append(Path(url2pathname(urlsplit(origin["url"]).path)))
    return next((folder for folder in folders if (folder / "pyproject.toml").exists()), None)
