from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from daskinfer.demo import digits, train
from daskinfer.demo.net import WEIGHTS, DigitNet, make_model, make_trained_model


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Give torch one thread: on a busy machine, a second one makes so small a net several times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def net() -> DigitNet:
    """The model with the shipped weights, in evaluation mode."""
    return make_trained_model()


def test_the_weights_fit_the_factory(net: DigitNet) -> None:
    """The shipped weights load strictly into the factory's model, which returns ten float32 logits per row."""
    logits = net(torch.zeros(3, 1, 8, 8))
    assert (logits.shape, logits.dtype) == ((3, 10), torch.float32)


def test_the_files_are_small() -> None:
    """The weights take less than 300 KB and the digits less than 120 KB."""
    assert WEIGHTS.stat().st_size < 300_000
    assert digits.DIGITS_PATH.stat().st_size < 120_000


def test_the_model_reads_digits_it_was_not_trained_on(net: DigitNet) -> None:
    """The shipped weights read over 97 % of the held-out digits, and over 96 % of those with shifts and noise."""
    clean, augmented = train.compute_held_out_accuracy(net)
    assert clean > 0.97
    assert augmented > 0.96


def test_a_row_does_not_depend_on_its_batch(net: DigitNet) -> None:
    """A row's logits are the same, to rounding, alone and among others."""
    images, _ = next(digits.augment(16, seed=3))
    with torch.inference_mode():
        together = net(torch.from_numpy(images))
        alone = torch.cat([net(torch.from_numpy(images[i : i + 1])) for i in range(16)])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)


def test_the_digits_are_those_of_scikit_learn() -> None:
    """The shipped digits are scikit-learn's, scaled to 0..1, in their order."""
    images, labels = digits.load()
    original = load_digits()
    np.testing.assert_array_equal(images, original.images.astype(np.float32) / 16)
    np.testing.assert_array_equal(labels, original.target)
    assert (images.dtype, labels.dtype) == (np.float32, np.int64)


def test_the_digits_can_be_rebuilt(tmp_path: Path) -> None:
    """Rebuilding the digits from scikit-learn gives the shipped array."""
    train.rebuild_digits(tmp_path / "digits.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "digits.npy"), np.load(digits.DIGITS_PATH))


def test_the_split_is_disjoint_and_complete() -> None:
    """Every digit is either trained on or held out, no image is in both, and both show all ten digits."""
    images, labels = digits.load()
    rows = [set(range(1797)[part]) for part in (digits.TRAINED, digits.HELD_OUT)]
    seen = [{image.tobytes() for image in images[part]} for part in (digits.TRAINED, digits.HELD_OUT)]
    assert not rows[0] & rows[1]
    assert len(rows[0] | rows[1]) == 1797
    assert not seen[0] & seen[1]
    assert set(labels[digits.TRAINED]) == set(labels[digits.HELD_OUT]) == set(range(10))


def test_training_draws_from_its_split_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training gives the same weights when every held-out digit is replaced by nonsense."""
    images, labels = digits.load()
    before = train.train(steps=3).state_dict()
    images[digits.HELD_OUT], labels[digits.HELD_OUT] = np.nan, 0
    monkeypatch.setattr(digits, "load", lambda: (images, labels))
    after = train.train(steps=3).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_made_digits_come_from_held_out_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise, every made digit is a held-out one of its label, shifted by at most a pixel."""
    monkeypatch.setattr(digits, "NOISE_STD", 0)
    images, labels = (array[digits.HELD_OUT] for array in digits.load())  # (360, 8, 8), (360,)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    allowed = {
        (padded[i, y : y + 8, x : x + 8].tobytes(), labels[i]) for i in range(360) for y in range(3) for x in range(3)
    }
    made, made_labels = next(digits.augment(2_000, seed=1))
    assert {(image.tobytes(), label) for image, label in zip(made, made_labels, strict=True)} <= allowed


def test_made_digits_are_images() -> None:
    """Made digits are float32 images of 0..1 with int64 labels of all ten digits."""
    images, labels = next(digits.augment(1_000, seed=0))
    assert (images.shape, images.dtype, labels.dtype) == ((1_000, 1, 8, 8), np.float32, np.int64)
    assert (images.min(), images.max()) == (0, 1)
    assert set(labels) == set(range(10))


def test_the_seed_decides() -> None:
    """The same seed makes the same rows, and another seed makes others."""
    first, again, other = (next(digits.augment(100, seed))[0] for seed in (7, 7, 8))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_block_can_be_made_alone() -> None:
    """The second block is the same when drawn without the first, and fewer rows are the beginning of more."""
    blocks = list(digits.augment(25_000, seed=5))
    alone, labels = digits.draw(digits.HELD_OUT, digits.BLOCK_ROWS, np.random.default_rng([5, 1]))
    np.testing.assert_array_equal(blocks[1][0], alone)
    np.testing.assert_array_equal(blocks[1][1], labels)
    assert [len(images) for images, _ in blocks] == [10_000, 10_000, 5_000]
    np.testing.assert_array_equal(next(digits.augment(12, seed=5))[0], blocks[0][0][:12])


@pytest.mark.parametrize("n_rows", [0, 1, 5_000, 12_345])
def test_the_store_reads_back(tmp_path: Path, n_rows: int) -> None:
    """A written store is a Zarr v3 array in regular chunks that holds the made rows, with their labels."""
    labels = digits.write(tmp_path / "digits.zarr", n_rows, seed=2)
    array = zarr.open_array(tmp_path / "digits.zarr", mode="r")
    assert (array.metadata.zarr_format, array.shape) == (3, (n_rows, 1, 8, 8))
    assert (array.dtype, array.chunks) == (np.float32, (digits.CHUNK_ROWS, 1, 8, 8))
    blocks = list(digits.augment(n_rows, seed=2))
    for i, (images, block_labels) in enumerate(blocks):
        rows = slice(i * digits.BLOCK_ROWS, (i + 1) * digits.BLOCK_ROWS)
        np.testing.assert_array_equal(array[rows], images)
        np.testing.assert_array_equal(labels[rows], block_labels)
    assert (len(labels), labels.dtype) == (n_rows, np.int64)


def test_a_store_is_not_overwritten(tmp_path: Path) -> None:
    """Writing to an existing array is refused and does not change it."""
    digits.write(tmp_path / "digits.zarr", 3, seed=0)
    before = zarr.open_array(tmp_path / "digits.zarr", mode="r")[:]
    with pytest.raises(ValueError, match="array exists"):
        digits.write(tmp_path / "digits.zarr", 3, seed=1)
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "digits.zarr", mode="r")[:], before)


def test_training_learns_and_repeats() -> None:
    """A short training is far better than guessing, is the same twice, and leaves torch's random state alone."""
    state = torch.get_rng_state()
    first, again = train.train(steps=60), train.train(steps=60)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters(), strict=True))
    assert train.compute_held_out_accuracy(first)[0] > 0.5


def test_the_script_writes_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The training script prints the accuracy and writes weights that load strictly."""
    monkeypatch.setattr(sys, "argv", ["train", "--steps", "2", "--folder", str(tmp_path)])
    runpy.run_path(train.__file__, run_name="__main__")
    make_model().load_state_dict(load_file(tmp_path / "digits.safetensors"), strict=True)
    assert "% right" in capsys.readouterr().out
