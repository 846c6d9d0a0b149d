"""``fit.compile``: what is asked is done; ``auto`` compiles where that pays by the arithmetic of the config."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

import qtrain
from qtrain.config.compose import compose
from qtrain.data.base import VisionData
from qtrain.pipeline.compilation import (
    COMPILE_EVALUATION_S,
    COMPILE_S,
    SAVED_EVALUATION_S,
    SAVED_S,
    compiles,
    compiles_evaluation,
)
from qtrain.spec import DataInfo

INFO = DataInfo("some", 3, 1, 8, (0.0,), (1.0,), train_size=1000, val_size=0, test_size=0, kind="resident")


def data(batches: int = 8, batch_size: int = 128) -> Any:
    made = Mock(spec=VisionData, info=INFO, batch_size=batch_size)
    made.train_dataloader.return_value = range(batches)
    return made


@pytest.fixture(scope="module")
def student() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 3))
    return qtrain.quantize(network, torch.randn(4, 1, 8, 8))


ROUNDED = 64 + 4 * 64
"""Numbers of one image that the student's two layers read."""

BREAK_EVEN = 2 * COMPILE_S / (SAVED_S * ROUNDED * 1000)
"""Epochs of 1000 images after which two layers have repaid their compilation."""


@pytest.mark.parametrize(("epochs", "expected"), [(0.99, False), (1.01, True)])
def test_auto_compiles_from_where_it_has_paid(
    student: nn.Module, epochs: float, expected: bool, caplog: pytest.LogCaptureFixture
) -> None:
    settings = compose([f"fit.epochs={round(BREAK_EVEN * epochs)}", "trainer=cpu"])
    with caplog.at_level(logging.INFO):
        assert compiles(settings, student, data()) is expected
    (line,) = caplog.messages
    assert ("is compiled" in line) is expected
    assert "numbers rounded" in line and f"compiling 2 layers takes about {2 * COMPILE_S:.0f} s" in line


def test_auto_is_the_default_and_the_quickstart_does_not_compile(student: nn.Module) -> None:
    assert compose([]).fit.compile == "auto"
    assert not compiles(compose(["+experiment=quickstart"]), student, data())


def test_labels_alone_are_few_images(student: nn.Module) -> None:
    """An epoch has no more images than its batches hold."""
    settings = compose([f"fit.epochs={round(BREAK_EVEN * 1.01)}", "trainer=cpu"])
    assert not compiles(settings, student, data(batches=1))


@pytest.mark.parametrize(("asked", "expected"), [("true", True), ("false", False)])
def test_what_is_asked_is_done_whatever_it_costs(student: nn.Module, asked: str, expected: bool) -> None:
    settings = compose([f"fit.compile={asked}", "trainer=cpu", "fit.epochs=1"])
    assert compiles(settings, student, data()) is expected


def test_auto_compiles_neither_full_precision_nor_shards_nor_where_nothing_was_measured(
    student: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = compose([f"fit.epochs={round(BREAK_EVEN * 9)}"])
    caplog.set_level(logging.INFO)
    assert not compiles(settings, nn.Linear(2, 2), data())
    assert not compiles(replace(settings, fit=replace(settings.fit, shard=True)), student, data())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not compiles(settings, student, data())
    reasons = ("nothing is quantized", "spread over processes", "measured on processors alone")
    assert all(reason in line for reason, line in zip(reasons, caplog.messages, strict=True))
    assert compiles(compose([f"fit.epochs={round(BREAK_EVEN * 9)}", "trainer=cpu"]), student, data())


@pytest.mark.parametrize(("epochs", "expected"), [(0.99, False), (1.01, True)])
@pytest.mark.parametrize("asked", ["auto", "true"])
def test_evaluation_is_compiled_from_where_it_has_paid(
    student: nn.Module, asked: str, epochs: float, expected: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Every second epoch evaluates 500 images."""
    images = 2 * COMPILE_EVALUATION_S / (SAVED_EVALUATION_S * ROUNDED)
    settings = compose(
        [
            f"fit.epochs={2 * round(images * epochs / 500)}",
            f"fit.compile={asked}",
            "trainer=cpu",
            "trainer.check_val_every_n_epoch=2",
        ]
    )
    validated = data()
    validated.info = replace(INFO, val_size=500)
    with caplog.at_level(logging.INFO):
        assert compiles_evaluation(settings, student, validated) is expected
    assert caplog.messages[0].startswith(
        f"fit.compile={asked}: the evaluation after each epoch is {'' if expected else 'not '}compiled: "
    )


def test_evaluation_is_not_compiled_where_there_is_none_or_nothing_may_be(
    student: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    """And nothing is said."""
    validated = data()
    validated.info = replace(INFO, val_size=500)
    caplog.set_level(logging.INFO)
    long = ["fit.epochs=1000000", "trainer=cpu"]
    assert compiles_evaluation(compose(long), student, validated)
    caplog.clear()
    assert not compiles_evaluation(compose(long), student, data())
    assert not compiles_evaluation(compose([*long, "fit.compile=false"]), student, validated)
    assert not compiles_evaluation(compose(long), nn.Linear(2, 2), validated)
    assert caplog.messages == []


def test_the_answer_leaves_the_student_as_it_was(student: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    student.train()
    compiles(compose(["trainer=cpu"]), student, data())
    assert all(module.training for module in student.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert not any(module._forward_pre_hooks for module in student.modules())
