"""Peers stand beside the student where they are installed, and nothing depends on them. No assertion on time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from qtrain.pipeline.results import read_results
from tests.helpers.script import load_script

TINY = ["--batch", "4", "--rounds", "1", "--steps", "1", "--no-compile", "model=cifar_resnet8", "model.width=0.25"]


@pytest.fixture
def script() -> ModuleType:
    return load_script("bench_peers")


def test_student_and_peer_become_rows_beside_full_precision(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    csv = tmp_path / "bench.csv"
    assert script.main([*TINY, "--peers", "torch_operator", "--results", str(csv)]) == 0
    rows = read_results(csv)
    assert [(row["case"], row["mode"]) for row in rows] == [("full precision", "eager"), *[("student", "eager")] * 2]
    assert [row["name"].split()[0] for row in rows[1:]] == ["qtrain", "torch_operator"]
    assert f"torch_operator {torch.__version__.split('+')[0]}" in rows[2]["name"] and "W4A4" in rows[2]["name"]
    assert not rows[0]["ratio"] and float(rows[1]["ratio"]) > 0 and float(rows[2]["ratio"]) > 0
    assert "learns nothing" in capsys.readouterr().out


def test_a_peer_that_is_missing_and_one_that_fails_are_left_out_with_the_reason(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(model: nn.Module, images: Tensor, bits: int) -> nn.Module:
        raise RuntimeError("no kernels\nfor this")

    broken = replace(script.PEERS["torch_operator"], prepare=fails)
    monkeypatch.setitem(script.PEERS, "torch_operator", broken)
    monkeypatch.setitem(script.PEERS, "brevitas", replace(script.PEERS["brevitas"], package="no-such-package"))
    assert script.main([*TINY, "--peers", "brevitas", "torch_operator"]) == 0
    out = capsys.readouterr().out
    assert "brevitas: not installed; pip install no-such-package" in out
    assert "eager: left out: RuntimeError: no kernels\n" in out


def test_torch_operator_quantizes_every_layer_to_the_range_it_saw(script: ModuleType) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    images = torch.randn(2, 3, 8, 8)
    made = script.torch_operator(model, images, 4)
    layer = made[0]
    assert [type(one).__name__ for one in made] == ["FakeQuantized", "ReLU", "Flatten", "FakeQuantized"]
    step, weight = images.abs().max() / 7, layer.layer.weight
    of_weight = weight.abs().max() / 7
    codes = (images / step).round().clamp(-8, 7) * step
    expected = nn.functional.conv2d(codes, (weight / of_weight).round().clamp(-8, 7) * of_weight)
    torch.testing.assert_close(layer(images), expected)
    made(images).sum().backward()
    assert weight.grad is not None and bool(weight.grad.any())


def test_wrong_overrides_end_in_one_line(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main([*TINY, "--steps", "0"])
    assert capsys.readouterr().err.splitlines()[-1].endswith("argument --steps: must be at least 1, got 0")
    assert script.main([*TINY, "fit.epoch=3"]) == 2
    assert capsys.readouterr().err == "bench_peers: error: unknown key 'fit.epoch'; did you mean 'fit.epochs'?\n"
