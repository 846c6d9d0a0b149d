"""The digest of a student's file covers what is written, the index of tensors as well."""

import pytest
import torch

from qtrain.packed.header import Header, Images, Network, Structure, from_bytes, to_bytes


def file() -> bytes:
    """Two tensors of the same type and size under names of the same length."""
    header = Header(
        network=Network("some.builder"), images=Images(size=(1, 2, 2)), structure=Structure(), weights=(), inputs=(),
        layers={}, size_bytes=16,
    )  # fmt: skip
    return to_bytes(header, {"gain": torch.tensor([1.0, 2.0]), "bias": torch.tensor([3.0, 4.0])})[0]


def test_file_gives_its_tensors_under_their_names() -> None:
    header, tensors = from_bytes(file(), "x")
    assert header.network.builder == "some.builder"
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"gain": [1.0, 2.0], "bias": [3.0, 4.0]}


@pytest.mark.parametrize("old, new", [('"gain"', '"pain"'), ('"F32"', '"I32"')])
def test_changed_index_is_refused(old: str, new: str) -> None:
    refused(file().replace(old.encode(), new.encode(), 1))


def test_exchanged_names_of_tensors_are_refused() -> None:
    refused(file().replace(b'"gain":', b'"....":').replace(b'"bias":', b'"gain":').replace(b'"....":', b'"bias":'))


@pytest.mark.parametrize("place", range(16))
def test_each_byte_of_the_payload_is_in_the_digest(place: int) -> None:
    """The payload, 16 bytes, is the end of the file."""
    data = bytearray(file())
    data[len(data) - 16 + place] ^= 1
    refused(bytes(data))


def refused(data: bytes) -> None:
    assert data != file()
    with pytest.raises(ValueError, match=r"^x is damaged"):
        from_bytes(data, "x")
