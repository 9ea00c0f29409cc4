from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from daskinfer.errors import InputError, SourceMissing
from daskinfer.storage import staging
from daskinfer.storage.formats import (
    Target,
    check_output_path,
    compute_stat_fingerprint,
    is_array_path,
    make_target,
    open_source,
)
from daskinfer.storage.formats import npy as npy_format
from daskinfer.storage.paths import is_part_intact

X = np.arange(24, dtype="float32").reshape(6, 4)
FORMATS = (".npy", ".zarr")
DTYPES = ("bool", "int8", "uint64", "float16", "float32", "float64", "complex64", ">f4", ">i2")


@pytest.fixture(scope="module", autouse=True)
def _zarr_thread(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Start the thread that zarr keeps for the whole process, before a test counts threads."""
    zarr.create_array(tmp_path_factory.mktemp("zarr") / "x", shape=(1,), dtype="f4")[:] = 1


def write(path: Path, array: np.ndarray) -> Path:
    """Save ``array`` in the suffix's format without daskinfer's code."""
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        chunks = tuple(max(1, size // 2) for size in array.shape)
        zarr.create_array(path, shape=array.shape, dtype=array.dtype, chunks=chunks)[...] = array
    return path


def created(path: Path, shape: tuple[int, ...], dtype: Any, unit_rows: int) -> Target:
    """Create an empty output at ``path``, with a run folder beside it."""
    run = staging.create_run_folder(path.with_name("staging"), "run")
    made = make_target(str(path), str(path), str(run), shape, np.dtype(dtype), unit_rows)
    made.create(str(path))
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("suffix", FORMATS)
def test_read(tmp_path: Path, suffix: str, dtype: str) -> None:
    """A source has the file's shape and dtype and gives its rows as a plain array."""
    source = open_source(write(tmp_path / f"x{suffix}", X.astype(dtype)))
    assert (source.shape, source.dtype, source.ndim) == (X.shape, source[:0].dtype, 2)
    assert type(source[2:5]) is np.ndarray
    np.testing.assert_array_equal(source[2:5], X[2:5].astype(dtype), strict=dtype[0] != ">")  # zarr turns bytes about


@pytest.mark.parametrize("suffix", FORMATS)
def test_read_suffix_in_capitals(tmp_path: Path, suffix: str) -> None:
    """The suffix counts in any letter case, the path as text or as a Path, absolute or not."""
    path = tmp_path / f"x{suffix}"
    write(path, X).rename(path.with_suffix(suffix.upper()))
    assert open_source(os.path.relpath(path.with_suffix(suffix.upper()))).path == str(path.with_suffix(suffix.upper()))


def test_read_fortran_order(tmp_path: Path) -> None:
    """A ``.npy`` file in column order is read by rows all the same."""
    np.save(tmp_path / "x.npy", np.asfortranarray(X))
    np.testing.assert_array_equal(open_source(tmp_path / "x.npy")[1:3], X[1:3])


def test_read_zarr_2(tmp_path: Path) -> None:
    """A store of Zarr's format 2 is read."""
    zarr.create_array(tmp_path / "x.zarr", shape=X.shape, dtype="f4", chunks=(4, 3), zarr_format=2)[:] = X
    np.testing.assert_array_equal(open_source(tmp_path / "x.zarr")[:], X)


def test_read_sharded(tmp_path: Path) -> None:
    """A sharded store is read across its shards."""
    zarr.create_array(tmp_path / "x.zarr", shape=X.shape, dtype="f4", chunks=(1, 2), shards=(2, 4))[:] = X
    np.testing.assert_array_equal(open_source(tmp_path / "x.zarr")[1:5], X[1:5])


def test_read_array_in_a_group(tmp_path: Path) -> None:
    """An array inside a group is named by its own path."""
    group = zarr.create_group(tmp_path / "all.zarr")
    group.create_array("x.zarr", shape=X.shape, dtype="f4")[:] = X
    np.testing.assert_array_equal(open_source(tmp_path / "all.zarr" / "x.zarr")[:], X)


@pytest.mark.parametrize("suffix", FORMATS)
def test_source_pickles_small(tmp_path: Path, suffix: str) -> None:
    """A source travels as its path, however large and however much was read."""
    source = open_source(write(tmp_path / f"x{suffix}", np.ones((1000, 100))))
    assert source[:].sum() == 100_000
    pickled = pickle.dumps(source)
    assert len(pickled) < 1000
    assert pickle.loads(pickled)[7:9].sum() == 200


@pytest.mark.parametrize("suffix", FORMATS)
def test_source_missing(tmp_path: Path, suffix: str) -> None:
    """A missing path is refused."""
    with pytest.raises(SourceMissing, match="does not exist"):
        open_source(tmp_path / f"x{suffix}")


def test_source_suffix_unknown() -> None:
    """An unknown suffix is refused, and the known ones are named."""
    with pytest.raises(InputError, match=r"must end in \.npy or \.zarr, got '\.csv'"):
        open_source("x.csv")


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"no array", b"PK\x03\x04" * 9])
def test_npy_broken(tmp_path: Path, content: bytes) -> None:
    """A ``.npy`` file that holds something else is refused."""
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be read: .*\. Save an array of numbers there with numpy\.save\("):
        open_source(tmp_path / "x.npy")


def test_npy_cut_off(tmp_path: Path) -> None:
    """A ``.npy`` file that ends before its last row is refused when it is opened."""
    path = write(tmp_path / "x.npy", X)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(InputError, match="cannot be read"):
        open_source(path)


def test_npy_cut_off_while_it_is_read(tmp_path: Path) -> None:
    """A ``.npy`` file truncated after it was opened fails only for the missing rows, and can be read up to them."""
    source = open_source(path := write(tmp_path / "x.npy", X))
    os.truncate(path, path.stat().st_size - 1)
    np.testing.assert_array_equal(source[:5], X[:5])
    with pytest.raises(InputError, match=r"ends before its last row; it was truncated while it was in use"):
        source[4:6]


def test_npy_gone_while_it_is_read(tmp_path: Path) -> None:
    """A ``.npy`` file that was removed since it was opened is refused by its name."""
    source = open_source(path := write(tmp_path / "x.npy", X))
    path.unlink()
    with pytest.raises(InputError, match=r"x\.npy' cannot be read: .*No such file"):
        source[0:1]


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="maps are counted in /proc")
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_is_not_mapped(tmp_path: Path, order: Literal["C", "F"]) -> None:
    """Rows are read into their own memory: no page of the file stays mapped, and the rows are writable."""
    np.save(tmp_path / "x.npy", np.asarray(X, order=order))
    source = open_source(tmp_path / "x.npy")
    rows = source[1:3]
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert (rows.flags.owndata, rows.flags.writeable) == (True, True)
    np.testing.assert_array_equal(rows, X[1:3])


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    "index", [2, -1, slice(-2, None), slice(5, 2), slice(None, None, 2), slice(4, 99), (slice(1, 3),), (slice(1, 3), 2), ...]
)
def test_npy_index(tmp_path: Path, index: Any, order: Literal["C", "F"]) -> None:
    """A ``.npy`` file is indexed like an array, by whole rows or not."""
    np.save(tmp_path / "x.npy", np.asarray(X, order=order))
    np.testing.assert_array_equal(open_source(tmp_path / "x.npy")[index], X[index])


@pytest.mark.parametrize("shape", [(3, 0), (0, 4), (0,)])
def test_npy_without_numbers(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """A ``.npy`` file of no rows, or of rows of nothing, is read and written."""
    source = open_source(write(tmp_path / "x.npy", np.ones(shape)))
    assert (source[:].shape, source[:2].shape) == (shape, (min(2, shape[0]), *shape[1:]))
    assert created(tmp_path / "y.npy", shape, X.dtype, 1).write(0, np.ones(shape, X.dtype)) == ()


def test_npy_in_many_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more bytes than the system moves in one call are read and written in several, to the last byte."""
    monkeypatch.setattr(npy_format, "_MAX_IO_NBYTES", 7)
    target = created(tmp_path / "y.npy", X.shape, X.dtype, 1)
    target.write(2, X[2:])
    target.write(0, np.asfortranarray(X[:2]))
    np.testing.assert_array_equal(open_source(tmp_path / "y.npy")[1:], X[1:])
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), X)


@pytest.mark.parametrize(
    ("layout", "unit_rows"), [({"chunks": (4, 3)}, 4), ({"chunks": (1, 2), "shards": (2, 4)}, 2), ({"chunks": (6, 4)}, 6)]
)
def test_unit_rows_of_a_store(tmp_path: Path, layout: dict[str, Any], unit_rows: int) -> None:
    """The unit of decoding is a store's chunk, or its shard if it has shards."""
    zarr.create_array(tmp_path / "x.zarr", shape=X.shape, dtype="f4", **layout)[:] = X
    source = open_source(tmp_path / "x.zarr")
    assert (source.unit_rows, pickle.loads(pickle.dumps(source)).unit_rows) == (unit_rows, unit_rows)


def test_unit_rows_of_other_inputs(tmp_path: Path) -> None:
    """Rows of a ``.npy`` file can be read from any position; a store of a single number has no rows."""
    zarr.create_array(tmp_path / "x.zarr", shape=(), dtype="f4")
    assert open_source(tmp_path / "x.zarr").unit_rows is None
    assert open_source(write(tmp_path / "x.npy", X)).unit_rows is None


def test_npy_pickled(tmp_path: Path) -> None:
    """A ``.npy`` file of pickled objects is refused, and nothing in it is unpickled."""
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="Python objects"):
        open_source(tmp_path / "x.npy")


def test_npy_folder(tmp_path: Path) -> None:
    """A folder that is named like a ``.npy`` file is refused."""
    (tmp_path / "x.npy").mkdir()
    with pytest.raises(InputError, match="directory"):
        open_source(tmp_path / "x.npy")


def test_zarr_group(tmp_path: Path) -> None:
    """A group is refused; an array is needed."""
    zarr.create_group(tmp_path / "x.zarr")
    with pytest.raises(InputError, match="Name the array itself, not the group"):
        open_source(tmp_path / "x.zarr")


def test_zarr_empty_folder(tmp_path: Path) -> None:
    """A folder without a store in it is refused."""
    (tmp_path / "x.zarr").mkdir()
    with pytest.raises(InputError, match="cannot be opened as a single Zarr array"):
        open_source(tmp_path / "x.zarr")


@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=3), unit=st.integers(1, 7), suffix=st.sampled_from(FORMATS))
@settings(max_examples=40, deadline=None)
def test_target_round_trip(tmp_path_factory: pytest.TempPathFactory, shape: list[int], unit: int, suffix: str) -> None:
    """Regions written and published in any order are read back, and each part matches its receipt."""
    path, array = tmp_path_factory.mktemp("target") / f"y{suffix}", np.random.default_rng(0).normal(size=shape)
    made, parts = created(path, tuple(shape), array.dtype, unit), []
    for start in reversed(range(0, shape[0], made.unit_rows)):
        rows = array[start : start + made.unit_rows]
        parts += made.publish(pickle.loads(pickle.dumps(made)).write(start, rows))
    np.testing.assert_array_equal(open_source(path)[:], array)
    assert len(parts) == (-(-shape[0] // made.unit_rows) if array.size else 0)
    assert all(is_part_intact(path, part) for part in parts)
    assert all(os.path.exists(file) for file in made.get_file_paths(parts))


@pytest.mark.parametrize("suffix", FORMATS)
def test_target_writes_several_units_at_once(tmp_path: Path, suffix: str) -> None:
    """A chunk of several write-units is as many parts, the last of the output shorter."""
    made = created(tmp_path / f"y{suffix}", X.shape, X.dtype, 4)
    parts = made.publish(made.write(0, X))
    assert [part.name for part in parts] == (["128:192", "192:224"] if suffix == ".npy" else ["c.0.0", "c.1.0"])
    np.testing.assert_array_equal(open_source(tmp_path / f"y{suffix}")[:], X)


@pytest.mark.parametrize("suffix", FORMATS)
def test_target_writes_what_an_empty_output_holds(tmp_path: Path, suffix: str) -> None:
    """Zeros are written as they are, minus zeros too: a chunk that is missing is not one of zeros."""
    made = created(tmp_path / f"y{suffix}", (6,), "f4", 3)
    parts = made.publish([*made.write(0, np.zeros(3, "f4")), *made.write(3, np.full(3, -0.0, "f4"))])
    assert np.signbit(open_source(tmp_path / f"y{suffix}")[:]).tolist() == [False] * 3 + [True] * 3
    assert all(is_part_intact(tmp_path / f"y{suffix}", part) for part in parts)


def test_target_publishes_whole_chunks(tmp_path: Path) -> None:
    """Written chunks are not part of a store until they are published; two attempts at a chunk do not conflict."""
    made = created(tmp_path / "y.zarr", X.shape, X.dtype, 6)
    first, second = made.write(0, X), made.write(0, X)
    assert [path.name for path in (tmp_path / "y.zarr").iterdir()] == ["zarr.json"]
    assert made.publish(second) == made.publish(first)
    assert [path.name for path in Path(made.writable_path).iterdir()] == [staging.FENCE]


def test_target_units_are_zarr_chunks(tmp_path: Path) -> None:
    """A store's chunks are the plan's write-units, each of whole rows."""
    created(tmp_path / "y.zarr", (10, 3), "f4", 4)
    assert zarr.open_array(tmp_path / "y.zarr", mode="r").chunks == (4, 3)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_target_metadata(tmp_path: Path, suffix: str, dtype: str) -> None:
    """The metadata parts and the parts with rows make up the whole output."""
    made = created(tmp_path / f"y{suffix}", X.shape, np.dtype(dtype), 4)
    parts = made.publish(made.write(0, X.astype(dtype)))
    if suffix == ".npy":
        ends = [part.name.split(":") for part in parts]
        assert int(ends[-1][1]) == (tmp_path / "y.npy").stat().st_size
        assert made.metadata_parts[0] == f"0:{ends[0][0]}"
    else:
        assert {p.name for p in (tmp_path / "y.zarr").iterdir()} == {*made.metadata_parts, *(part.name for part in parts)}


def test_target_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The space of a ``.npy`` output is reserved at once; the error names a full disk."""

    def full(descriptor: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"cannot reserve 528 bytes for the output \(No space left on device\): .*y\.npy"):
        created(tmp_path / "y.npy", (100,), "f4", 1)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve space")
def test_target_takes_space(tmp_path: Path) -> None:
    """A ``.npy`` output has its blocks on the disk before a row is written, so that it cannot be full later."""
    created(tmp_path / "y.npy", (1 << 20,), "u1", 1)
    assert (tmp_path / "y.npy").stat().st_blocks * 512 >= 1 << 20


def test_npy_without_fallocate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that cannot reserve space still writes."""
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    created(tmp_path / "y.npy", (3,), "f4", 1).write(1, np.ones(2, "f4"))
    assert np.load(tmp_path / "y.npy").tolist() == [0, 1, 1]


def test_npy_header_is_numpys(tmp_path: Path) -> None:
    """A ``.npy`` output has exactly the bytes that numpy.save writes."""
    made = created(tmp_path / "y.npy", X.shape, X.dtype, 4)
    made.write(0, X)
    np.save(tmp_path / "x.npy", X)
    assert (tmp_path / "y.npy").read_bytes() == (tmp_path / "x.npy").read_bytes()


@pytest.mark.parametrize("suffix", FORMATS)
def test_state(tmp_path: Path, suffix: str) -> None:
    """An array's fingerprint stays the same until the array is written to."""
    path = write(tmp_path / f"x{suffix}", X)
    before = compute_stat_fingerprint(str(path))
    assert compute_stat_fingerprint(str(path)) == before
    if suffix == ".npy":
        os.utime(path, ns=(0, before["mtime_ns"] + 1))
    else:
        zarr.open_array(path, mode="r+")[:1] = 7
    assert compute_stat_fingerprint(str(path)) != before


def test_state_of_zarr_2(tmp_path: Path) -> None:
    """The metadata of either of Zarr's formats counts."""
    zarr.create_array(tmp_path / "x.zarr", shape=(3,), dtype="f4", zarr_format=2)
    before = compute_stat_fingerprint(str(tmp_path / "x.zarr"))
    text = (tmp_path / "x.zarr" / ".zarray").read_text()
    (tmp_path / "x.zarr" / ".zarray").write_text(f"{text} ")
    assert compute_stat_fingerprint(str(tmp_path / "x.zarr"))["metadata"] != before["metadata"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_is_array(tmp_path: Path, suffix: str) -> None:
    """A file that is not in its suffix's format is not an array."""
    assert is_array_path(str(write(tmp_path / f"x{suffix}", X)))
    (tmp_path / f"y{suffix}").write_text("precious")
    assert not is_array_path(str(tmp_path / f"y{suffix}"))


def test_check_path(tmp_path: Path) -> None:
    """A path is returned as absolute, even if a file exists there."""
    (tmp_path / "y.npy").touch()
    assert check_output_path(os.path.relpath(tmp_path / "y.npy")) == str(tmp_path / "y.npy")


def test_check_path_no_folder(tmp_path: Path) -> None:
    """An output in a folder that is missing is refused."""
    with pytest.raises(SourceMissing, match=r"the output's folder .* does not exist"):
        check_output_path(tmp_path / "no" / "y.npy")


def test_check_path_suffix() -> None:
    """An output with an unknown suffix is refused."""
    with pytest.raises(InputError, match=r"the output .* must end in \.npy or \.zarr, got ''"):
        check_output_path("y")
