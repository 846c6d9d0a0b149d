"""Bits from a file that a person may have edited."""

from pathlib import Path

import pytest

from qtrain.allocate.from_file import FromFile
from qtrain.spec import LayerBits

LAYERS = ["conv1", "layer1.0.conv1", "fc"]
GOOD = "method: by hand\nlayers:\n  conv1: [8, 8]\n  layer1.0.conv1: [3, 4]\n  fc: [32, 32]\n"


def written(folder: Path, text: str) -> str:
    path = folder / "bits.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_bits_are_those_of_the_file(tmp_path: Path) -> None:
    allocation = FromFile(path=written(tmp_path, GOOD))(LAYERS)
    assert allocation == {"conv1": LayerBits(8, 8), "layer1.0.conv1": LayerBits(3, 4), "fc": LayerBits(32, 32)}


def test_patterns_and_layers_that_are_not_named_are_as_by_hand(tmp_path: Path) -> None:
    path = written(tmp_path, "layers: {layer1.*: [2, 3]}")
    allocation = FromFile(path=path, weight=4, input=5, last=LayerBits(8, 8))(LAYERS)
    assert allocation == {"conv1": LayerBits(4, 5), "layer1.0.conv1": LayerBits(2, 3), "fc": LayerBits(8, 8)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers: [1, 2]", "no mapping 'layers'"),
        ("layers:\n\tconv1: [8, 8]", "is no YAML"),
        ("", "no mapping 'layers'"),
        ("found: 2026-13-45\nlayers: {conv1: [8, 8]}", r"bits\.yaml is no YAML \(month must be in 1\.\.12"),
        ("layers:\n  conv1: [8, 8]\n  fc: [8, 8]\n  conv1: [2, 2]", r"bits\.yaml names conv1 twice"),
        ("layers: &a {conv1: *a}", r"layers\.conv1 must be \[weight, input\] bits"),
        ("layers: {conv1: 8}", r"layers\.conv1 must be \[weight, input\] bits, got 8"),
        ("layers: {conv1: [8, 0]}", r"layers\.conv1\.input must be 1\.\.16 bits"),
        ("layers: {layer1.0.conv: [4, 4]}", r"layers\.layer1\.0\.conv fits no quantizable layer; did you mean"),
    ],
)
def test_what_is_no_allocation_of_the_model_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FromFile(path=written(tmp_path, text))(LAYERS)


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot read nowhere\.yaml"):
        FromFile(path="nowhere.yaml")
