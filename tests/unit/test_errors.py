from __future__ import annotations

import builtins
import errno
import pickle
import pkgutil
import re
import signal
from importlib import import_module

import pytest
from tblib.pickling_support import install

import daskinfer
from daskinfer import errors
from daskinfer.errors import DaskInferError, Interrupted, PlanError, StorageError


def tree() -> dict[str, str]:
    """The classes drawn in the docstring, each with its builtin; those without one have that of the class above."""
    return {name: builtin or "Exception" for name, builtin in re.findall(r"── (\w+)(?: +\((\w+)\))?", errors.__doc__ or "")}


def subclasses(of: type) -> list[type]:
    """All classes below one."""
    return [found for one in of.__subclasses__() for found in (one, *subclasses(one))]


@pytest.fixture(scope="module")
def classes() -> list[type[DaskInferError]]:
    """Every class of the tree, wherever in the package it is defined."""
    for module in pkgutil.walk_packages(daskinfer.__path__, "daskinfer."):
        if not module.name.endswith(("cuda_cluster", "__main__")):
            import_module(module.name)
    return subclasses(DaskInferError)


def test_tree_is_exact(classes: list[type]) -> None:
    """The docstring draws every class that there is, and none that there is not."""
    assert sorted(tree()) == sorted(error.__name__ for error in classes if error.__module__.startswith("daskinfer"))


@pytest.mark.parametrize(("name", "builtin"), tree().items())
def test_is_the_builtin_that_a_caller_would_catch(name: str, builtin: str) -> None:
    """Each class is also the builtin that stands beside it in the drawing."""
    error = getattr(errors, name)
    assert issubclass(error, DaskInferError) and issubclass(error, getattr(builtins, builtin))


@pytest.mark.parametrize("by_dask", [False, True])
@pytest.mark.parametrize("name", tree())
def test_survives_pickling(name: str, by_dask: bool) -> None:
    """An error that comes from a worker says there what it said here, by whichever way Dask pickles it."""
    numbered = (2,) if name in ("Interrupted", "StorageError") else ()
    error = getattr(errors, name)("cuda:1 holds 'x'; 2 is allowed. Use 1.", *numbered)
    if by_dask:
        error.__cause__ = ValueError("what was wrong")
        install(error, error.__cause__)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.args) == (type(error), str(error), error.args)
    assert str(error) == "cuda:1 holds 'x'; 2 is allowed. Use 1."


def test_numbers_of_the_system() -> None:
    """A storage error has the system's number, 0 where it said nothing; an interrupt its signal's."""
    assert (StorageError("full.", errno.ENOSPC).number, StorageError("odd.").number) == (errno.ENOSPC, 0)
    assert Interrupted("Ctrl-C.", signal.SIGTERM).signal_number == 15


@pytest.mark.parametrize(("above", "below"), [("ChunkError", "WorkerLost"), ("ClusterError", "SchedulerLost")])
def test_a_class_is_below_the_one_it_is_drawn_under(above: str, below: str) -> None:
    """Who catches the class above gets the one below, too."""
    assert issubclass(getattr(errors, below), getattr(errors, above))


def test_nothing_is_done_yet() -> None:
    """An error that did not end a predict under way has no part of an answer."""
    assert DaskInferError("no").partial is None


def test_several_reasons_are_numbered() -> None:
    """A plan that fails for more than one reason says all of them."""
    error = pickle.loads(pickle.dumps(PlanError(["too big.", "no device."])))
    assert error.reasons == ("too big.", "no device.")
    assert str(error) == "this cannot run, for 2 reasons:\n  1. too big.\n  2. no device."


def test_one_reason_stands_alone() -> None:
    """A single reason is the message, given in a list or as it is."""
    assert str(PlanError(["too big."])) == str(PlanError("too big.")) == "too big."


def test_every_class_is_documented(classes: list[type]) -> None:
    """What a user may catch says what it means."""
    assert all(error.__doc__ for error in classes)
