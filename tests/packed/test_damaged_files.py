"""Six hundred damaged, foreign and hostile files: one line each, and no code of theirs runs."""

from __future__ import annotations

import io
import itertools
import json
import random
import re
import resource
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_tensors
from torch import nn

from qtrain.packed.header import KEY, OLDEST, VERSION, read, to_bytes
from qtrain.packed.load import load_student
from tests.packed.hostile import HOSTILE, HUGE, Edit, setting
from tests.packed.students import EVERYWHERE, IMAGES, saved, student_of, timm_network

LARGE = 256 << 20
"""Bytes that no file may make the process grow by; the student itself has some thousands."""

HEADER_AT = 8
"""Where the JSON of a safetensors file begins."""

NETWORK = timm_network("cifar_resnet8", size=8, classes=5, width=0.25)

Damaged = Iterator[bytes]


@pytest.fixture(scope="module")
def student_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student each for the kinds of storage that decode with more than codes and a scale."""
    folder, files = tmp_path_factory.mktemp("students"), {}
    for weight, inputs in (("lsq", "outlier"), ("pruned", "lsq"), ("vsq", "vsq"), ("kmeans", "lsq")):
        overrides = [f"quantizer@quantize.weight={weight}", f"quantizer@quantize.input={inputs}", *EVERYWHERE]
        student, _ = student_of(NETWORK, overrides)
        files[weight] = folder / f"{weight}.safetensors"
        saved(student, files[weight], NETWORK, IMAGES)
    return files


@pytest.fixture
def traps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the Python path with a module ``trap``, which leaves a file ``sprung`` when it is imported."""
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w').close()\nrun = Quantizer = dict\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)  # where `touch sprung` of a shell would leave it
    yield tmp_path
    assert not (tmp_path / "sprung").exists(), "code of the file was run"
    assert "trap" not in sys.modules


def refused(path: Path, data: bytes, label: object) -> str:
    """The one line that loading a file of ``data`` ends in."""
    path.write_bytes(data)
    before = peak_memory()
    with pytest.raises(ValueError) as caught:
        load_student(path)
    line = str(caught.value)
    assert line.startswith(str(path)), label
    assert line.isprintable() and len(line) < 600, (label, line)
    assert peak_memory() - before < LARGE, label
    return line


def peak_memory() -> int:
    """The most bytes that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def parts(data: bytes) -> tuple[dict[str, Any], int]:
    """The index of a safetensors file, and where its payload begins."""
    start = HEADER_AT + int.from_bytes(data[:HEADER_AT], "little")
    return json.loads(data[HEADER_AT:start]), start


def truncated(data: bytes, draw: random.Random) -> Damaged:
    for length in (0, 1, 7, 8, 9, len(data) - 1, *(draw.randrange(len(data)) for _ in range(44))):
        yield data[:length]


def flipped_in_the_header(data: bytes, draw: random.Random) -> Damaged:
    _, start = parts(data)
    for _ in range(100):
        yield flipped(data, draw.randrange(start), draw)


def flipped_in_the_payload(data: bytes, draw: random.Random) -> Damaged:
    _, start = parts(data)
    for _ in range(60):
        yield flipped(data, draw.randrange(start, len(data)), draw)


def flipped(data: bytes, place: int, draw: random.Random) -> bytes:
    return data[:place] + bytes([data[place] ^ draw.randrange(1, 256)]) + data[place + 1 :]


def swapped(data: bytes, draw: random.Random) -> Damaged:
    while True:
        first, second = sorted(draw.sample(range(len(data)), 2))
        changed = bytearray(data)
        changed[first], changed[second] = changed[second], changed[first]
        if changed != data:
            yield bytes(changed)


def appended(data: bytes, draw: random.Random) -> Damaged:
    for length in (1, 2, 7, 8, 64, 4096):
        yield data + draw.randbytes(length)
        yield data + bytes(length)
        yield draw.randbytes(length) + data


def noise(data: bytes, draw: random.Random) -> Damaged:
    for length in (1, 2, 8, 9, 16, 100, 1000, 100_000):
        yield draw.randbytes(length)
        yield bytes(length)
        yield b"\xff" * length


def foreign(data: bytes, draw: random.Random) -> Damaged:
    tensors = {"weight": torch.ones(2, 3)}
    yield save_tensors(tensors)
    yield save_tensors({})
    yield save_tensors(tensors, {"format": "pt"})
    for metadata in ("", "{", "null", "[]", "{}", "7", '"text"', '{"student": {}}', '{"sha256": "", "student": null}'):
        yield save_tensors(tensors, {KEY: metadata})
    yield save_tensors(tensors, {KEY: "[" * 100_000})
    yield save_tensors(tensors, {KEY: '{"student": ' + '{"a":' * 600 + "1" + "}" * 601 + "}"})
    yield save_tensors(tensors, {KEY: '{"sha256": "", "student": {"format_version": 2, "x": NaN}}'})
    yield save_tensors(tensors, {KEY: '{"sha256": "", "student": {"format_version": ' + "9" * 5000 + "}}"})
    for made in (lambda file: torch.save(tensors, file), lambda file: np.savez(file, weight=np.ones(3))):
        file = io.BytesIO()
        made(file)
        yield file.getvalue()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("student.safetensors", data)
    yield file.getvalue()
    yield b"\x89PNG\r\n\x1a\n" + bytes(64)
    yield b"{}"
    yield json.dumps({"__metadata__": {KEY: "{}"}}).encode()
    yield (2**63).to_bytes(8, "little") + b"{}"
    yield (2).to_bytes(8, "little") + b"{}"
    yield (99).to_bytes(8, "little") + b"{}"


KINDS: dict[str, tuple[int, Callable[[bytes, random.Random], Damaged], str]] = {
    "truncated": (50, truncated, r"is damaged"),
    "flipped in the header": (100, flipped_in_the_header, r"is damaged|is no student's file|has version"),
    "flipped in the payload": (60, flipped_in_the_payload, r"is damaged or was changed"),
    "swapped": (40, swapped, r"is damaged|is no student's file"),
    "appended": (18, appended, r"is damaged"),
    "noise": (24, noise, r"is damaged or no safetensors file"),
    "foreign": (25, foreign, r"is damaged|is no student's file|has version"),
}
"""Kind of damage -> how many files, what makes them, and what the line says."""

VERSIONS = (VERSION + 1, 10**9, 2.0, "1", None, True, [1])
WRONG = (None, True, -1, 1.5, HUGE, "x", [], {}, [[]], "qtrain.spec.QuantSpec")
MUTATED = 100
"""Files with one wrong value somewhere in their description."""


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_file_ends_in_one_line(kind: str, student_files: dict[str, Path], traps: Path) -> None:
    count, damage, says = KINDS[kind]
    made = damage(student_files["lsq"].read_bytes(), random.Random(kind))
    files = list(itertools.islice(made, count))
    assert len(files) == count
    for number, damaged in enumerate(files):
        line = refused(traps / "x.safetensors", damaged, (kind, number))
        assert re.search(says, line), (kind, number, line)


@pytest.mark.parametrize("version", VERSIONS, ids=repr)
def test_file_of_another_version_says_to_update(version: object, student_files: dict[str, Path], traps: Path) -> None:
    damaged = recomputed(student_files["lsq"], lambda plain, _: plain.update(format_version=version))
    line = refused(traps / "x.safetensors", damaged, version)
    assert re.search(r"has version .* of the format, this qtrain reads 2 and 3; update qtrain", line)


def test_file_of_an_older_version_says_to_write_it_anew(student_files: dict[str, Path], traps: Path) -> None:
    damaged = recomputed(student_files["lsq"], lambda plain, _: plain.update(format_version=OLDEST - 1))
    line = refused(traps / "x.safetensors", damaged, "older")
    assert line.endswith(f"has version {OLDEST - 1} of the format, this qtrain reads 2 and 3; write it anew")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_description_is_refused_before_it_does_anything(
    name: str, student_files: dict[str, Path], traps: Path
) -> None:
    case = HOSTILE[name]
    line = refused(traps / "x.safetensors", recomputed(student_files[case.weights], case.edit), name)
    assert re.search(case.says, line), line


def test_one_wrong_value_in_a_description_is_refused_or_does_not_matter(
    student_files: dict[str, Path], traps: Path
) -> None:
    draw, path, loaded = random.Random(0), traps / "x.safetensors", []
    for number in range(MUTATED):
        file = draw.choice([*student_files.values()])
        places = list(paths(described(file)))
        place, value = draw.choice(places), draw.choice(WRONG)
        path.write_bytes(recomputed(file, setting(*place, to=value)))
        before = peak_memory()
        try:
            assert isinstance(load_student(path), nn.Module)
            loaded.append(place)
        except ValueError as error:
            assert str(error).isprintable() and str(error).startswith(str(path)), (number, place, value)
        assert peak_memory() - before < LARGE, (number, place, value)
    # What nothing is built from: names, accuracies, and options that are the same in another spelling.
    assert len(loaded) < MUTATED / 3, loaded


def recomputed(file: Path, edit: Edit) -> bytes:
    """``file`` with ``edit`` done to its description and tensors, and with the digest of what has come out."""
    plain, (_, tensors) = described(file), read(file)
    size = plain["size_bytes"]
    edit(plain, tensors)
    if plain.get("size_bytes") == size:
        plain["size_bytes"] = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    header: Any = SimpleNamespace(plain=lambda: plain)
    return to_bytes(header, tensors)[0]


def described(file: Path) -> dict[str, Any]:
    """The description in ``file``, as JSON holds it."""
    plain: dict[str, Any] = json.loads(json.dumps(read(file)[0].plain()))
    return plain


def paths(plain: Any, *above: str | int) -> Iterator[tuple[str | int, ...]]:
    """The places of all values inside ``plain``."""
    inside = plain.items() if isinstance(plain, dict) else enumerate(plain) if isinstance(plain, list) else ()
    for key, value in inside:
        yield (*above, key)
        yield from paths(value, *above, key)


def test_who_admits_qtrain_admits_no_function_that_calls_what_the_file_names(
    student_files: dict[str, Path], traps: Path
) -> None:
    hostile = {"builder": "qtrain.models.own.build_own", "options": {"builder": "trap.run"}}
    path = traps / "x.safetensors"
    path.write_bytes(recomputed(student_files["lsq"], setting("network", to=hostile)))
    with pytest.raises(ValueError, match=r"its network: qtrain.models.own.build_own builds no network of students"):
        load_student(path, builders=["qtrain"])
