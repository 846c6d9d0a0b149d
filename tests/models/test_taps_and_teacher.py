"""Features by name, eager and compiled; a teacher that answers and never learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from qtrain.models.factory import create_model
from qtrain.models.taps import FeatureTaps, feature_shapes
from qtrain.models.teacher import FrozenTeacher

NAMES = ("layer2", "layer1.0.conv1")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
DATA_MEAN, DATA_STD = (0.4, 0.5, 0.45), (0.25, 0.2, 0.22)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return create_model(name="cifar_resnet8", num_classes=5).eval()


def image(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(n))


def test_features_are_what_the_layers_give(model: nn.Module) -> None:
    x = image()
    conv = model.layer1[0].conv1(model.act1(model.bn1(model.conv1(x))))
    with FeatureTaps(model, NAMES) as taps:
        logits, features = taps.forward_with_features(x)
    assert tuple(features) == NAMES
    assert torch.equal(features["layer1.0.conv1"], conv)
    assert torch.equal(logits, model(x))
    assert torch.equal(model.linear(model.pool(model.layer3(features["layer2"])).flatten(1)), logits)


def test_gradients_flow_through_features(model: nn.Module) -> None:
    with FeatureTaps(model, ["layer1"]) as taps:
        _, features = taps.forward_with_features(image())
    features["layer1"].sum().backward()
    assert model.conv1.weight.grad.abs().sum() > 0
    assert model.layer2[0].conv1.weight.grad is None


def test_closed_taps_leave_the_model_unchanged(model: nn.Module) -> None:
    keys = list(model.state_dict())
    taps = FeatureTaps(model, NAMES)
    model(image())  # an ordinary forward stores nothing
    assert taps._store is None
    assert list(model.state_dict()) == keys
    taps.close()
    assert not any(m._forward_hooks for m in model.modules())


def test_an_interrupted_forward_stores_nothing(model: nn.Module) -> None:
    taps = FeatureTaps(model, NAMES)
    with pytest.raises(RuntimeError):
        taps.forward_with_features(torch.zeros(1, 7, 16, 16))
    assert taps._store is None


def test_compiled_as_a_whole_without_break_or_recompile(model: nn.Module) -> None:
    torch._dynamo.reset()
    taps = FeatureTaps(model, NAMES)
    counter = CompileCounter()
    compiled = torch.compile(taps.forward_with_features, fullgraph=True, backend=counter)
    for seed in (4, 4, 4):
        logits, features = compiled(image(seed))
        eager_logits, eager_features = taps.forward_with_features(image(seed))
        assert torch.equal(logits, eager_logits)
        assert all(torch.equal(features[name], eager_features[name]) for name in NAMES)
    assert counter.frame_count == 1


def test_unknown_and_repeated_names_are_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"no layer 'layer4'; did you mean 'layer"):
        FeatureTaps(model, ["layer4"])
    with pytest.raises(ValueError, match="each name once"):
        FeatureTaps(model, ["layer1", "layer1"])
    model.unused = nn.Identity()
    with pytest.raises(ValueError, match="the forward never calls unused"):
        FeatureTaps(model, ["unused"]).forward_with_features(image())


def test_layer_that_returns_no_tensor_is_refused() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.pair(x)[0]

    with pytest.raises(ValueError, match="pair returns a tuple, not one tensor"):
        FeatureTaps(Net(), ["pair"]).forward_with_features(image())


def test_feature_shapes_change_nothing(model: nn.Module) -> None:
    model.train()
    model.layer1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    shapes = feature_shapes(model, NAMES, (2, 3, 16, 16))
    assert shapes == {"layer2": (2, 32, 8, 8), "layer1.0.conv1": (2, 16, 16, 16)}
    assert model.training and model.layer2.training and not model.layer1.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_teacher_is_frozen_and_unregistered(model: nn.Module) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = FrozenTeacher(model.train(), names=NAMES)

    holder = Holder().train()
    assert not list(holder.parameters()) and not holder.state_dict()
    assert holder.teacher.train() is holder.teacher
    assert not any(m.training for m in model.modules())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = image().requires_grad_()
    logits, features = holder.teacher(x)
    assert not logits.requires_grad and not any(f.requires_grad for f in features.values())
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_teacher_sees_its_own_normalization(model: nn.Module) -> None:
    def normalized(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
        return (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)

    pixels = torch.rand(4, 3, 16, 16)
    teacher = FrozenTeacher(model, mean=MEAN, std=STD, data_mean=DATA_MEAN, data_std=DATA_STD)
    with torch.no_grad():
        expected = model(normalized(pixels, MEAN, STD))
    logits, _ = teacher(normalized(pixels, DATA_MEAN, DATA_STD))
    torch.testing.assert_close(logits, expected)
    equal = FrozenTeacher(model, mean=MEAN, std=STD, data_mean=list(MEAN), data_std=list(STD))
    assert torch.equal(equal(normalized(pixels, MEAN, STD))[0], expected)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"mean": MEAN}, "give all four or none"),
        ({"mean": MEAN, "std": STD, "data_mean": (0.5,), "data_std": (0.2,)}, "of one length"),
        ({"mean": MEAN, "std": (0.0, 1.0, 1.0), "data_mean": MEAN, "data_std": STD}, "must be positive"),
    ],
)
def test_incomplete_normalization_is_refused(model: nn.Module, options: dict, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        FrozenTeacher(model, **options)


def test_teacher_precision_is_its_own(model: nn.Module) -> None:
    x = image()
    exact, _ = FrozenTeacher(model)(x)
    low, features = FrozenTeacher(model, names=["layer1.0.conv1"], bf16=True)(x)
    assert low.dtype == torch.float32
    assert features["layer1.0.conv1"].dtype == torch.bfloat16
    assert 0 < (low - exact).abs().max() < 0.1 * exact.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(FrozenTeacher(model)(x)[0], exact)


def test_teacher_takes_a_memory_format(model: nn.Module) -> None:
    teacher = FrozenTeacher(model, mean=MEAN, std=STD, data_mean=DATA_MEAN, data_std=DATA_STD)
    before, _ = teacher(image())
    assert teacher.to("cpu", memory_format=torch.channels_last) is teacher
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(teacher(image())[0], before)
