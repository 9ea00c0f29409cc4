"""The demo's model: small enough for a CPU, real enough to be right about handwritten digits."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name("digits.safetensors")


class DigitNet(nn.Module):
    """Three small convolutions and two linear layers, from an image of 8 by 8 pixels to the logits of ten digits.

    In evaluation mode the output for a row depends on that row alone; in training mode, which `make_model` returns it in,
    batch normalisation makes it depend on the other rows in the batch.

    Examples
    --------
    >>> import torch
    >>> from daskinfer.demo.net import DigitNet
    >>> DigitNet()(torch.zeros(3, 1, 8, 8)).shape
    torch.Size([3, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),  # (n, 1, 8, 8) -> (n, 16, 8, 8)
            nn.BatchNorm2d(16),
            nn.ReLU(),
            # A stride, not pooling after it: twice the rows per second on one core.
            nn.Conv2d(16, 32, 4, stride=2, padding=1, bias=False),  # (n, 16, 8, 8) -> (n, 32, 4, 4)
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, bias=False),  # (n, 32, 4, 4) -> (n, 32, 4, 4)
            nn.BatchNorm2d(32),
            nn.ReLU(),
        )
        self.head = nn.Sequential(
            nn.Flatten(),  # (n, 32, 4, 4) -> (n, 512)
            nn.Dropout(0.3),
            nn.Linear(512, 64),  # (n, 512) -> (n, 64)
            nn.ReLU(),
            nn.Linear(64, 10),  # (n, 64)  -> (n, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Score each image for each of the ten digits.

        Parameters
        ----------
        images : Tensor, (n, 1, 8, 8) float32
            Brightness from 0 (paper) to 1 (ink).

        Returns
        -------
        Tensor, (n, 10) float32
            Logits; the greatest of a row is the digit that the model reads.

        Examples
        --------
        >>> import torch
        >>> from daskinfer.demo.net import DigitNet
        >>> DigitNet().forward(torch.zeros(3, 1, 8, 8)).dtype
        torch.float32
        """
        return cast(Tensor, self.head(self.features(images)))  # (n, 10) float32


def make_model() -> DigitNet:
    """Build the model with random weights, ready for those of ``digits.safetensors``.

    Returns
    -------
    DigitNet
        On the CPU, in training mode; no file was read.

    Examples
    --------
    >>> from daskinfer.demo.net import make_model
    >>> sum(p.numel() for p in make_model().parameters())
    51194
    """
    return DigitNet()


def make_trained_model() -> DigitNet:
    """Build the model with the weights that come with the package.

    Returns
    -------
    DigitNet
        On the CPU, in evaluation mode.

    Examples
    --------
    >>> import torch
    >>> from daskinfer.demo import digits
    >>> images, labels = digits.load()
    >>> read = make_trained_model()(torch.from_numpy(images[digits.HELD_OUT, None])).argmax(dim=1)
    >>> float((read.numpy() == labels[digits.HELD_OUT]).mean()) > 0.97
    True
    """
    model = make_model()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()
