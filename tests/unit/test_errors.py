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
from daskinfer.errors import DaskInferError, ErrorCollector, InputError, Interrupted, OptionError, PlanError, StorageError


def tree() -> dict[str, str]:
    """Return the classes drawn in the docstring, each with its builtin, or Exception if none is drawn."""
    return {name: builtin or "Exception" for name, builtin in re.findall(r"── (\w+)(?: +\((\w+)\))?", errors.__doc__ or "")}


def subclasses(of: type) -> list[type]:
    """Return all subclasses of a class."""
    return [found for one in of.__subclasses__() for found in (one, *subclasses(one))]


@pytest.fixture(scope="module")
def classes() -> list[type[DaskInferError]]:
    """Every class of the tree, wherever in the package it is defined."""
    for module in pkgutil.walk_packages(daskinfer.__path__, "daskinfer."):
        if not module.name.endswith(("cuda_cluster", "__main__")):
            import_module(module.name)
    return subclasses(DaskInferError)


def test_tree_is_exact(classes: list[type]) -> None:
    """The docstring draws exactly the classes that exist."""
    assert sorted(tree()) == sorted(error.__name__ for error in classes if error.__module__.startswith("daskinfer"))


@pytest.mark.parametrize(("name", "builtin"), tree().items())
def test_is_the_builtin_that_a_caller_would_catch(name: str, builtin: str) -> None:
    """Each class also subclasses the builtin beside it in the drawing."""
    error = getattr(errors, name)
    assert issubclass(error, DaskInferError) and issubclass(error, getattr(builtins, builtin))


@pytest.mark.parametrize("by_dask", [False, True])
@pytest.mark.parametrize("name", tree())
def test_survives_pickling(name: str, by_dask: bool) -> None:
    """An error from a worker has the same message and arguments in the client, however Dask pickles it."""
    numbered = (2,) if name in ("Interrupted", "StorageError") else ()
    error = getattr(errors, name)("cuda:1 holds 'x'; 2 is allowed. Use 1.", *numbered)
    if by_dask:
        error.__cause__ = ValueError("what was wrong")
        install(error, error.__cause__)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.args) == (type(error), str(error), error.args)
    assert str(error) == "cuda:1 holds 'x'; 2 is allowed. Use 1."


def test_numbers_of_the_system() -> None:
    """A storage error has the system's error number, or 0; an interrupt has its signal number."""
    assert (StorageError("full.", errno.ENOSPC).number, StorageError("odd.").number) == (errno.ENOSPC, 0)
    assert Interrupted("Ctrl-C.", signal.SIGTERM).signal_number == 15


@pytest.mark.parametrize(("above", "below"), [("ChunkError", "WorkerLost"), ("ClusterError", "SchedulerLost")])
def test_a_class_is_below_the_one_it_is_drawn_under(above: str, below: str) -> None:
    """A handler for the class above also catches the one below."""
    assert issubclass(getattr(errors, below), getattr(errors, above))


def test_nothing_is_done_yet() -> None:
    """An error outside a running predict has no partial result."""
    assert DaskInferError("no").partial is None


def test_several_reasons_are_numbered() -> None:
    """A plan with several problems lists all of them."""
    error = pickle.loads(pickle.dumps(PlanError(["too big.", "no device."])))
    assert error.reasons == ("too big.", "no device.")
    assert str(error) == "invalid plan, 2 problems:\n  1. too big.\n  2. no device."


def test_one_reason_stands_alone() -> None:
    """A single problem is the message, passed as a list or as a string."""
    assert str(PlanError(["too big."])) == str(PlanError("too big.")) == "too big."


def fail(error: Exception) -> None:
    """Raise an error."""
    raise error


def test_errors_are_collected() -> None:
    """No error raises nothing, one is raised as it is, several are listed together with the reasons of plan errors."""
    collector = ErrorCollector()
    assert collector.attempt(abs, -1) == 1
    assert collector.succeeds(abs, -1)
    collector.raise_if_any()
    first = InputError("no rows.")
    assert collector.attempt(fail, first) is None
    with pytest.raises(InputError, match="no rows") as caught:
        collector.raise_if_any()
    assert caught.value is first
    assert not collector.succeeds(fail, PlanError(["too big.", "no device."]))
    with pytest.raises(PlanError, match="invalid plan, 3 problems:") as listed:
        collector.raise_if_any()
    assert listed.value.reasons == ("no rows.", "too big.", "no device.")


def test_other_errors_are_not_collected() -> None:
    """An error that daskinfer does not raise on purpose passes at once."""
    collector = ErrorCollector()
    with pytest.raises(ZeroDivisionError, match="by zero"), collector.collect():
        fail(ZeroDivisionError("by zero"))
    with collector.collect():
        fail(OptionError("no such option."))
    with pytest.raises(OptionError, match="no such option"):
        collector.raise_if_any()


def test_every_class_is_documented(classes: list[type]) -> None:
    """Every class that a user may catch has a docstring."""
    assert all(error.__doc__ for error in classes)
