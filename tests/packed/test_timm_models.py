"""Students of timm's architectures come back from their files bit for bit, whatever conversion did to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from qtrain.packed.header import Structure, read
from tests.packed.students import round_trip, student_of, timm_network

ADD = ("quantize.operations.add=8",)
ATTENTION = (*ADD, "quantize.operations.matmul=8", "quantize.operations.softmax=8")
BEFORE, TRAINING = ("quantize.fold=before",), ("quantize.fold=training",)
RESIDUAL = {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]}
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4}


@dataclass(frozen=True)
class Case:
    """A small network of timm, what conversion does to it, and the fields of the file's structure that say so."""

    name: str
    overrides: tuple[str, ...] = ()
    options: dict[str, object] = field(default_factory=dict)
    changed: tuple[str, ...] = ()


CASES = [
    Case("resnet18", ADD, {**RESIDUAL, "adapt_stem": True}, ("operations", "exposed")),
    Case("resnet18", TRAINING, RESIDUAL, ("merged_norms",)),
    Case("mobilenetv3_small_050", BEFORE, {}, ("folded",)),
    Case("test_efficientnet", BEFORE, {}, ("folded",)),
    Case("convnext_atto", ADD, {"dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}, ("operations", "exposed")),
    Case("vit_tiny_patch16_224", ATTENTION, VIT, ("operations", "exposed")),
    Case("deit_tiny_distilled_patch16_224", ATTENTION, VIT, ("operations", "exposed")),
    Case("beit_base_patch16_224", ADD, VIT, ("operations", "exposed", "fused_biases")),
    Case("swin_tiny_patch4_window7_224", ADD, SWIN, ("operations", "exposed")),
    Case("swinv2_tiny_window8_256", (), SWIN, ("fused_biases",)),
    Case("resnetv2_50", BEFORE, {**RESIDUAL, "stem_chs": 8}, ("folded",)),
    Case("test_nfnet"),
    Case("densenet121", BEFORE, {"growth_rate": 4, "block_config": [1, 2, 1, 1]}, ("folded",)),
    Case("mobilenetv2_035", (*BEFORE, "equalize@quantize.equalize=dfq"), {}, ("folded", "relu")),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{'-'.join(case.changed) or 'swapped'}")
def test_file_of_a_timm_model_gives_the_same_logits_and_has_the_counted_bytes(case: Case, tmp_path: Path) -> None:
    network = timm_network(case.name, size=32, **case.options)
    student, images = student_of(network, case.overrides, size=32)
    path = tmp_path / "student.safetensors"
    round_trip(student, path, network, images)
    structure = read(path)[0].structure
    always = {"dtype": "float32"}
    expected = {name for name, value in vars(structure).items() if value != getattr(Structure(**always), name)}
    assert expected == set(case.changed)


def test_gains_of_standardized_weights_that_stay_in_full_precision_are_stored(tmp_path: Path) -> None:
    network = timm_network("test_nfnet", size=32)
    name = "quantize.policies.float"
    overrides = [f"+policy@{name}=policy", f"{name}.kinds=[conv2d]", f"{name}.weight_bits=32"]
    student, images = student_of(network, overrides, size=32)
    path = tmp_path / "student.safetensors"
    round_trip(student, path, network, images)
    assert any(name.endswith("weight_transform.gain") for name in read(path)[1])
