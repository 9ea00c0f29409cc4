"""A file that declares more than fits into memory is refused before it is read; a damaged one is named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

import daskinfer as di
from daskinfer.cli.main import main
from daskinfer.cluster import placement
from daskinfer.errors import InputError
from daskinfer.hardware.discovery import Machine
from daskinfer.planning import build_job
from daskinfer.planning.inputs import Inputs
from daskinfer.storage.formats import open_source

TIB = 1 << 40


@pytest.fixture(scope="module", autouse=True)
def _zarr_thread(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Start the thread that zarr keeps for the whole process, before a test counts threads."""
    zarr.create_array(tmp_path_factory.mktemp("zarr") / "x", shape=(1,), dtype="f4")[:] = 1


def write_npy(path: Path, shape: tuple[int, ...], content: bytes = b"", dtype: str = "<f4", columns: bool = False) -> Path:
    """Write a ``.npy`` file that declares a shape and has this content."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": columns, "shape": shape})
        file.write(content)
    return path


def create_store(path: Path, shape: tuple[int, ...], **layout: Any) -> Path:
    """Create an empty Zarr store that declares a shape and chunks."""
    zarr.create_array(path, shape=shape, dtype="f4", **layout)
    return path


CHUNK = r"a chunk of x \(.*x\.zarr'\) takes 4\.0 TiB \(\(1099511627776,\) float32\) and must be read whole; the smallest"
DECLARED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "chunk": (lambda p: create_store(p, (TIB,), chunks=(TIB,)), CHUNK),
    "chunk beyond its rows": (lambda p: create_store(p, (10,), chunks=(TIB,)), CHUNK),
    "chunk of rows": (lambda p: create_store(p, (10, 8), chunks=(TIB, 4)), r"a chunk of x .* takes 16\.0 TiB"),
    "format 2": (lambda p: create_store(p, (TIB,), chunks=(TIB,), zarr_format=2), CHUNK),
    "shard": (lambda p: create_store(p, (TIB,), chunks=(1024,), shards=(TIB,)), CHUNK),
    "row": (
        lambda p: create_store(p, (9, TIB), chunks=(1, 1024)),
        r"a row of x .* takes 4\.0 TiB .*the smallest device has",
    ),
    "rows": (
        lambda p: create_store(p, (TIB << 8,), chunks=(1024,)),
        r"281,474,976,710,656 rows of 4 B; one call takes at most",
    ),
    "npy": (
        lambda p: write_npy(p, (TIB,)),
        r"declares \(1099511627776,\) float32 \(4\.0 TiB\), but the file has only 128 B",
    ),
    "npy beyond counting": (lambda p: write_npy(p, (1 << 62, 8)), r"declares \(4611686018427387904, 8\) float32"),
    "npy below zero": (lambda p: write_npy(p, (-4,), b"0" * 64), r"declares \(-4,\) float32"),
    "npy in columns": (lambda p: write_npy(p, (TIB, 2), columns=True), r"declares .*8\.0 TiB"),
}


@pytest.mark.parametrize("name", DECLARED)
def test_declared_sizes_are_refused(tmp_path: Path, name: str) -> None:
    """plan, map_blocks and run refuse what no device can hold, and state the size and the memory."""
    make, message = DECLARED[name]
    path = make(tmp_path / f"x.{'npy' if 'npy' in name else 'zarr'}")
    calls = [
        lambda: di.plan(np.sqrt, path),
        lambda: di.map_blocks(np.sqrt, path),
        lambda: di.run(np.sqrt, path, tmp_path / "y.npy", devices="inline"),
    ]
    for call in calls:
        with pytest.raises(InputError, match=message):
            call()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_budget_is_the_smallest_device_that_gets_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk is compared with the memory of the smallest device that gets rows, and the message names both."""
    path = create_store(tmp_path / "x.zarr", (1 << 20,), chunks=(1 << 18,))  # 1 MiB each
    monkeypatch.setattr(placement, "inspect_machine", lambda: Machine(n_cores=2, memory_nbytes=2 << 20))
    with pytest.raises(
        InputError, match=r"takes 1\.0 MiB .*; the smallest device has 921\.6 KiB\. Store it in smaller chunks, or"
    ):
        di.plan(np.sqrt, path, devices="cpu*2")
    assert di.plan(np.sqrt, path, devices="inline", batch_size=64).n_rows == 1 << 20
    # If the devices are wrong too, the memory of this machine is the limit.
    monkeypatch.setattr(build_job, "inspect_machine", lambda: Machine(n_cores=2, memory_nbytes=1 << 19))
    with pytest.raises(di.DaskInferError, match=r"(?s)invalid plan, 2 problems:.*the smallest device has 512\.0 KiB"):
        di.plan(np.sqrt, path, devices="tpu")


def test_arrays_in_memory_are_compared_too() -> None:
    """A broadcast array whose rows are larger than the memory is refused by name."""
    wide = np.broadcast_to(np.float32(0), (3, TIB))
    with pytest.raises(InputError, match=r"a row of image takes 4\.0 TiB \(\(1099511627776,\) float32\)"):
        di.plan(np.sqrt, {"image": wide})


MEASURE = """
import json, resource, sys
import numpy as np
import daskinfer as di
from daskinfer.hardware.discovery import inspect_machine

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

np.save(sys.argv[1], np.ones(100, np.float32))
di.plan(np.sqrt, sys.argv[1], devices="inline")
before, messages = peak(), []
for path in sys.argv[2:]:
    try:
        di.plan(np.sqrt, path, devices="inline")
    except di.DaskInferError as error:
        messages.append(str(error))
print(json.dumps([before, peak(), inspect_machine().memory_nbytes, messages]))
"""


def test_refusing_takes_no_memory(tmp_path: Path) -> None:
    """A process that refuses files of terabytes and a zip bomb uses no more memory than before."""
    bomb = tmp_path / "bomb.npz"
    np.savez_compressed(bomb, x=np.zeros(64 << 20, np.uint8))
    paths = [str(tmp_path / "small.npy"), str(bomb), str(write_npy(tmp_path / "x.npy", (TIB,)))]
    paths += [str(create_store(tmp_path / f"{i}.zarr", (TIB >> i,), chunks=(TIB >> i,))) for i in range(3)]
    done = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, check=True, timeout=120)
    before, after, budget, messages = json.loads(done.stdout)
    assert len(messages) == 5
    assert after - before < 32 << 20
    assert after < 2 * budget


def test_npz_is_refused_with_advice(tmp_path: Path) -> None:
    """A ``.npz`` file is refused by its suffix, and the message says what to do instead."""
    np.savez(tmp_path / "x.npz", x=np.ones(3))
    with pytest.raises(InputError, match=r"must end in \.npy or \.zarr, got '\.npz'\. .*save its arrays one by one"):
        di.plan(np.sqrt, tmp_path / "x.npz")
    done = CliRunner().invoke(main, ["plan", "torch.nn:Identity", str(tmp_path / "x.npz")])
    assert (done.exit_code, "save its arrays one by one" in done.stderr) == (2, True)


@pytest.mark.parametrize("version", [(3, 0), (9, 9)])
def test_npy_of_another_format(tmp_path: Path, version: tuple[int, int]) -> None:
    """A format version that plain numbers do not need is refused."""
    path = write_npy(tmp_path / "x.npy", (1,), b"0000")
    content = path.read_bytes()
    path.write_bytes(content[:6] + bytes(version) + content[8:])
    with pytest.raises(InputError, match=rf"its format version must be 1\.0 or 2\.0, got {version[0]}\.{version[1]}"):
        open_source(path)


def test_npy_with_a_long_header(tmp_path: Path) -> None:
    """Version 2 of the format, whose header may be longer, is read."""
    path = tmp_path / "x.npy"
    with open(path, "wb") as file:
        np.lib.format.write_array_header_2_0(file, {"descr": "<f4", "fortran_order": False, "shape": (3,)})
        file.write(np.arange(3, dtype="f4").tobytes())
    assert open_source(path)[:].tolist() == [0, 1, 2]


def test_npy_headers_with_any_byte_changed(tmp_path: Path) -> None:
    """Whichever byte of a header is changed, the file is either read within its bounds or refused by name."""
    good = write_npy(tmp_path / "x.npy", (4, 2), np.arange(8, dtype="f4").tobytes()).read_bytes()
    for position in range(6, 128):
        for value in (0, 39, 57, 92, 255):
            (tmp_path / "x.npy").write_bytes(good[:position] + bytes([value]) + good[position + 1 :])
            try:
                source = open_source(tmp_path / "x.npy")
                assert source[:].nbytes <= len(good)
            except InputError as error:
                assert "x.npy' cannot be read" in str(error)  # noqa: PT017  # both outcomes are valid


# --- damaged stores


def write_damaged_store(path: Path, layout: dict[str, Any], key: str) -> None:
    """Write a store with checksums, and change one byte of a chunk."""
    array = zarr.create_array(path, shape=(100, 6), dtype="f4", **layout)
    array[:] = np.arange(600, dtype="f4").reshape(100, 6)
    content = bytearray((path / key).read_bytes())
    content[5] ^= 1
    (path / key).write_bytes(content)


CRC = zarr.codecs.Crc32cCodec()


@pytest.mark.parametrize(
    ("layout", "key", "rows"),
    [
        ({"chunks": (10, 6), "compressors": CRC}, "c/3/0", "30:40"),
        ({"chunks": (16, 4), "compressors": CRC}, "c/6/1", "96:100"),
        ({"chunks": (10, 6), "compressors": CRC, "chunk_key_encoding": {"name": "v2", "separator": "."}}, "9.0", "90:100"),
    ],
)
def test_a_flipped_byte_is_named(tmp_path: Path, layout: dict[str, Any], key: str, rows: str) -> None:
    """A flipped byte in a store with checksums ends the call; the error names the store, its chunk and the rows."""
    path = tmp_path / "x.zarr"
    write_damaged_store(path, layout, key)
    message = rf"(?s)chunk \d+ \(rows \d+:\d+\) cannot be read.*x\.zarr' cannot be read in chunk '{key}' \(rows {rows}\): "
    with pytest.raises(di.DaskInferError, match=message + ".*checksum"):
        di.predict(np.sqrt, path, devices="inline", batch_size=5, retries=0)


def test_a_flipped_byte_on_workers(tmp_path: Path, cluster_client: Any) -> None:
    """A worker raises the same error for a damaged chunk."""
    write_damaged_store(tmp_path / "x.zarr", {"chunks": (10, 6), "compressors": CRC}, "c/7/0")
    with pytest.raises(di.DaskInferError, match=r"x\.zarr' cannot be read in chunk 'c/7/0' \(rows 70:80\)"):
        di.run(np.sqrt, tmp_path / "x.zarr", tmp_path / "y.npy", client=cluster_client, retries=0)


def test_a_chunk_that_can_be_read_the_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If all chunks can be read one by one after a failure, the error reports the original failure."""
    source: Any = open_source(create_store(tmp_path / "x.zarr", (4,), chunks=(2,)))
    array = source._open()

    class Once:
        metadata = array.metadata
        n_reads = 0

        def __getitem__(self, index: Any) -> Any:
            self.n_reads += 1
            if self.n_reads == 1:
                raise ValueError("for once")
            return array[index]

    monkeypatch.setattr(source, "_array", Once())
    with pytest.raises(InputError, match=r"x\.zarr' cannot be read: ValueError: for once\. Copy the store again"):
        source[...]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError("short")])
def test_other_errors_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """A failing disk or a lack of memory is no damage of the store: the error is raised unchanged."""
    source: Any = open_source(create_store(tmp_path / "x.zarr", (4,), chunks=(2,)))

    class Failing:
        def __getitem__(self, index: Any) -> Any:
            raise error

    monkeypatch.setattr(source, "_array", Failing())
    with pytest.raises(type(error), match=r"Input/output|short"):
        source[:1]


def test_inputs_of_every_kind_fit(tmp_path: Path) -> None:
    """Arrays, lists and files that fit are accepted."""
    np.save(tmp_path / "x.npy", np.ones((3, 2)))
    for x in (np.ones((3, 2)), [[1.0, 2.0]], tmp_path / "x.npy", create_store(tmp_path / "x.zarr", (3, 2), chunks=(1, 2))):
        Inputs.from_value(x).check_sizes(16)
