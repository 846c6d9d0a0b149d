"""A teacher whose parameters are spread over two ranks answers as one that each has whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from qtrain.models.cifar_resnet import cifar_resnet8
from qtrain.models.sharding import blocks
from qtrain.models.teacher import FrozenTeacher


def names_of(model: nn.Module) -> list[str]:
    named = {id(module): name for name, module in model.named_modules()}
    return [named[id(block)] for block in blocks(model)]


def test_blocks_of_a_residual_network() -> None:
    assert names_of(cifar_resnet8()) == ["layer1.0", "layer2.0", "layer3.0"]


@pytest.mark.parametrize(
    ("name", "first"),
    [("resnet18", "layer1.0"), ("deit_tiny_patch16_224", "blocks.0"), ("mobilenetv3_small_050", "blocks.0.0")],
)
def test_blocks_of_timms_models(name: str, first: str) -> None:
    model = timm.create_model(name)
    found = names_of(model)
    assert found[0] == first and len(found) == len(set(found)) >= 8
    assert not any(a != b and b.startswith(a + ".") for a in found for b in found), "none lies in another"


def test_a_compiled_teacher_is_not_sharded() -> None:
    with pytest.raises(ValueError, match="not compiled"):
        FrozenTeacher(cifar_resnet8(), compile=True, shard=True)


def test_one_rank_keeps_the_model_whole() -> None:
    model = cifar_resnet8()
    teacher = FrozenTeacher(model, shard=True).to("cpu")
    assert teacher.model is model and all(type(parameter) is nn.Parameter for parameter in model.parameters())


def _rank(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = cifar_resnet8().to(memory_format=torch.channels_last)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(rank))
    whole = FrozenTeacher(model, names=["layer2"])
    expected = whole(images)
    mine = FrozenTeacher(model, names=["layer2"], shard=True)
    before = whole.identity()
    mine.to("cpu").to("cpu")
    share = sum(parameter.to_local().numel() for parameter in mine.model.parameters())
    for _ in range(2):
        logits, features = mine(images)
        torch.testing.assert_close(logits, expected[0])
        torch.testing.assert_close(features["layer2"], expected[1]["layer2"])
    held = sum(parameter.numel() for parameter in model.parameters())
    assert 0.4 * held < share < 0.6 * held
    assert mine.identity() == before == whole.identity(), "a cache of answers is that of the whole teacher"
    dist.destroy_process_group()
    Path(folder, f"done{rank}").touch()


@pytest.mark.slow
def test_two_ranks_hold_half_each_and_answer_alike(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    assert {path.name for path in tmp_path.glob("done*")} == {"done0", "done1"}
