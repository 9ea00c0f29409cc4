"""A folder for the command to work in, and a log that each test finds as it was."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

FACTORY = """
import logging, warnings
import torch

def linear(n_out=2):
    torch.manual_seed(0)
    return torch.nn.Linear(5, n_out)

def two_ports():
    class Net(torch.nn.Module):
        def forward(self, a, b):
            return {"sum": a + b, "difference": a - b}
    return Net()

def prints():
    class Net(torch.nn.Module):
        def forward(self, x):
            print("printed by the model")
            return x
    return Net()

def warns():
    logging.getLogger("distributed").info("what buries the rest")
    logging.getLogger("distributed").error("an error of Dask's")
    warnings.warn("look out")
    return linear()

def fails():
    class Net(torch.nn.Module):
        def forward(self, x):
            if x.max() > 5:
                raise ArithmeticError("too large")
            return x
    return Net()
"""


@pytest.fixture
def folder(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with inputs and a module of factories, which is the working directory."""
    (in_folder / "cli_nets.py").write_text(FACTORY)
    np.save("x.npy", np.arange(500, dtype=np.float32).reshape(100, 5) / 500)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield in_folder
    sys.modules.pop("cli_nets", None)


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """The command sets up the log of its process: undo it here."""
    loggers = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    before = [(logger, logger.level, logger.handlers[:]) for logger in loggers]
    yield
    logging.captureWarnings(False)
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers
