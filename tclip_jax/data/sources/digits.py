"""The 1,797 handwritten digits in scikit-learn: real images without a download."""

from __future__ import annotations

import functools

import numpy as np

from tclip_jax.data.prompts import TEMPLATES
from tclip_jax.data.sources.base import Record

_CLASSNAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_NUM_TRAIN = 1400


class Digits:
    """scikit-learn's `load_digits`: 1,400 images in `train` and 397 in `test`, each (8, 8, 3) uint8.

    The images are ordered by the multiplicative hash of their index and then split. The order spreads writers and
    classes over both splits and needs no random number generator.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.
    """

    classnames = _CLASSNAMES
    templates = TEMPLATES["digits"]

    def __init__(self, argument: str, split: str) -> None:
        if argument:
            raise ValueError(f"digits:{argument}: digits takes no argument; write 'digits'")
        if split not in ("train", "test"):
            raise ValueError(f"digits: no split {split!r}; it has train, test")
        images, labels = _load()
        part = slice(None, _NUM_TRAIN) if split == "train" else slice(_NUM_TRAIN, None)
        self._images, self._labels, self._split = images[part], labels[part], split

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Record:
        return Record(self._images[index], (), int(self._labels[index]), f"digits/{self._split}/{index}")


@functools.cache
def _load() -> tuple[np.ndarray, np.ndarray]:
    """Return images (1797, 8, 8, 3) uint8 and labels (1797,) in the order before the split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.argsort(np.arange(len(digits.target), dtype=np.uint64) * 2654435761 % 2**32)
    grey = np.round(digits.images[order] * (255 / 16)).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1), digits.target[order]
