from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from daskinfer.models import serialization
from daskinfer.models.user_code import is_user_module


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A user's module, imported here, and a file beside it that it imports."""
    (tmp_path / "nets.py").write_text("import helpers\ndef double(x): return 2 * x\n")
    (tmp_path / "helpers.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield import_module("nets")
    del sys.modules["nets"], sys.modules["helpers"]


@pytest.mark.parametrize(
    "module", [torch, np, os, subprocess, nn.functional, pytest, serialization, sys, sys.modules["__main__"]]
)
def test_other_modules(module: types.ModuleType) -> None:
    """What is installed, the standard library, this package and __main__ are not the user's."""
    assert not is_user_module(module)


def test_user_modules(nets: types.ModuleType) -> None:
    """A file beside the script is the user's; what is not a loaded module is not."""
    assert is_user_module(nets)
    assert is_user_module(sys.modules["helpers"])
    assert not is_user_module(nets.double)
    assert not is_user_module(types.ModuleType("nets"))


@pytest.mark.parametrize("folder", ["lib/site-packages", ".local/lib/python3/dist-packages", "target"])
def test_installed_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """What pip put into a user's folder, or into a --target, is installed."""
    root = tmp_path / folder
    (root / "installed" / "deep").mkdir(parents=True)
    (root / "installed-1.0.dist-info").mkdir()
    for path in ("installed", "installed/deep"):
        (root / path / "__init__.py").touch()
    (root / "installed" / "deep" / "leaf.py").touch()
    monkeypatch.syspath_prepend(root)
    leaf = import_module("installed.deep.leaf")
    found = [leaf, sys.modules["installed.deep"], sys.modules["installed"]]
    assert not any(map(is_user_module, found))
    for module in found:
        del sys.modules[module.__name__]
