"""The keywords of the public functions, as type checkers read them.

Written by ``python -m tests.support.write_types`` from the declarations in ``daskinfer.options``: change those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from daskinfer.options import Options

if TYPE_CHECKING:
    import torch
    from distributed import Client

    from daskinfer.diagnostics.events import Event


class _SharedKeywords(TypedDict, total=False):
    """Keywords that several functions take."""

    batch_size: int | Literal["auto"]
    options: Options | None
    dtype: str | Mapping[str, str] | None
    autocast: Literal["bf16", "fp16"] | None
    preprocess: Callable[..., Any] | None
    postprocess: Callable[..., Any] | None
    output: Any
    pad: bool
    memory_format: Literal["auto", "contiguous", "channels_last"]
    nan_is_failure: bool
    trust: bool


class _ComputingKeywords(TypedDict, total=False):
    """Keywords that several functions take."""

    devices: str | torch.device | Sequence[str | torch.device]
    device_weights: Literal["auto", "even"] | Sequence[float] | Mapping[str, float]
    client: Client | None
    prefetch: int
    on_error: Literal["raise", "skip"]
    fill_value: float | None
    max_failed_rows: int | str | None
    retries: int
    chunk_timeout: float | None
    restart_workers: bool


class _PredictStreamRunKeywords(TypedDict, total=False):
    """Keywords that several functions take."""

    progress: bool | Callable[[Event], Any] | None


class _StoringKeywords(TypedDict, total=False):
    """Keywords that several functions take."""

    overwrite: bool
    shard: tuple[int, int] | None


class PredictKeywords(_SharedKeywords, _ComputingKeywords, _PredictStreamRunKeywords, total=False):
    """All keywords of one function."""


class StreamKeywords(_SharedKeywords, _ComputingKeywords, _PredictStreamRunKeywords, total=False):
    """All keywords of one function."""


class RunKeywords(_SharedKeywords, _ComputingKeywords, _PredictStreamRunKeywords, _StoringKeywords, total=False):
    """All keywords of one function."""


class PlanKeywords(_SharedKeywords, _ComputingKeywords, _StoringKeywords, total=False):
    """All keywords of one function."""

    probe: bool


class MapBlocksKeywords(_SharedKeywords, total=False):
    """All keywords of one function."""
