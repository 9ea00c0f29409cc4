"""Tensors, and whatever else a model takes or returns, as NumPy arrays.

This needs torch, so it does not live beside the array types in ``daskinfer.core.arrays``, which know only NumPy. The model
runner uses it for every micro-batch; planning, the layer above, uses it to read tensors as inputs. Nothing below this
package needs it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from daskinfer.core.arrays import Array


def tensor_to_numpy(tensor: torch.Tensor) -> Array:
    """Return a tensor on any device as an ndarray; bfloat16, which NumPy lacks, becomes float32.

    Examples
    --------
    >>> tensor_to_numpy(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    array([1., 2.], dtype=float32)
    """
    try:
        plain: Array = tensor.numpy()
        return plain  # most tensors end here; the steps below would be half of the cost
    except (RuntimeError, TypeError):
        tensor = tensor.detach()  # on a GPU, part of a graph, conjugated, or of a dtype that NumPy lacks
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    array: Array = tensor.cpu().resolve_conj().resolve_neg().numpy()
    return array


def to_numpy(array: Any) -> Array:
    """Return anything that a model may take or return as an ndarray, without a copy if possible."""
    if isinstance(array, torch.Tensor):
        return tensor_to_numpy(array)
    if hasattr(array, "__cuda_array_interface__"):  # CuPy
        array = array.get()  # pragma: no cover - needs a GPU
    return np.asarray(array)
