import pickle
from dataclasses import FrozenInstanceError

import pytest

from daskinfer.core.chunks import Chunk, ChunkStats, RowFailure, StoredPart


def test_a_chunk_counts_its_rows():
    """A chunk holds the rows from start up to, and without, stop."""
    assert Chunk(index=3, start=3072, stop=4096).n_rows == 1024


@pytest.mark.parametrize(
    "record",
    [
        Chunk(0, 0, 1),
        ChunkStats(0, 1, "cuda:0", "<cuda:0>", batch_size=8, seconds=1.0, worker="tcp://worker"),
        StoredPart("0", 8, 1),
        RowFailure(0, 1, "cpu:0", "ValueError: 0"),
    ],
)
def test_records_cross_processes_unchanged(record):
    """Every record survives pickling and cannot be changed."""
    assert pickle.loads(pickle.dumps(record)) == record
    field = next(iter(record.__dataclass_fields__))
    with pytest.raises(FrozenInstanceError, match=field):
        setattr(record, field, None)
