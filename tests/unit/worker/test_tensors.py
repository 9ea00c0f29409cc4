"""Tensors and what else a model may take or return, as NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from daskinfer.worker.tensors import tensor_to_numpy, to_numpy


def test_conjugate_and_negative_views() -> None:
    """Tensors that are only marked as conjugated or negated are resolved."""
    tensor = torch.tensor([1 + 2j])
    assert tensor_to_numpy(tensor.conj()) == 1 - 2j
    assert tensor_to_numpy(tensor.conj().imag) == -2


def test_tensors_of_a_graph_and_of_bfloat16() -> None:
    """A tensor with gradients is detached; bfloat16, which NumPy lacks, becomes float32."""
    tensor = torch.ones(2, requires_grad=True)
    np.testing.assert_array_equal(tensor_to_numpy(tensor * 2), np.full(2, 2, "float32"), strict=True)
    np.testing.assert_array_equal(tensor_to_numpy(tensor.bfloat16()), np.ones(2, "float32"), strict=True)


@pytest.mark.parametrize("value", [np.arange(3.0), torch.arange(3.0), [0.0, 1.0, 2.0]])
def test_anything_is_an_array(value: Any) -> None:
    """Arrays, tensors and lists become ndarrays."""
    np.testing.assert_array_equal(to_numpy(value), [0, 1, 2])


def test_no_copy_if_possible() -> None:
    """An ndarray is returned as it is, and a CPU tensor shares its memory."""
    array, tensor = np.zeros(2), torch.zeros(2)
    assert to_numpy(array) is array
    to_numpy(tensor)[0] = 1
    assert tensor[0] == 1
