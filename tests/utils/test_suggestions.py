"""What an error message suggests in place of a word that is not known."""

from __future__ import annotations

import pytest

from qtrain.utils.suggestions import close_matches, did_you_mean

LAYERS = ["conv1", "layer1.conv1", "layer1.conv2", "fc"]


@pytest.mark.parametrize(
    ("word", "most", "hint"),
    [
        ("fcc", 1, "; did you mean 'fc'?"),
        ("layer1.conv", 1, "; did you mean 'layer1.conv2'?"),
        ("layer1.conv", 2, "; did you mean 'layer1.conv2' or 'layer1.conv1'?"),
        ("xyz", 2, ""),
    ],
)
def test_did_you_mean_names_the_nearest_words_or_nothing(word: str, most: int, hint: str) -> None:
    assert did_you_mean(word, LAYERS, most=most) == hint


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (LAYERS, "; there are conv1, layer1.conv1, layer1.conv2, fc"),
        (
            [f"blocks.{number}" for number in range(10)],
            f"; there are {', '.join(f'blocks.{n}' for n in range(8))} and 2 more",
        ),
        ([], "; there are none"),
    ],
)
def test_close_matches_lists_the_first_words_if_none_is_near(words: list[str], hint: str) -> None:
    assert close_matches("xyz", words) == hint


def test_close_matches_suggests_near_words_like_did_you_mean() -> None:
    assert close_matches("fcc", LAYERS) == "; did you mean 'fc'?"
