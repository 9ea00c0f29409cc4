"""Arrays as NumPy holds them, whatever they were before."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, np.dtype[Any]]

NUMBERS = "biufc"  # NumPy's kinds: bool, int, uint, float, complex


def numpy_of(tensor: torch.Tensor) -> Array:
    """A tensor on any device as an ndarray; bfloat16, which NumPy lacks, as float32."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    array: Array = tensor.cpu().resolve_conj().resolve_neg().numpy()
    return array


def to_numpy(array: Any) -> Array:
    """Anything that a network may take or give as an ndarray; without a copy where that can be."""
    if isinstance(array, torch.Tensor):
        return numpy_of(array)
    if hasattr(array, "__cuda_array_interface__"):  # CuPy
        array = array.get()  # pragma: no cover - needs a GPU
    return np.asarray(array)
