"""scikit-learn's handwritten digits: real images that ship inside a dependency, the embedded default.

1,797 images of 8x8 pixels and ten classes: the test part of "Optical Recognition of Handwritten Digits"
(Alpaydin and Kaynak 1998, UCI).
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qtrain.data.resident import Arrays, ResidentData, no_images
from qtrain.functional.random import SPLIT, permutation
from qtrain.utils.checks import check_range

IMAGES = 1797


def read_table() -> NDArray[np.float64]:
    """The file of ``sklearn.datasets.load_digits``, (images, 64 + 1): pixels and, last, the class.

    Read without scikit-learn, whose import takes longer than everything else that a short run does before it trains.
    """
    spec = find_spec("sklearn")
    folders = spec.submodule_search_locations if spec is not None else None
    file = Path(*(folders or ["."])[:1], "datasets", "data", "digits.csv.gz")
    if file.is_file():
        return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits  # a version that keeps the file elsewhere

    digits = load_digits()
    return np.column_stack([digits.data, digits.target])


@dataclass(kw_only=True, eq=False, repr=False)
class Digits(ResidentData):
    """The images (1, 8, 8), divided at random once and for all into ``test_images`` and the others to train on."""

    name: str = "digits"
    batch_size: int = 64
    test_images: int = 360

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("Digits", f"[1, {IMAGES})", test_images=self.test_images)

    def _arrays(self) -> Arrays:
        table = read_table()
        # The source counts ink in 4x4 blocks, 0..16; stretched to bytes like any other image.
        images = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)[..., None]
        targets = table[:, -1].astype(np.int64)
        order = permutation(seed=0, epoch=0, n=len(images), stream=SPLIT).numpy()
        test, train = order[: self.test_images], order[self.test_images :]
        train_images, train_targets = no_images(images) if self._test_only else (images[train], targets[train])
        return Arrays(
            train_images, train_targets, images[test], targets[test], num_classes=10, classes=tuple("0123456789")
        )
