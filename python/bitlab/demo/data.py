"""The 1,797 handwritten digits (8 x 8 pixels) that scikit-learn carries, split in three."""

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

TEST_SHARE = 0.25
VALIDATION_SHARE = 0.15  # Of what the test split leaves.
SPLIT_SEED = 1797  # The split is the same for every model and every seed; no choice was made on its test images.
PIXELS = 64
CLASSES = 10
BRIGHTEST = 16


@dataclass(frozen=True)
class Images:
    """Pixels float32 (n, 64) in 0..1; labels int64 (n,)."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def select(self, indices: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> "Images":
        """Some of the images."""
        chosen = torch.from_numpy(indices)
        return Images(self.x[chosen], self.y[chosen])


@dataclass(frozen=True)
class Digits:
    """`train` fits the weights, `validation` draws the training curves, `test` is read once, at the end."""

    train: Images
    validation: Images
    test: Images


def load() -> Digits:
    """Reads and splits the images, each class in equal shares. Nothing is downloaded."""
    raw = load_digits()
    images = Images(torch.from_numpy(raw.data).float() / BRIGHTEST, torch.from_numpy(raw.target).long())
    rest, test = _split(np.arange(len(images)), images, TEST_SHARE)
    train, validation = _split(rest, images, VALIDATION_SHARE)
    return Digits(images.select(train), images.select(validation), images.select(test))


def _split(
    indices: "np.ndarray[tuple[int], np.dtype[np.int64]]", images: Images, share: float
) -> tuple["np.ndarray[tuple[int], np.dtype[np.int64]]", "np.ndarray[tuple[int], np.dtype[np.int64]]"]:
    labels = images.y.numpy()[indices]
    kept, taken = train_test_split(indices, test_size=share, stratify=labels, random_state=SPLIT_SEED)
    return kept, taken
