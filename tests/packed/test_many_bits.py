"""One file of many bits: each width is, bit for bit, the student that was saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qtrain
from qtrain.nn.many_bits import ManyBits
from qtrain.packed.header import OLDEST, VERSION, FileSize, read
from qtrain.packed.load import build_student
from qtrain.packed.narrow import entry_of
from qtrain.packed.save import file_alone
from qtrain.pipeline.student_file import allocation_of
from qtrain.spec import LayerBits
from qtrain.utils.sharing import place_of
from tests.helpers.many_bits import WIDTHS, images, many_bits

BUILDER = "tests.helpers.many_bits.network"


@pytest.fixture(scope="module")
def student() -> ManyBits:
    return many_bits()


@pytest.fixture(scope="module")
def file(student: ManyBits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("many") / "student.safetensors"
    save(student, path)
    return path


def save(student: torch.nn.Module, path: Path) -> FileSize:
    return qtrain.save(student, path, builder=BUILDER, size=(1, 8, 8))


def load(path: Path, bits: int | None = None) -> ManyBits:
    loaded = qtrain.load(path, bits=bits, builders=[BUILDER])
    assert isinstance(loaded, ManyBits)
    return loaded


@pytest.mark.parametrize("bits", WIDTHS)
def test_each_width_gives_the_logits_of_its_student(student: ManyBits, file: Path, bits: int) -> None:
    loaded = load(file, bits)
    assert loaded.bits == bits
    assert torch.equal(loaded(images()), student.at(bits)(images()))
    cost, own = (qtrain.cost(one, images()) for one in (loaded, student.at(bits)))
    assert (cost.size_bytes, cost.bops) == (own.size_bytes, own.bops)


def test_the_width_changes_without_loading_again(student: ManyBits, file: Path) -> None:
    loaded = load(file)
    assert loaded.bits == max(WIDTHS)
    for bits in (2, 8, 4, 2):
        assert qtrain.set_bits(loaded, bits) == bits
        assert torch.equal(loaded(images()), student.at(bits)(images()))


def test_loaded_widths_have_one_weight_in_memory(file: Path) -> None:
    loaded = load(file)
    assert len({place_of(one.get_submodule("3").weight) for one in loaded.students.values()}) == 1


def test_payload_is_the_widest_and_what_the_others_have_of_their_own(student: ManyBits, tmp_path: Path) -> None:
    size = save(student, tmp_path / "many.safetensors")
    alone = qtrain.cost(student.at(8), images()).size_bytes
    norms = 4 * 4 * (4 + 6)  # four vectors of 32 bits of both norms
    steps = 4 * 6 + 3 * 4  # of the weights of one layer, which has 6 channels, and of three inputs
    assert size.file_bytes - size.header_bytes == alone + (len(WIDTHS) - 1) * (norms + steps)


def test_an_entry_of_another_length_is_refused(file: Path) -> None:
    header, tensors = read(file)
    short = {**tensors, entry_of(2): tensors[entry_of(2)][:-1]}
    with pytest.raises(ValueError, match=r"^a width has \d+ bytes of its own, its description says \d+$"):
        build_student(header, short, [BUILDER])


def test_a_loaded_student_is_saved_as_the_same_file(file: Path, tmp_path: Path) -> None:
    save(load(file), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_one_width_alone_is_a_plain_file(student: ManyBits, file: Path, tmp_path: Path) -> None:
    save(student.at(2), tmp_path / "two.safetensors")
    header, _ = read(file)
    two = header.at(2)
    (tmp_path / "alone.safetensors").write_bytes(file_alone(two, load(file).at(2), [BUILDER]))
    for name in ("two", "alone"):
        loaded = qtrain.load(tmp_path / f"{name}.safetensors", builders=[BUILDER])
        assert torch.equal(loaded(images()), student.at(2)(images()))
    assert allocation_of(two) == {"0": LayerBits(8, 8), "3": LayerBits(2, 2), "7": LayerBits(8, 8)}
    assert allocation_of(two) == allocation_of(read(tmp_path / "two.safetensors")[0])


def test_accuracy_in_the_header_of_a_width_is_its_own(file: Path, student: ManyBits, tmp_path: Path) -> None:
    metrics = {"top1": 90.0, "top1/w8": 90.0, "top1/w2": 80.0}
    qtrain.save(student, tmp_path / "m.safetensors", builder=BUILDER, size=(1, 8, 8), metrics=metrics)
    header, _ = read(tmp_path / "m.safetensors")
    assert header.at(2).metrics == {"top1": 80.0}
    assert header.at(8).metrics == {"top1": 90.0}


def test_a_width_that_the_file_lacks_is_refused_in_one_line(file: Path) -> None:
    with pytest.raises(ValueError, match=r"bits: the student has 8, 4, 2 bits, not 3; take one of these$"):
        load(file, 3)


def test_a_file_of_one_width_takes_no_bits(student: ManyBits, tmp_path: Path) -> None:
    save(student.at(4), tmp_path / "four.safetensors")
    with pytest.raises(ValueError, match=r"the student has one width only, so it cannot have 2 bits; leave bits out$"):
        qtrain.load(tmp_path / "four.safetensors", bits=2, builders=[BUILDER])


def test_only_a_file_of_many_bits_has_the_newer_version(student: ManyBits, file: Path, tmp_path: Path) -> None:
    save(student.at(4), tmp_path / "four.safetensors")
    assert read(tmp_path / "four.safetensors")[0].plain()["format_version"] == OLDEST
    assert read(file)[0].plain()["format_version"] == VERSION
