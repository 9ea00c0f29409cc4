from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import torch
import zarr

from daskinfer.errors import InputError, SourceMissing
from daskinfer.planning.inputs import Inputs

X = np.arange(12, dtype="float32").reshape(4, 3)


@pytest.fixture(scope="module", autouse=True)
def _zarr_thread(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Start the thread that zarr keeps for the whole process before a test counts threads."""
    zarr.create_array(tmp_path_factory.mktemp("zarr") / "x", shape=(1,), dtype="f4")[:] = 1


def read_rows(value: Any, row_chunks: tuple[int, ...] = (3, 1)) -> np.ndarray:
    """Read the rows of a single port in chunks, as workers do, and concatenate them."""
    (port,) = Inputs.from_value(value).make_dask_arrays(row_chunks)
    assert port.chunks[0] == row_chunks
    return np.concatenate(dask.compute(*port.to_delayed().ravel(), scheduler="synchronous"))


def write_x(folder: Path, suffix: str) -> Path:
    """Write X to a file or store."""
    path = folder / f"x{suffix}"
    if suffix == ".npy":
        np.save(path, X)
    else:
        zarr.create_array(path, shape=X.shape, dtype="f4", chunks=(2, 2))[:] = X
    return path


FORMS = {
    "array": X,
    "fortran": np.asfortranarray(X),
    "strided": np.repeat(X, 2, axis=0)[::2],
    "turned round": np.ascontiguousarray(X[::-1, ::-1])[::-1, ::-1],
    "read-only": np.broadcast_to(X, (1, 4, 3))[0],
    "big-endian": X.astype(">f4"),
    "list": X.tolist(),
    "list of tuples": list(map(tuple, X.tolist())),
    "list of arrays": list(X),
    "list of tensors": list(torch.from_numpy(X)),
    "tensor": torch.from_numpy(X.copy()),
    "tensor with gradient": torch.from_numpy(X.copy()).requires_grad_(),
    "tensor on its side": torch.from_numpy(X.T.copy()).T,
    "conjugated tensor": torch.from_numpy(X.astype("complex64")).conj(),
    "dask": da.from_array(X, chunks=((3, 1), 3)),
    "dask, other chunks": da.from_array(X, chunks=(2, 3)),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str) -> None:
    """Every form of an input yields the same rows."""
    np.testing.assert_array_equal(read_rows(FORMS[form]), X)


@pytest.mark.parametrize("path_type", [str, Path])
@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_paths(tmp_path: Path, suffix: str, path_type: type) -> None:
    """A path, as str or Path, yields the rows of the file, and ``paths`` lists it."""
    path = write_x(tmp_path, suffix)
    np.testing.assert_array_equal(read_rows(path_type(path)), X)
    assert Inputs.from_value(path_type(path)).paths == [str(path)]


def test_memmap(tmp_path: Path) -> None:
    """A memmap becomes a plain view of it, which pickles only its own rows."""
    mapped = np.load(write_x(tmp_path, ".npy"), mmap_mode="r")
    (array,) = Inputs.from_value(mapped).arrays
    assert type(array) is np.ndarray
    assert np.shares_memory(array, mapped)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        ([1.0, 2.0], "float32"),
        ([[1.0], [2]], "float32"),
        ([1, 2], "int64"),
        ([True, False], "bool"),
        ([1j], "complex64"),
        ([], "float32"),
        ([np.float64(1)], "float64"),
        ([[np.ones(2)]], "float64"),
        (np.ones(2), "float64"),
        (torch.ones(2, dtype=torch.float16), "float16"),
        (torch.ones(2, dtype=torch.bfloat16), "float32"),
        (range(3), "int64"),
    ],
)
def test_dtypes(value: Any, dtype: str) -> None:
    """Python numbers get the dtype that torch would give them; anything that has a dtype keeps it."""
    assert Inputs.from_value(value).make_empty_arrays()[0].dtype == dtype


def test_no_copy() -> None:
    """An array or a tensor is used in place, without a copy."""
    tensor = torch.ones(3, 2, requires_grad=True)
    assert np.shares_memory(Inputs.from_value(X).arrays[0], X)
    assert np.shares_memory(Inputs.from_value(tensor).arrays[0], tensor.detach().numpy())


def test_named_ports() -> None:
    """A dict names the ports, which may have any number of axes."""
    inputs = Inputs.from_value({"image": np.zeros((2, 3, 4, 4), "u1"), "meta": [1.0, 2.0]})
    assert inputs.describe() == ("image: (2, 3, 4, 4) uint8", "meta: (2,) float32")
    assert (inputs.n_rows, inputs.row_nbytes) == (2, 48 + 4)
    assert [array.shape for array in inputs.make_empty_arrays()] == [(0, 3, 4, 4), (0,)]


def test_positional_ports(tmp_path: Path) -> None:
    """A tuple has one port per entry, each in any form; the chunks of a dask array apply to all ports."""
    inputs = Inputs.from_value(
        (X, torch.ones(4), da.ones((4, 2), chunks=((1, 3), 1)), write_x(tmp_path, ".npy"), [1, 2, 3, 4])
    )
    assert inputs.ports.names == ("x[0]", "x[1]", "x[2]", "x[3]", "x[4]")
    assert inputs.row_chunks == (1, 3)
    assert {port.chunks[0] for port in inputs.make_dask_arrays((1, 3))} == {(1, 3)}


def test_tensors() -> None:
    """``has_tensors`` reports a tensor among the ports, ``bfloat16_ports`` names those of that dtype."""
    inputs = Inputs.from_value({"a": X, "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.ones(4)})
    assert (inputs.has_tensors, inputs.bfloat16_ports) == (True, ("b",))
    assert not Inputs.from_value(X).has_tensors


def test_row_chunks_free() -> None:
    """Without a dask array the rows may be cut anywhere."""
    assert Inputs.from_value(X).row_chunks is None


@pytest.mark.parametrize(
    ("row_chunks", "unit_rows"),
    [((3, 3, 1), 3), ((2, 2), 2), ((4,), 4), ((1, 3), None), ((2, 1, 1), None), ((3, 1, 3), None), ((0,), None)],
)
def test_unit_rows_of_dask_arrays(row_chunks: tuple[int, ...], unit_rows: int | None) -> None:
    """The unit of a dask array is its chunk if all but the last are equal; any other has no unit."""
    assert Inputs.from_value(da.ones((sum(row_chunks), 2), chunks=(row_chunks, 2))).unit_rows == unit_rows


def test_unit_rows_of_files(tmp_path: Path) -> None:
    """The unit of a store is its chunk; arrays and ``.npy`` files have none, since any row can be read alone."""
    assert Inputs.from_value(write_x(tmp_path, ".zarr")).unit_rows == 2
    assert Inputs.from_value((X, write_x(tmp_path, ".npy"), X.tolist(), torch.ones(4))).unit_rows is None


def test_unit_rows_of_all_ports(tmp_path: Path) -> None:
    """The unit of several ports consists of whole units of each."""
    stored = write_x(tmp_path, ".zarr")
    assert Inputs.from_value((X, stored, da.ones((4, 2), chunks=((3, 1), 2)))).unit_rows == 6
    assert Inputs.from_value({"a": stored, "b": da.ones(4, chunks=((1, 3),))}).unit_rows == 2


def test_no_rows() -> None:
    """An input may have no rows."""
    assert Inputs.from_value(X[:0]).n_rows == 0
    assert Inputs.from_value(X[:0]).make_dask_arrays((0,))[0].shape == (0, 3)


def test_axis_of_no_length() -> None:
    """A later axis may have length 0."""
    assert Inputs.from_value(np.ones((4, 0))).make_dask_arrays((3, 1))[0].compute(scheduler="synchronous").shape == (4, 0)


def test_file_is_read_where_needed(tmp_path: Path) -> None:
    """The rows of a file are not in the graph, and are read chunk by chunk."""
    path = tmp_path / "x.npy"
    np.save(path, np.ones((1000, 100)))
    (port,) = Inputs.from_value(path).make_dask_arrays((500, 500))
    assert len(pickle.dumps(port)) < 10_000
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        port.compute(scheduler="synchronous")


def make_masked() -> np.ndarray:
    """Make an array with masked entries."""
    return np.ma.masked_less(X, 3)


def make_unknown_chunks() -> da.Array:
    """Make a dask array of unknown length."""
    x = da.from_array(X, chunks=2)
    return x[x[:, 0] > 3]


BAD = {
    "no ports": (dict, "the input has no ports"),
    "no ports by position": (tuple, "the input has no ports"),
    "unlike lengths": (
        lambda: {"a": X, "b": X[:3]},
        "a has 4 rows, b has 3 rows; all ports must have the same number of rows",
    ),
    "0-d": (lambda: np.float32(1), r"x is 0-d, .* Pass x\[None\] for a single row"),
    "a number": (lambda: 1.0, r"x is 0-d, .* Pass \[x\] for a single row"),
    "0-d dask": (lambda: da.from_array(X, chunks=2).sum(), "x is 0-d"),
    "0-d port": (lambda: {"a": X, "b": 1}, "b is 0-d"),
    "an object": (object, "x must hold numbers .*, got dtype object"),
    "objects": (lambda: np.array([{1}, {2}]), "x must hold numbers .*, got dtype object"),
    "dates": (lambda: np.zeros(2, "M8[s]"), r"x must hold numbers .*, got dtype datetime64\[s\]"),
    "dask of objects": (lambda: da.from_array(np.array([{}, {}]), chunks=1), "x must hold numbers .*, got dtype object"),
    "ragged twice": (lambda: [[[1, 2], [3]], [[1], [2]]], r"x cannot be read as an array: .*inhomogeneous"),
    "unknown chunks": (
        make_unknown_chunks,
        r"x is a dask array with unknown chunk sizes, .* Call x\.compute_chunk_sizes\(\)",
    ),
    "sparse tensor": (lambda: torch.ones(2, 2).to_sparse(), "x cannot be read as an array: .*Sparse"),
    "tensor on no device": (lambda: torch.ones(2, device="meta"), "x cannot be read as an array"),
    "list of tensors with gradient": (lambda: [torch.ones(2, requires_grad=True)], "x cannot be read as an array"),
    "masked": (make_masked, r"x is a masked array, .* x\.filled\(0\)"),
    "list of dask arrays": (
        lambda: [da.ones(3), da.ones(3)],
        r"x must be a single dask array, got a list of dask .* dask\.array\.stack",
    ),
    "dask value": (lambda: dask.delayed(1), "x must be a single dask array, got a dask Delayed"),
    "unknown suffix": (lambda: "x.csv", r"must end in \.npy or \.zarr, got '\.csv'"),
}


@pytest.mark.parametrize("bad", BAD)
def test_refused(bad: str) -> None:
    """Anything but an array of numbers with rows is refused, and the message names the port."""
    make, message = BAD[bad]
    with pytest.raises(InputError, match=message):
        Inputs.from_value(make())


@pytest.mark.parametrize(
    ("bad", "cure"),
    [
        (np.float32(1), lambda x: x[None]),
        (torch.tensor(1.0), lambda x: x[None]),
        (1.0, lambda x: [x]),
        (make_masked(), lambda x: x.filled(0)),
        (make_unknown_chunks(), lambda x: x.compute_chunk_sizes()),
        ([da.ones(3), da.ones(3)], da.stack),
    ],
)
def test_cures_work(bad: Any, cure: Callable[[Any], Any]) -> None:
    """The change that a message proposes makes the input valid."""
    with pytest.raises(InputError, match=r"(Pass|Call) .*\."):
        Inputs.from_value(bad)
    assert Inputs.from_value(cure(bad)).n_rows >= 1


def test_file_missing() -> None:
    """A path that does not exist is refused."""
    with pytest.raises(SourceMissing, match=r"nowhere\.npy' does not exist"):
        Inputs.from_value({"a": "nowhere.npy"})


def test_file_of_objects(tmp_path: Path) -> None:
    """A file of pickled objects is refused, and nothing in it is unpickled."""
    np.save(tmp_path / "x.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(InputError, match="Python objects"):
        Inputs.from_value(tmp_path / "x.npy")


def test_dask_is_not_computed() -> None:
    """Inspecting a dask array computes nothing."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("computed")

    with dask.config.set(scheduler=refuse):
        Inputs.from_value({"a": da.ones((4, 3), chunks=2), "b": X}).make_dask_arrays((2, 2))
