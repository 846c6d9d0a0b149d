import numpy as np
import pytest

from qtrain.utils.bit_text import from_text, to_text


@pytest.mark.parametrize("number", [0, 1, 7, 8, 9, 10_000])
def test_bits_come_back(number: int) -> None:
    bits = np.random.default_rng(number).random(number) < 0.9
    text = to_text(bits)
    assert (from_text(text) == bits).all() and from_text(text).shape == (number,)
    assert len(text) < 60 + number / 8 * 4 / 3


@pytest.mark.parametrize(
    "text", ["", "12", "8:?", "8:AAAA", "x:eJwDAAAAAAE=", to_text(np.ones(9, bool)).replace("9:", "90:")]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="bits"):
        from_text(text)
