"""Which layers read the image, and which give the logits: sets, whatever the order in which they run."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

import qtrain
from qtrain.allocate.manual import Manual
from qtrain.allocate.uniform import Uniform
from qtrain.convert.layers import find_layers
from qtrain.spec import LayerBits, LayerNames
from qtrain.sweep.bit_widths import BitWidths
from qtrain.sweep.first_last_bits import FirstLastBits

X = torch.rand(1, 3, 8, 8)


class Net(nn.Module):
    """Layers of all kinds, and a forward that is a function of them and of the image."""

    def __init__(self, forward: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.function = forward
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in "abcd")
        self.fc, self.fc2, self.bn = nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm2d(3)
        self.table, self.mha = nn.Embedding(3, 3), nn.MultiheadAttention(3, 1, batch_first=True)
        self.gru = nn.GRU(3, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def mean(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def into_slices(m: Net, x: Tensor) -> Tensor:
    """Two heads write into parts of one tensor, after the image was copied into another in place."""
    y = torch.zeros_like(x)
    y[:] = x
    logits = torch.empty(1, 6)
    features = mean(m.a(y))
    logits[:, :3] = m.fc(features)
    logits[:, 3:] = m.fc2(features)
    return logits


def table_first(m: Net, x: Tensor) -> Tensor:
    """A table is looked up, and mapped, before the image is read; its shape alone depends on the image."""
    y = m.fc2(m.table(torch.zeros_like(x[:, 0, 0], dtype=torch.long)))
    return m.fc(mean(m.a(x)) + y.mean(1))


FLOWS: dict[str, tuple[Callable[[Net, Tensor], Tensor], set[str], set[str]]] = {
    "chain": (lambda m, x: m.fc(mean(m.b(m.a(x)))), {"a"}, {"fc"}),
    "two heads": (lambda m, x: (m.fc(y := mean(m.a(x))) + m.fc2(y)) / 2, {"a"}, {"fc", "fc2"}),
    "two stems": (lambda m, x: m.fc(mean(m.a(x) + m.b(x))), {"a", "b"}, {"fc"}),
    "stems of two sizes": (lambda m, x: m.fc(mean(m.a(x)) + mean(m.b(x[:, :, ::2]))), {"a", "b"}, {"fc"}),
    "the image again, later": (lambda m, x: m.fc(mean(m.c(m.b(m.a(x)) + x))), {"a", "c"}, {"fc"}),
    "normalized image": (lambda m, x: m.fc(mean(m.a(m.bn(x - 0.5).relu()))), {"a"}, {"fc"}),
    "convolution as head": (lambda m, x: mean(m.bn(m.b(m.a(x).relu_()))), {"a"}, {"b"}),
    "residual sum as output": (lambda m, x: mean((y := m.a(x)) + m.c(m.b(y).relu())), {"a"}, {"a", "c"}),
    "gate": (lambda m, x: mean(m.b(m.a(x)) * m.fc2(m.fc(mean(m.a(x))))[..., None, None]), {"a"}, {"b", "fc2"}),
    "into slices": (into_slices, {"a"}, {"fc", "fc2"}),
    "in place": (lambda m, x: m.fc(mean(m.a(x).add_(m.b(x)))).add_(m.fc2(mean(x))), {"a", "b", "fc2"}, {"fc", "fc2"}),
    "table first": (table_first, {"a"}, {"fc"}),
    "attention behind": (lambda m, x: m.mha(*[m.a(x).flatten(2).mT] * 3)[0].mean(1), {"a"}, set()),
    "recurrent stem": (lambda m, x: m.fc(m.gru(x.flatten(2).mT)[0][:, -1]), set(), {"fc"}),
    "keyword": (lambda m, x: m.fc(input=mean(m.a(input=x))), {"a"}, {"fc"}),
    "lost on the way": (lambda m, x: torch.tensor(m.fc(torch.tensor(mean(m.a(x)).tolist())).tolist()), {"a"}, {"fc"}),
    "dictionary": (lambda m, x: {"logits": m.fc(y := mean(m.a(x))), "more": [m.fc2(y)]}, {"a"}, {"fc", "fc2"}),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOWS)
def test_first_layers_read_the_image_and_last_ones_give_the_logits(name: str) -> None:
    forward, first, last = FLOWS[name]
    weighted = find_layers(Net(forward).eval(), X).weighted
    assert (weighted.first, weighted.last) == (first, last)


def test_layers_at_the_ends_are_those_of_the_policies_and_of_the_bits() -> None:
    forward, first, last = FLOWS["in place"]
    found = find_layers(Net(forward).eval(), X)
    kinds = {end: {name for name in found.layers if end in found.kinds(name)} for end in ("first", "last")}
    assert kinds == {"first": first, "last": last}
    names = found.weighted
    allocation = Uniform(weight=2, input=2, first=LayerBits(8, 7), last=LayerBits(6, 5))(names)
    assert allocation == {"a": (8, 7), "b": (8, 7), "fc": (6, 5), "fc2": (6, 5)}
    manual = Manual(layers={"b": (3, 3)}, weight=2, input=2, first=LayerBits(8, 8), last=LayerBits(8, 8))(names)
    assert manual == {"a": (8, 8), "b": (3, 3), "fc": (8, 8), "fc2": (8, 8)}


def test_knobs_of_a_sweep_turn_all_layers_at_the_ends() -> None:
    names = LayerNames(["a", "b", "c", "d", "e"], first=["a", "b"], last=["d", "e"])
    assert FirstLastBits(choices=[8]).effect("", {"": 8}, names).bits == dict.fromkeys("abde", (8, 8))
    widths = BitWidths(choices=[2, 4], per="layer")
    assert list(widths.domains(names)) == [".c"]
    assert widths.effect("", {".c": 2}, names).bits == {"c": (2, 2)} | dict.fromkeys("abde", (8, 8))


def test_names_alone_have_their_first_and_last_as_ends() -> None:
    names = LayerNames.of(["a", "b", "c"])
    assert (names.first, names.last, names.ends) == ({"a"}, {"c"}, ("a", "c"))
    assert LayerNames.of(names) is names
    assert (LayerNames().first, LayerNames().last, LayerNames().ends) == (set(), set(), ())


TIMM = {
    "deit_tiny_distilled_patch16_224": ({"img_size": 32, "depth": 1}, 32, {"patch_embed.proj"}, {"head", "head_dist"}),
    "repvgg_a0": ({}, 32, {"stem.conv_1x1.conv", "stem.conv_kxk.conv"}, {"head.fc"}),
    "levit_128s": ({"img_size": 64}, 64, {"stem.conv1.linear"}, {"head.linear", "head_dist.linear"}),
}  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
def test_ends_of_timm_models_keep_their_bits(name: str) -> None:
    options, size, first, last = TIMM[name]
    model = timm.create_model(name, num_classes=10, **options).eval()
    names = find_layers(model, torch.rand(1, 3, size, size)).weighted
    assert (names.first, names.last) == (first, last)
    bits = Uniform(weight=2, input=2, first=LayerBits(8, 8), last=LayerBits(8, 8))(names)
    assert {layer for layer, each in bits.items() if each.weight == 8} == first | last


def test_both_heads_of_a_student_keep_their_bits() -> None:
    forward, _, _ = FLOWS["two heads"]
    student = qtrain.quantize(Net(forward), X.expand(4, 3, 8, 8), weight_bits=2, input_bits=2)
    assert qtrain.describe(student).layers == {"a": (8, 8), "fc": (8, 8), "fc2": (8, 8)}
