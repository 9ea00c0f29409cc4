"""The same works with other tools, each as its own documentation has it, two workers of one thread."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from tests.benchmarks.by_hand import Call
from tests.benchmarks.processes import Unavailable
from tests.benchmarks.works import WORKS, Work

_N_WORKERS = 2
_CHUNKS_PER_WORKER = 8  # enough to balance, few enough to cost little
_SPARK_MEMORY = "6g"  # the input, as rows of Java and of Arrow


class Loaded:
    """A network that each worker makes for itself, applied to batches of ndarrays."""

    def __init__(self, name: str) -> None:
        torch.set_num_threads(1)
        self.net = WORKS[name].net()

    def __call__(self, x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(self.net(torch.from_numpy(x)).numpy())

    def in_batches(self, x: np.ndarray, batch_size: int) -> np.ndarray:
        """Apply it batch by batch."""
        return np.concatenate([self(x[i : i + batch_size]) for i in range(0, len(x), batch_size)])


def _chunk_rows(work: Work) -> int:
    """Rows of a chunk: whole batches."""
    batches = -(-work.n_rows // work.batch_size)
    return work.batch_size * -(-batches // (_N_WORKERS * _CHUNKS_PER_WORKER))


@contextlib.contextmanager
def _needs(package: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise Unavailable(f"{package} is not installed here: pip install '.[bench]' ({error})") from None


_loaded: dict[str, Loaded] = {}  # per worker process


def _apply_block(block: np.ndarray, name: str, batch_size: int) -> np.ndarray:
    if name not in _loaded:
        _loaded[name] = Loaded(name)
    return _loaded[name].in_batches(block, batch_size)


@contextlib.contextmanager
def dask(work: Work, x: np.ndarray) -> Iterator[Call]:
    """Plain Dask: ``from_array`` and ``map_blocks`` on a LocalCluster."""
    import dask.array as da
    from distributed import Client, LocalCluster

    logging.getLogger("distributed").setLevel(logging.ERROR)

    def call() -> np.ndarray:
        blocks = da.from_array(x, chunks=(_chunk_rows(work), *work.row_shape))
        chunks = (blocks.chunks[0], *((n,) for n in work.answer_shape))
        changed = {} if blocks.ndim == len(chunks) else {"drop_axis": list(range(1 + len(work.answer_shape), blocks.ndim))}
        answer = blocks.map_blocks(
            _apply_block,
            work.name,
            work.batch_size,
            dtype=np.float32,
            chunks=chunks,
            meta=np.empty((0,) * len(chunks), np.float32),
            **changed,
        )
        return np.asarray(answer.compute())

    with LocalCluster(n_workers=_N_WORKERS, threads_per_worker=1) as cluster, Client(cluster):
        yield call


@contextlib.contextmanager
def daft(work: Work, x: np.ndarray) -> Iterator[Call]:
    """Daft: a class UDF in two processes, over a column of tensors."""
    with _needs("daft"):
        import daft
        import pyarrow as pa

    width = int(np.prod(work.answer_shape))
    returned = daft.DataType.fixed_size_list(daft.DataType.float32(), width)

    class Apply:
        def __init__(self) -> None:
            self.loaded = Loaded(work.name)

        @daft.method.batch(return_dtype=returned, batch_size=work.batch_size)
        def rows(self, column: Any) -> Any:
            answer = self.loaded(_ndarray(column.to_arrow(), work.row_shape))
            return pa.FixedSizeListArray.from_arrays(pa.array(answer.reshape(-1)), width)

    udf = daft.cls(Apply, use_process=True, max_concurrency=_N_WORKERS)()

    def call() -> np.ndarray:
        frame = daft.from_arrow(pa.table({"x": _tensors(x)}))
        answer = frame.select(udf.rows(daft.col("x")).alias("y")).to_arrow()
        return _ndarray(answer["y"].combine_chunks(), work.answer_shape)

    yield call


def _tensors(rows: np.ndarray) -> Any:
    """Rows as Arrow's tensors, without a copy."""
    import pyarrow as pa

    return pa.FixedShapeTensorArray.from_numpy_ndarray(rows)


def _ndarray(column: Any, row_shape: tuple[int, ...]) -> np.ndarray:
    """Arrow's tensors or lists as rows."""
    plain = getattr(column, "storage", column)
    values = plain.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(values, np.float32).reshape(-1, *row_shape)


@contextlib.contextmanager
def ray(work: Work, x: np.ndarray) -> Iterator[Call]:
    """Ray Data: ``map_batches`` with two actors, order kept."""
    with _needs("ray[data]"):
        import ray
        import ray.data

    ray.init(num_cpus=_N_WORKERS, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    rows = _chunk_rows(work)

    class Apply:
        def __init__(self) -> None:
            self.loaded = Loaded(work.name)

        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"y": self.loaded(batch["data"])}

    def call() -> np.ndarray:
        blocks = ray.data.from_numpy([x[i : i + rows] for i in range(0, len(x), rows)])
        answers = blocks.map_batches(
            Apply, compute=ray.data.ActorPoolStrategy(size=_N_WORKERS), batch_size=work.batch_size, batch_format="numpy"
        )
        return np.concatenate([batch["y"] for batch in answers.iter_batches(batch_size=None, batch_format="numpy")])

    try:
        yield call
    finally:
        ray.shutdown()


@contextlib.contextmanager
def spark(work: Work, x: np.ndarray) -> Iterator[Call]:
    """Spark: ``predict_batch_udf`` over a column of arrays, on ``local[2]``."""
    with _needs("pyspark"):
        import pyarrow as pa
        from pyspark.ml.functions import predict_batch_udf
        from pyspark.sql.types import ArrayType, FloatType

    shape, name = work.row_shape, work.name
    udf = predict_batch_udf(
        lambda: _flat(name),
        return_type=ArrayType(FloatType()),
        batch_size=work.batch_size,
        input_tensor_shapes=[list(shape)] if len(shape) > 1 else [[shape[0]]],
    )
    width = int(np.prod(shape))

    def call() -> np.ndarray:
        column = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), width).cast(pa.list_(pa.float32()))
        frame = session.createDataFrame(pa.table({"x": column}))
        return _ndarray(frame.select(udf("x").alias("y")).toArrow()["y"].combine_chunks(), work.answer_shape)

    with _spark_session(_chunk_rows(work)) as session:
        yield call


def _flat(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """A network for Spark, which wants rows of flat arrays back."""
    loaded = Loaded(name)
    return lambda x: loaded(np.ascontiguousarray(x, np.float32)).reshape(len(x), -1)


@contextlib.contextmanager
def _spark_session(chunk_rows: int) -> Iterator[Any]:
    """A session where the driver's rows become tasks of so many rows: each Arrow batch is a task of its own."""
    from pyspark.sql import SparkSession

    if shutil.which("java") is None:
        raise Unavailable("Spark needs java, and there is none on the path")
    os.environ["PYSPARK_PYTHON"] = sys.executable  # its workers would be whatever python3 is on the path
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "spark.driver.memory": _SPARK_MEMORY,
            "spark.driver.maxResultSize": "0",
            "spark.ui.enabled": "false",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.driver.host": "127.0.0.1",
            "spark.local.dir": folder,
            "spark.driver.defaultJavaOptions": f"-Djava.io.tmpdir={folder}",
            "spark.sql.execution.arrow.pyspark.enabled": "true",
            "spark.sql.execution.arrow.maxRecordsPerBatch": str(chunk_rows),
        }
        session = SparkSession.builder.master(f"local[{_N_WORKERS}]").config(map=settings).getOrCreate()
        session.sparkContext.setLogLevel("ERROR")
        try:
            yield session
        finally:
            session.stop()
