"""The handwritten digits: the same as scikit-learn's own, read without importing it."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from qtrain.data import digits


@pytest.mark.parametrize("moved", [False, True], ids=["file", "scikit-learn's function"])
def test_the_table_holds_the_pixels_and_classes_of_scikit_learn(monkeypatch: pytest.MonkeyPatch, moved: bool) -> None:
    """Also with a version of scikit-learn that keeps the file elsewhere."""
    if moved:
        monkeypatch.setattr(digits, "find_spec", lambda name: None)
    table, expected = digits.read_table(), load_digits()
    assert table.shape == (digits.IMAGES, 65)
    assert np.array_equal(table[:, :64], expected.data) and np.array_equal(table[:, 64], expected.target)


def test_the_table_is_read_from_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("scikit-learn was asked")

    monkeypatch.setattr("sklearn.datasets.load_digits", refuse)
    assert len(digits.read_table()) == digits.IMAGES
