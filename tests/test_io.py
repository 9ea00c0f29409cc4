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

from daskinfer.errors import InputError, OutputExists, SourceMissing
from daskinfer.io import Draft, check_free, open_source
from daskinfer.io import npy as npy_format

X = np.arange(24, dtype="float32").reshape(6, 4)
FORMATS = (".npy", ".zarr")
DTYPES = ("bool", "int8", "uint64", "float16", "float32", "float64", "complex64", ">f4", ">i2")


@pytest.fixture(scope="module", autouse=True)
def _zarr_thread(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Start the thread that zarr keeps for the whole process, before a test counts threads."""
    zarr.create_array(tmp_path_factory.mktemp("zarr") / "x", shape=(1,), dtype="f4")[:] = 1


def write(path: Path, array: np.ndarray) -> Path:
    """Save ``array`` under the suffix's format without any code of ours."""
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        chunks = tuple(max(1, size // 2) for size in array.shape)
        zarr.create_array(path, shape=array.shape, dtype=array.dtype, chunks=chunks)[...] = array
    return path


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
    """A path where nothing lies is refused."""
    with pytest.raises(SourceMissing, match="does not exist"):
        open_source(tmp_path / f"x{suffix}")


def test_source_suffix_unknown() -> None:
    """A suffix that no format has is refused, and the ones that there are named."""
    with pytest.raises(InputError, match=r"ends in '\.csv'; it may end in \.npy or \.zarr"):
        open_source("x.csv")


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"no array", b"PK\x03\x04" * 9])
def test_npy_broken(tmp_path: Path, content: bytes) -> None:
    """A ``.npy`` file that holds something else is refused."""
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be read: .* a \.npy file of numbers is needed"):
        open_source(tmp_path / "x.npy")


def test_npy_cut_off(tmp_path: Path) -> None:
    """A ``.npy`` file that ends before its last row is refused when it is opened."""
    path = write(tmp_path / "x.npy", X)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(InputError, match="cannot be read"):
        open_source(path)


def test_npy_cut_off_while_it_is_read(tmp_path: Path) -> None:
    """A ``.npy`` file that lost rows since it was opened is refused where they are read; those that are there are read."""
    source = open_source(path := write(tmp_path / "x.npy", X))
    os.truncate(path, path.stat().st_size - 1)
    np.testing.assert_array_equal(source[:5], X[:5])
    with pytest.raises(InputError, match=r"ends before its rows do; it was cut off while it was read"):
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
    """What was read lies in memory of its own: no page of the file stays mapped, and rows may be written to."""
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
    """A ``.npy`` file gives whatever an array gives, whole rows or not."""
    np.save(tmp_path / "x.npy", np.asarray(X, order=order))
    np.testing.assert_array_equal(open_source(tmp_path / "x.npy")[index], X[index])


@pytest.mark.parametrize("shape", [(3, 0), (0, 4), (0,)])
def test_npy_without_numbers(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """A ``.npy`` file of no rows, or of rows of nothing, is read and written."""
    source = open_source(write(tmp_path / "x.npy", np.ones(shape)))
    assert (source[:].shape, source[:2].shape) == (shape, (min(2, shape[0]), *shape[1:]))
    npy_format.Target.create(str(tmp_path / "y.npy"), shape, X.dtype, 1).write(0, np.ones(shape, X.dtype))


def test_npy_in_many_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more bytes than the system moves in one call are read and written in several, to the last byte."""
    monkeypatch.setattr(npy_format, "_PART_NBYTES", 7)
    target = npy_format.Target.create(str(tmp_path / "y.npy"), X.shape, X.dtype, 1)
    target.write(2, X[2:])
    target.write(0, np.asfortranarray(X[:2]))
    np.testing.assert_array_equal(open_source(tmp_path / "y.npy")[1:], X[1:])
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), X)


@pytest.mark.parametrize(
    ("layout", "unit_rows"), [({"chunks": (4, 3)}, 4), ({"chunks": (1, 2), "shards": (2, 4)}, 2), ({"chunks": (6, 4)}, 6)]
)
def test_unit_rows_of_a_store(tmp_path: Path, layout: dict[str, Any], unit_rows: int) -> None:
    """What is decoded in one go is a store's chunk, or its shard where it has shards."""
    zarr.create_array(tmp_path / "x.zarr", shape=X.shape, dtype="f4", **layout)[:] = X
    source = open_source(tmp_path / "x.zarr")
    assert (source.unit_rows, pickle.loads(pickle.dumps(source)).unit_rows) == (unit_rows, unit_rows)


def test_unit_rows_of_others(tmp_path: Path) -> None:
    """Rows of a ``.npy`` file are read from anywhere; a store of one number has no rows."""
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
    """A group is refused where an array is needed."""
    zarr.create_group(tmp_path / "x.zarr")
    with pytest.raises(InputError, match="Name the array itself, not the group"):
        open_source(tmp_path / "x.zarr")


def test_zarr_empty_folder(tmp_path: Path) -> None:
    """A folder without a store in it is refused."""
    (tmp_path / "x.zarr").mkdir()
    with pytest.raises(InputError, match="cannot be opened as one Zarr array"):
        open_source(tmp_path / "x.zarr")


@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=3), unit=st.integers(1, 7), suffix=st.sampled_from(FORMATS))
@settings(max_examples=40, deadline=None)
def test_draft_round_trip(tmp_path_factory: pytest.TempPathFactory, shape: list[int], unit: int, suffix: str) -> None:
    """What is written by regions, in any order, is read back, for axes of no length too."""
    path, array = tmp_path_factory.mktemp("draft") / f"y{suffix}", np.random.default_rng(0).normal(size=shape)
    with Draft(str(path), tuple(shape), array.dtype, unit) as target:
        for start in reversed(range(0, shape[0], unit)):
            pickle.loads(pickle.dumps(target)).write(start, array[start : start + unit])
    np.testing.assert_array_equal(open_source(path)[:], array)


@pytest.mark.parametrize("suffix", FORMATS)
def test_draft_keeps_signs_of_zero(tmp_path: Path, suffix: str) -> None:
    """Minus zero is written as it is, though it equals what an unwritten row holds."""
    with Draft(str(tmp_path / f"y{suffix}"), (3,), np.dtype("f4"), 1) as target:
        target.write(0, np.full(3, -0.0, "f4"))
    assert np.signbit(open_source(tmp_path / f"y{suffix}")[:]).all()


def test_draft_units_are_zarr_chunks(tmp_path: Path) -> None:
    """A store's chunks are the plan's write-units, whole rows each."""
    with Draft(str(tmp_path / "y.zarr"), (10, 3), np.dtype("f4"), 4):
        pass
    assert zarr.open_array(tmp_path / "y.zarr", mode="r").chunks == (4, 3)


@pytest.mark.parametrize("suffix", FORMATS)
def test_draft_publishes_at_the_end(tmp_path: Path, suffix: str) -> None:
    """An output appears under its name when it is complete, and leaves nothing else."""
    path = tmp_path / f"y{suffix}"
    with Draft(str(path), (2,), np.dtype("f4"), 1):
        assert not path.exists()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("suffix", FORMATS)
def test_draft_error(tmp_path: Path, suffix: str, kind: type[BaseException]) -> None:
    """After an error nothing is left of an output."""
    with pytest.raises(kind, match="broken"), Draft(str(tmp_path / f"y{suffix}"), (2,), np.dtype("f4"), 1):
        raise kind("broken")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", FORMATS)
def test_draft_removed_meanwhile(tmp_path: Path, suffix: str) -> None:
    """Where somebody removed the unfinished output, nothing hides the error that ends it."""
    draft = Draft(str(tmp_path / f"y{suffix}"), (2,), np.dtype("f4"), 1)
    draft.__enter__()
    next(tmp_path.iterdir()).rename(tmp_path / "elsewhere")
    assert not draft.__exit__(ValueError)


def test_draft_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The space of a ``.npy`` output is taken at once; where the disk is full the error says so and nothing is left."""

    def full(descriptor: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="528 bytes for the output cannot be reserved"):
        Draft(str(tmp_path / "y.npy"), (100,), np.dtype("f4"), 1).__enter__()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve space")
def test_draft_takes_space(tmp_path: Path) -> None:
    """A ``.npy`` output has its blocks on the disk before a row is written, so that it cannot be full later."""
    with Draft(str(tmp_path / "y.npy"), (1 << 20,), np.dtype("u1"), 1):
        assert next(tmp_path.iterdir()).stat().st_blocks * 512 >= 1 << 20


def test_npy_without_fallocate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that cannot reserve space still writes."""
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    npy_format.Target.create(str(tmp_path / "y.npy"), (3,), np.dtype("f4"), 1).write(1, np.ones(2, "f4"))
    assert np.load(tmp_path / "y.npy").tolist() == [0, 1, 1]


@pytest.mark.parametrize("suffix", FORMATS)
def test_draft_never_overwrites(tmp_path: Path, suffix: str) -> None:
    """What appears at the output's path meanwhile stays, and so does the answer, under the name that the error tells."""
    path, draft = tmp_path / f"y{suffix}", Draft(str(tmp_path / f"y{suffix}"), (2,), X.dtype, 1)
    draft.__enter__()
    path.write_text("precious")
    with pytest.raises(OutputExists, match=r"The whole answer lies at .*partial"):
        draft.__exit__(None)
    assert path.read_text() == "precious"
    assert [p.suffix for p in tmp_path.iterdir() if p != path] == [".partial"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_drafts_side_by_side(tmp_path: Path, suffix: str) -> None:
    """Two runs in one process that write the same output do not write into one another's draft."""
    path = str(tmp_path / f"y{suffix}")
    slow, quick = Draft(path, (1,), X.dtype, 1), Draft(path, (1,), X.dtype, 1)
    for number, target in enumerate([slow.__enter__(), quick.__enter__()]):
        target.write(0, np.full(1, number, "f4"))
    quick.__exit__(None)
    with pytest.raises(OutputExists, match="appeared"):
        slow.__exit__(None)
    assert open_source(path)[:].tolist() == [1]


def test_check_free(tmp_path: Path) -> None:
    """A free path comes back absolute."""
    assert check_free(os.path.relpath(tmp_path / "y.npy")) == str(tmp_path / "y.npy")


def test_check_free_taken(tmp_path: Path) -> None:
    """An output that exists is refused, a dangling link too."""
    (tmp_path / "y.npy").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExists, match="nothing is ever overwritten"):
        check_free(tmp_path / "y.npy")


def test_check_free_no_folder(tmp_path: Path) -> None:
    """An output in a folder that is missing is refused."""
    with pytest.raises(SourceMissing, match=r"the output's folder .* does not exist"):
        check_free(tmp_path / "no" / "y.npy")


def test_check_free_suffix() -> None:
    """An output with an unknown suffix is refused."""
    with pytest.raises(InputError, match=r"the output .* ends in ''"):
        check_free("y")
