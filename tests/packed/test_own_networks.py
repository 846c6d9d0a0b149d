"""Files of networks with tensors of unusual types, places and states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qtrain


class Rotary(nn.Module):
    """Turns pairs of features by complex factors, which are no parameters."""

    def __init__(self, persistent: bool = False) -> None:
        super().__init__()
        self.factors: Tensor
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        angles = torch.linspace(0, 3, 72).reshape(36, 2)
        self.register_buffer("factors", torch.polar(torch.ones(36, 2), angles), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten(2).transpose(1, 2)
        turned = torch.view_as_complex(y.reshape(*y.shape[:-1], 2, 2).contiguous()) * self.factors
        logits: Tensor = self.head(torch.view_as_real(turned).flatten(2).mean(1))
        return logits


def kept_rotary() -> nn.Module:
    return Rotary(persistent=True)


class Double(nn.Module):
    """Its constants need more than 32 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        self.register_buffer("k", torch.linspace(1, 2, 4, dtype=torch.float64) + 1e-9, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = (self.conv(x).mean((2, 3)).double() * self.k * 1e7 % 1).float()
        logits: Tensor = self.head(y)
        return logits


class Transposed(nn.Module):
    """The weight of one layer is that of another, transposed, in the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b, self.head = (
            nn.Conv2d(3, 4, 3), nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 5)
        )  # fmt: skip
        self.b.weight = nn.Parameter(self.a.weight.t())

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.b(self.a(self.conv(x).mean((2, 3)))))
        return logits


@pytest.mark.parametrize("build", [Rotary, kept_rotary, Double, Transposed])
def test_a_file_gives_the_student_bit_for_bit(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.rand(4, 3, 8, 8)
    student = qtrain.quantize(build(), images)
    qtrain.save(student, tmp_path / "x.safetensors", builder=build)
    loaded = qtrain.load(tmp_path / "x.safetensors", builders=[build])
    assert torch.equal(loaded(images), student(images))


class WithState(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))

    def get_extra_state(self) -> object:
        return {"a": 1}

    def set_extra_state(self, state: object) -> None:
        """Nothing is done with it."""


def plain(**_: object) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (plain, {"metrics": {"top1": float("nan")}}, "metrics: top1: must be a finite number, got nan"),
        (plain, {"metrics": {"top1": "good"}}, "metrics: top1: must be a finite number, got 'good'"),
        (plain, {"mean": ["a", "b", "c"]}, "mean: must be a finite number"),
        (plain, {"options": {"act": nn.ReLU}}, "options: act must be a number, a text"),
        (WithState, {}, "_extra_state is a dict; a file has tensors alone"),
    ],
)
def test_what_a_file_cannot_hold_is_named(
    build: Callable[[], nn.Module], options: dict[str, object], message: str, tmp_path: Path
) -> None:
    student = qtrain.quantize(build(), torch.rand(4, 3, 8, 8))
    with pytest.raises(ValueError, match=message) as error:
        qtrain.save(student, tmp_path / "x.safetensors", builder=build, **options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value) and "is not known" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_numbers_of_other_libraries_and_names_that_are_numbers(tmp_path: Path) -> None:
    student = qtrain.quantize(plain(), torch.rand(4, 3, 8, 8))
    qtrain.save(
        student,
        tmp_path / "x.safetensors",
        builder=plain,
        metrics={"top1": torch.tensor(90.5)},  # type: ignore[dict-item]
        mean=torch.full((3,), 0.5),  # type: ignore[arg-type]
        std=[1, 1, 1],
        classes=[0, 1, 2, 3, 4],  # type: ignore[list-item]
    )
    from qtrain.packed.header import read

    header, _ = read(tmp_path / "x.safetensors")
    assert header.metrics == {"top1": 90.5}
    assert (header.images.mean, header.images.classes) == ((0.5, 0.5, 0.5), ("0", "1", "2", "3", "4"))
