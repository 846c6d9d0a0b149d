"""Every kind of convolution and linear layer of timm: rebuilt from its form it gives the same bits."""

from __future__ import annotations

import ast
import pkgutil
import re
from importlib import import_module
from pathlib import Path

import pytest
import timm.layers
import timm.models
import torch
import torch.nn.functional as F
from timm.layers import CondConv2d, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.layers.conv2d_same import Conv2dSame, Conv2dSameExport
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from qtrain.models.layer_kinds import LayerSpec, describe_layer, describe_model, merge_fused_biases


def rebuilt(module: nn.Module, form: LayerSpec, x: torch.Tensor) -> torch.Tensor:
    """What a quantized layer with its quantizers off computes; the converter does the same."""
    weight = module.weight if form.weight_transform is None else form.weight_transform(module.weight)
    if form.kind == "linear":
        return F.linear(x, weight, module.bias)
    padding = module.padding
    if form.pad is not None:
        x, padding = form.pad(x), 0
    return F.conv2d(x, weight, module.bias, module.stride, padding, module.dilation, module.groups)


class Renamed(StdConv2dSame):
    """A subclass that only adds a constructor, as architectures do."""


CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 8, 3, stride=2, padding=1),
    "same by name": nn.Conv2d(4, 8, (3, 5), padding="same", dilation=2),
    "reflect": nn.Conv2d(4, 8, (3, 5), padding=(1, 2), padding_mode="reflect"),
    "circular": nn.Conv2d(4, 8, 3, padding=2, padding_mode="circular", bias=False),
    "same": Conv2dSame(4, 8, (3, 5), stride=2, dilation=2),
    "same for export": Conv2dSameExport(4, 8, 3, stride=2),
    "depthwise same": Conv2dSame(4, 4, 5, stride=2, groups=4),
    "std": StdConv2d(4, 8, 3, stride=2),
    "std same": StdConv2dSame(4, 8, 3, stride=2),
    "std same, static": StdConv2dSame(4, 8, 3, stride=1),
    "scaled std": ScaledStdConv2d(4, 8, 3, groups=2, gamma=1.7),
    "scaled std same": ScaledStdConv2dSame(4, 8, 3, stride=2, eps=1e-3),
    "subclass": Renamed(4, 8, 3, stride=2, bias=True),
}


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_are_rebuilt_bit_for_bit(name: str, size: int) -> None:
    torch.manual_seed(0)
    module = CONVOLUTIONS[name]
    if isinstance(module, ScaledStdConv2d | ScaledStdConv2dSame):
        nn.init.uniform_(module.gain, 0.5, 2.0)
    if isinstance(module, Conv2dSameExport):
        module.pad = None  # it remembers the padding of the first size it saw
    form = describe_layer(module)
    assert isinstance(form, LayerSpec)
    x = torch.randn(2, 4, size, size + 3)
    assert torch.equal(rebuilt(module, form, x), module(x))


@pytest.mark.parametrize("module", [nn.Linear(4, 3), timm.layers.Linear(4, 3, bias=False)])
def test_linears_are_rebuilt_bit_for_bit(module: nn.Module) -> None:
    form = describe_layer(module)
    assert form == LayerSpec("linear")
    x = torch.randn(2, 5, 4)
    assert torch.equal(rebuilt(module, form, x), module(x))


def test_gain_is_the_same_parameter() -> None:
    module = ScaledStdConv2d(4, 8, 3)
    form = describe_layer(module)
    assert isinstance(form, LayerSpec) and form.weight_transform is not None
    assert form.weight_transform.gain is module.gain
    form.weight_transform(module.weight).sum().backward()
    assert module.gain.grad is not None


class OwnForward(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class OwnInnerForward(nn.Conv2d):
    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return super()._conv_forward(x, weight * 2, bias)


def replaced_forward() -> nn.Module:
    module = nn.Linear(2, 2)
    module.forward = lambda x: x  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Embedding(2, 3, max_norm=1.0), "acts on the table"),
        (nn.LSTM(2, 2), "recurrent"),
        (nn.Bilinear(2, 2, 2), "bilinear"),
        (nn.MultiheadAttention(4, 2), "fused attention"),
        (CondConv2d(2, 2, 3), "experts"),
        (nn.LazyConv2d(2, 3), "no shape"),
        (weight_norm(nn.Conv2d(2, 2, 3)), "computed from others"),
        (OwnForward(2, 2, 3), "OwnForward has a forward of its own"),
        (OwnInnerForward(2, 2, 3), "OwnInnerForward has a forward of its own"),
        (replaced_forward(), "replaced on the instance"),
    ],
)
def test_layers_without_form_give_a_reason(module: nn.Module, reason: str) -> None:
    described = describe_layer(module)
    assert isinstance(described, str)
    assert reason in described


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Conv1d(1, 1, 3), "conv1d"),
        (nn.Conv3d(1, 1, 3), "conv3d"),
        (nn.ConvTranspose2d(1, 1, 3), "conv_transpose"),
        (nn.Embedding(2, 3), "embedding"),
    ],
)
def test_other_kinds_have_their_form(module: nn.Module, kind: str) -> None:
    assert describe_layer(module) == LayerSpec(kind)


@pytest.mark.parametrize("module", [nn.ReLU(), nn.BatchNorm2d(3), nn.LayerNorm((2, 3)), nn.EmbeddingBag(2, 3)])
def test_modules_without_matrix_are_none(module: nn.Module) -> None:
    assert describe_layer(module) is None


def test_bare_matrix_in_unknown_module_is_reported() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(2, 2))
    assert isinstance(describe_layer(module), str)


def submodule_classes(parent: type[nn.Module]) -> set[type[nn.Module]]:
    return {parent}.union(*(submodule_classes(child) for child in parent.__subclasses__()))


def import_all_of_timm() -> None:
    """So that ``__subclasses__`` sees every layer; the modules that only warn of a new name are left out."""
    moved = {"factory", "features", "fx_features", "helpers", "hub", "registry"}
    for package in (timm.layers, timm.models):
        for found in pkgutil.iter_modules(package.__path__):
            if not found.ispkg and found.name not in moved:
                import_module(f"{package.__name__}.{found.name}")


def test_timm_has_no_convolution_or_linear_class_unknown_here() -> None:
    import_all_of_timm()
    known = {Conv2dSame, Conv2dSameExport, StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame}
    known.add(timm.layers.Linear)
    found = {
        cls
        for parent in (nn.Conv2d, nn.Linear)
        for cls in submodule_classes(parent)
        if cls.__module__.startswith("timm.") and ("forward" in vars(cls) or "_conv_forward" in vars(cls))
    }
    assert found == known


WEIGHT_READS = re.compile(r"(?:F\.\w+\(\s*\w+,\s*(?:weight=)?|@\s*)self\.(\w+)\.weight")

READERS_OF_WEIGHTS = {
    "beit.Attention.qkv",  # these three: merge_fused_biases
    "eva.EvaAttention.qkv",
    "swin_transformer_v2.WindowAttention.qkv",
    "mobilevit.LinearSelfAttention.qkv_proj",  # only with x_prev, which no classifier of timm's passes
    "efficientvit_msra.NormLinear.linear",  # the rest in fuse(), which rebuilds layers for inference
    "iformer.NormLinear.l",
    "levit.NormLinear.linear",
    "repvit.NormLinear.l",
    "shvit.NormLinear.l",
}


def test_timm_has_no_reader_of_weights_unknown_here() -> None:
    """A parent that uses child.weight itself would bypass a quantized child without a word."""
    found = set()
    for package in (timm.layers, timm.models):
        for file in Path(package.__path__[0]).glob("*.py"):
            source = file.read_text()
            if not WEIGHT_READS.search(source):
                continue
            for cls in ast.parse(source).body:
                if isinstance(cls, ast.ClassDef):
                    text = ast.get_source_segment(source, cls) or ""
                    found |= {f"{file.stem}.{cls.name}.{child}" for child in WEIGHT_READS.findall(text)}
    assert found == READERS_OF_WEIGHTS


SMALLEST = {
    "swinv2_cr_tiny_ns_224": {"img_size": 32, "embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2)},
    "swinv2_tiny_window8_256": {"img_size": 64, "embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2)},
    "beit_base_patch16_224": {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2},
    "eva02_tiny_patch14_224": {"img_size": 28, "embed_dim": 24, "depth": 2, "num_heads": 2},
    "test_vit": {},
    "test_resnet": {},
    "test_efficientnet": {},
    "test_nfnet": {},
    "test_mambaout": {},
    "mobilevit_xxs": {},
}


@pytest.mark.parametrize("name", SMALLEST)
def test_layers_with_a_form_are_called(name: str) -> None:
    """After merging, each layer that would be swapped really runs; and merging changes no bit of the output."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **SMALLEST[name]).eval()
    for key, parameter in model.named_parameters():
        if key.endswith(("q_bias", "v_bias")):
            nn.init.normal_(parameter)
    size = SMALLEST[name].get("img_size", 64)
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        before = model(x)
        refused = {n for n, form in describe_model(model).items() if isinstance(form, str) and "merge" in form}
        merged = merge_fused_biases(model)
        assert refused == set(merged)
        forms = {n for n, form in describe_model(model).items() if isinstance(form, LayerSpec)}
        called: set[str] = set()
        for n in forms:
            model.get_submodule(n).register_forward_hook(lambda *_, n=n: called.add(n))
        assert torch.equal(model(x), before)
    assert set(merged) <= forms == called
    assert bool(merged) == name.startswith(("swinv2_tiny", "beit", "eva02_tiny"))


def test_out_proj_of_torch_attention_is_refused() -> None:
    described = describe_model(nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 4)))
    assert isinstance(described["0.out_proj"], str)
    assert described["1"] == LayerSpec("linear")
