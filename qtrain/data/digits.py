"""scikit-learn's handwritten digits: real images that ship inside a dependency, the embedded default.

1,797 images of 8x8 pixels and ten classes: the test part of "Optical Recognition of Handwritten Digits"
(Alpaydin and Kaynak 1998, UCI).
"""

from dataclasses import dataclass

import numpy as np
from sklearn.datasets import load_digits

from qtrain.data.resident import Arrays, ResidentData, no_images
from qtrain.functional.random import SPLIT, permutation

TEST_IMAGES = 360


@dataclass(kw_only=True, eq=False, repr=False)
class Digits(ResidentData):
    """1,437 training and 360 test images (1, 8, 8), divided at random once and for all."""

    name: str = "digits"
    batch_size: int = 64

    def _arrays(self) -> Arrays:
        digits = load_digits()
        # The source counts ink in 4x4 blocks, 0..16; stretched to bytes like any other image.
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        targets = digits.target.astype(np.int64)
        order = permutation(seed=0, epoch=0, n=len(images), stream=SPLIT).numpy()
        test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
        train_images, train_targets = no_images(images) if self._test_only else (images[train], targets[train])
        return Arrays(
            train_images, train_targets, images[test], targets[test], num_classes=10, classes=tuple("0123456789")
        )
