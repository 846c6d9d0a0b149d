"""The scan of timm: its counter against counts by hand, its choice of models, rows with reasons, and going on."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.pipeline.results import read_results
from tests.helpers.script import load_script


@pytest.fixture(scope="module")
def scan() -> ModuleType:
    return load_script("scan_timm")


X = torch.ones(2, 3, 8, 8)
TOKENS = torch.ones(2, 5, 4)
CALLS: dict[str, tuple[Callable[[], Any], int]] = {
    "grouped convolution": (lambda: nn.Conv2d(3, 6, 3, groups=3)(X), 2 * 36 * 6 * 9),
    "transposed convolution": (lambda: nn.ConvTranspose2d(3, 4, 2, stride=2)(X), 2 * 64 * 3 * 4 * 4),
    "linear": (lambda: nn.Linear(4, 7)(TOKENS), 10 * 28),
    "product": (lambda: TOKENS @ TOKENS.mT, 2 * 25 * 4),
    "attention": (lambda: F.scaled_dot_product_attention(TOKENS, TOKENS, TOKENS), 2 * 2 * 25 * 4),
    "multihead": (lambda: nn.MultiheadAttention(4, 2, batch_first=True)(TOKENS, TOKENS, TOKENS), 2 * (320 + 200)),
    "einsum of three": (lambda: torch.einsum("bnd,bmd,bme->bne", TOKENS, TOKENS, TOKENS), 2 * 2 * 100),
    "lstm": (lambda: nn.LSTM(4, 3, bidirectional=True)(TOKENS), 10 * 2 * 12 * 7),
    "sum": (lambda: TOKENS + TOKENS, 0),
}


@pytest.mark.parametrize("name", CALLS)
def test_counter_gives_the_count_by_hand(scan: ModuleType, name: str) -> None:
    call, expected = CALLS[name]
    with torch.no_grad(), scan.Counter() as counter:
        call()
    assert counter.total == expected


def test_smallest_model_of_a_family_is_found(scan: ModuleType) -> None:
    parameters = sum(parameter.numel() for parameter in timm.create_model("resnet10t", num_classes=10).parameters())
    assert scan.smallest(["resnet50", "resnet18", "resnet10t"]) == ("resnet10t", parameters)
    assert len(scan.families()) > 150


def test_rows_have_counts_and_reasons_and_a_scan_goes_on(
    scan: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def tried(name: str, seconds: float) -> dict[str, Any]:
        asked.append(name)
        return scan.tried(name)

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("of no use")

    monkeypatch.setattr(scan, "in_a_process", tried)
    results = tmp_path / "timm.csv"
    arguments = ["--results", str(results), "--models", "test_resnet", "test_vit", "resnet18", "--parameters", "1e6"]
    assert scan.main([*arguments, "--limit", "1"]) == 0
    assert asked == ["test_resnet"]
    settled = scan._settled
    monkeypatch.setattr(scan, "_settled", lambda name: (Broken(), settled(name)[1]))
    assert scan.main(arguments) == 0
    assert scan.main(arguments) == 0
    assert asked == ["test_resnet", "test_vit"], "each model once"
    first, second, third = read_results(results)
    assert (first["status"], first["reason"]) == ("pass", "")
    assert [row["family"] for row in (first, second, third)] == [
        "resnet/test",
        "vision_transformer/test",
        "resnet/resnet",
    ]
    assert int(first["macs"]) == int(first["independent_macs"]) > 0
    assert int(first["size_bytes"]) < int(first["file_bytes"]) < int(first["fp_size_bytes"])
    assert (second["status"], second["reason"]) == ("fail", "RuntimeError: of no use")
    assert third["status"] == "not tried" and "parameters" in third["reason"]
    assert first["commit"] and first["timm"]
