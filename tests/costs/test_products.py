"""Every product counts, whichever kernel torch takes for it, and a layer that is not counted is refused."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import flop_registry

import qtrain
from qtrain.costs.count import OUTSIDE_LAYERS, count
from qtrain.costs.products import count_products


def macs(model: nn.Module, x: Tensor) -> dict[str, int]:
    return {row.name: row.macs for row in count(model.eval(), x).layers}


class SelfAttention(nn.Module):
    """64 tokens of 16 channels, two heads."""

    def __init__(self, *, weights: bool, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=batch_first)
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.weights)[0]


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_counts_four_projections_and_two_products(weights: bool, batch_first: bool) -> None:
    x = torch.rand(1, 64, 16) if batch_first else torch.rand(64, 1, 16)
    model = SelfAttention(weights=weights, batch_first=batch_first).eval()
    own, outside = count_products(model, x)
    images = x.shape[0]
    assert sum(own.values()) + outside == 196_608 // images
    assert 4 * 64 * 16**2 + 2 * 64**2 * 16 == 196_608
    assert torch.backends.mha.get_fastpath_enabled()


def test_fast_and_slow_attention_give_the_same_count_in_both_modes() -> None:
    model, x = SelfAttention(weights=False, batch_first=True), torch.rand(2, 64, 16)
    assert count(model.eval(), x).macs == count(model.train(), x).macs == 196_608


def test_transformer_encoder_layer_by_hand() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=24, batch_first=True)
    found = macs(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.rand(2, 10, 16))
    linear = {f"layers.{i}.linear{j}": 10 * 16 * 24 for i in range(2) for j in (1, 2)}
    attention = 2 * (4 * 10 * 16**2 + 2 * 10**2 * 16)
    idle = {f"layers.{i}.self_attn.out_proj": 0 for i in range(2)}
    assert found == {**linear, **idle, OUTSIDE_LAYERS: attention}


def test_vision_transformer_of_torchvision_by_hand() -> None:
    vision_transformer = pytest.importorskip("torchvision.models.vision_transformer")
    model = vision_transformer.VisionTransformer(32, 16, 1, 2, 8, 24, num_classes=5)
    x = torch.rand(1, 3, 32, 32)
    tokens, width = 4 + 1, 8
    expected = 4 * 8 * 3 * 16 * 16 + 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * 24 + width * 5
    assert count(model.eval(), x).macs == expected
    student = qtrain.quantize(model, x)
    assert qtrain.cost(student, x).macs == expected, "so it is once it is quantized"


class Products(nn.Module):
    """A model from a function of itself and its input, with parameters of these shapes."""

    def __init__(self, forward: Callable[["Products", Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = forward, nn.ModuleDict(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


TAPS = torch.ones(3, 2, 4)

INTEGERS = torch.ones(24, 16, dtype=torch.int8)

PRODUCTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    # one output for each of 2 x 3 rows of 4
    "matrix and vector": (lambda: Products(lambda _, x: x @ torch.ones(4)), (1, 2, 3, 4), 24),
    "dot product": (lambda: Products(lambda _, x: torch.dot(x.flatten(), x.flatten())), (1, 5), 5),
    "addmv": (lambda: Products(lambda _, x: torch.addmv(torch.ones(3), x[0], torch.ones(4))), (1, 3, 4), 12),
    "addbmm": (lambda: Products(lambda _, x: torch.addbmm(torch.ones(3, 3), x, x.mT)), (1, 3, 4), 36),
    # x1 W for 5 matrices of 3 x 4, then 5 products of 4
    "bilinear": (lambda: Products(lambda m, x: m.parts["b"](x[:, :3], x), b=nn.Bilinear(3, 4, 5)), (1, 4), 80),
    # 7 steps of 4 gates: 5 x (4 + 5) each
    "lstm": (lambda: Products(lambda m, x: m.parts["r"](x)[0], r=nn.LSTM(4, 5, batch_first=True)), (1, 7, 4), 1260),
    "gru": (lambda: Products(lambda m, x: m.parts["r"](x)[0], r=nn.GRU(4, 5, batch_first=True)), (1, 7, 4), 945),
    # 5 - 3 + 1 places of 3 taps, 2 inputs and 4 outputs
    "conv_tbc": (lambda: Products(lambda _, x: torch.conv_tbc(x.movedim(1, 0), TAPS, torch.ones(4))), (1, 5, 2), 72),
    # with a zero at either end 5 places
    "conv_tbc, padded": (
        lambda: Products(lambda _, x: torch.conv_tbc(x.movedim(1, 0), TAPS, torch.ones(4), pad=1)), (1, 5, 2), 120,
    ),
    "einsum": (lambda: Products(lambda _, x: torch.einsum("nij,jk->nik", x, torch.ones(4, 6))), (1, 3, 4), 72),
    "linear on one vector": (lambda: Products(lambda m, x: m.parts["l"](x[0]), l=nn.Linear(4, 6)), (1, 4), 24),
    # 32 rows by 16 columns of 24
    "integers": (lambda: Products(lambda _, x: torch._int_mm(x[0].char(), INTEGERS).float()), (1, 32, 24), 12_288),
    "batched": (lambda: Products(lambda _, x: torch.baddbmm(torch.ones(1), x, x.mT)), (1, 3, 4), 36),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_product_counts_by_hand(name: str) -> None:
    make, shape, expected = PRODUCTS[name]
    assert count(make().eval(), torch.rand(shape)).macs == expected


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("compiled", [False, True])
def test_flex_attention_counts_both_products_of_all_pairs(compiled: bool) -> None:
    attend = torch.compile(flex_attention) if compiled else flex_attention
    # Two products over 16 x 16 pairs of 8 channels for each of 2 heads, and of 4 that share two heads of keys.
    alone = Products(lambda _, x: attend(x, x, x))
    assert count(alone.eval(), torch.rand(3, 2, 16, 8)).macs == 2 * 2 * 16 * 16 * 8
    grouped = Products(lambda _, x: attend(x, x[:, :2], x[:, :2], enable_gqa=True))
    assert count(grouped.eval(), torch.rand(3, 4, 16, 8)).macs == 4 * 2 * 16 * 16 * 8


def test_an_operator_on_functions_is_refused_by_name() -> None:
    model = Products(lambda _, x: torch.cond(x.sum() > 0, lambda y: y @ y, lambda y: y, (x,)))
    with pytest.raises(ValueError, match=r"higher_order\.cond multiplies is not counted"):
        count(model.eval(), torch.rand(1, 3, 3))


class LowRank(nn.Linear):
    """A linear layer with two others within it: 8 x 8, and 8 x 2 x 8 beside it."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


def test_layers_within_a_layer_count_once() -> None:
    model = nn.Sequential(LowRank())
    assert macs(model, torch.rand(1, 8)) == {"0": 64, "0.down": 16, "0.up": 16}
    cost = qtrain.cost(model, torch.rand(1, 8), metrics=["energy"])
    assert cost.macs == 96
    assert min(cost.metrics["energy"].layers.values()) > 0


class Tried(nn.Module):
    """Calls a layer that fails, and then another one."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong, self.right = nn.Linear(3, 4), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.wrong(x)
        except RuntimeError:
            return self.right(x)


def test_a_call_that_fails_leaves_the_others_counted() -> None:
    assert macs(nn.Sequential(Tried()), torch.rand(1, 8)) == {"0.right": 40, "0.wrong": 0}


def test_inference_mode_counts_as_no_grad() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    with torch.inference_mode():
        assert count(model, torch.rand(1, 3, 8, 8)).macs == 36 * 4 * 27 + 144 * 5


def test_layer_whose_operator_is_not_counted_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(flop_registry, torch.ops.aten.mm)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5, bias=False))
    with pytest.raises(ValueError, match="layer '1' multiplies 20 times, and torch's operators in it 0 times"):
        count(model, torch.rand(1, 3))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_layer_with_a_forward_of_its_own_counts_what_it_runs() -> None:
    class Half(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, self.weight[::2])

    assert macs(nn.Sequential(nn.Linear(3, 4), Half(4, 6)), torch.rand(1, 3)) == {"0": 12, "1": 12}


def test_hooks_that_change_a_layers_input_and_output_do_not_change_its_count() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1))
    model[0].register_forward_hook(lambda module, args, output: output[:, :, ::2, ::2])
    model[0].register_forward_pre_hook(lambda module, args: (args[0] @ torch.eye(8),))
    # 64 places, 4 channels, 27 taps; 16 places, 2 channels, 4 taps; the hook's own product of 24 rows by 8 x 8.
    assert macs(model, torch.rand(1, 3, 8, 8)) == {"0": 64 * 4 * 27, "1": 16 * 2 * 4, OUTSIDE_LAYERS: 24 * 64}


def test_cait_is_counted_and_quantized() -> None:
    torch.manual_seed(0)
    model = timm.create_model("cait_xxs24_224", img_size=32, depth=2, embed_dim=32, num_classes=5).eval()
    x = torch.rand(1, 3, 32, 32)
    d, t, heads = 32, 4, 4  # channels, tokens, heads, which talk before and after the softmax
    block = 4 * t * d**2 + 2 * t**2 * d + 2 * t**2 * heads**2 + 8 * t * d**2
    # The two blocks of class attention: one query, keys and values of all tokens, a projection, an MLP of one token.
    last = 2 * d**2 + 2 * (t + 1) * d**2 + 2 * (t + 1) * d + 8 * d**2
    assert count(model, x).macs == t * d * 3 * 256 + 2 * block + 2 * last + d * 5
    student = qtrain.quantize(model, x, weight_bits=4, input_bits=4)
    assert qtrain.cost(student, x).macs == count(model, x).macs
