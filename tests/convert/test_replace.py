"""A layer that is planned runs as quantized, or it is left out with the reason; its hooks go with it."""

import pytest
import torch
from torch import Tensor, nn

import qtrain
from qtrain.convert.layers import find_layers, quant_layers, set_quantization
from qtrain.convert.replace import AVOIDED, BYPASSED, PARTLY_BYPASSED, quantized_form
from qtrain.nn import QuantConv, QuantLinear
from qtrain.ptq.equalize import CrossLayerEqualization

X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convolutions and a head; the second convolution is called by :meth:`middle`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 5)

    def middle(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.middle(self.stem(x).relu()).mean((2, 3)))


class ByList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.parts = [self.conv]

    def middle(self, x: Tensor) -> Tensor:
        return self.parts[0](x)


class ByReference(Net):
    def __init__(self) -> None:
        super().__init__()
        self.__dict__["cached"] = self.conv

    def middle(self, x: Tensor) -> Tensor:
        return self.__dict__["cached"](x)


class ByMethod(Net):
    def __init__(self) -> None:
        super().__init__()
        self.method = self.conv.__call__

    def middle(self, x: Tensor) -> Tensor:
        return self.method(x)


class ByBoth(ByList):
    def middle(self, x: Tensor) -> Tensor:
        return self.parts[0](x) + self.conv(x)


class ByClass(Net):
    def middle(self, x: Tensor) -> Tensor:
        return self.conv(x) if isinstance(self.conv, nn.Conv2d) else x[:, :, 1:-1, 1:-1]


BY_REFERENCE = {
    ByList: BYPASSED, ByReference: BYPASSED, ByMethod: BYPASSED, ByBoth: PARTLY_BYPASSED, ByClass: AVOIDED,
}  # fmt: skip


@pytest.mark.parametrize("kind", BY_REFERENCE, ids=lambda kind: kind.__name__)
def test_layer_reached_by_a_reference_of_its_owner_is_skipped_and_counted_in_float(kind: type[Net]) -> None:
    student = qtrain.quantize(kind(), X, weight_bits=2, input_bits=2, ends=None)
    report = qtrain.describe(student)
    assert list(report.layers) == ["stem", "fc"]
    assert report.skipped == {"conv": BY_REFERENCE[kind]}
    assert type(student.conv) is nn.Conv2d
    rows = {row.name: row for row in qtrain.cost(student, X).layers}
    assert (rows["conv"].weight_bits, rows["conv"].input_bits) == (32, 32)
    assert rows["conv"].weight_storage_bits == 8 * 8 * 9 * 32
    called = []
    for name, layer in quant_layers(student).items():
        layer.register_forward_hook(lambda *_, name=name: called.append(name))
    student(X)
    assert called == ["stem", "fc"]


def test_finding_layers_leaves_the_model_as_it_was() -> None:
    model = ByBoth().train()
    model.fc.eval()
    before = dict(model.named_modules())
    expected = model(X)
    find_layers(model, X[:1])
    assert dict(model.named_modules()) == before
    assert model.training and model.stem.training and not model.fc.training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("layer", [nn.Linear(8, 5), nn.Conv2d(3, 4, 3)], ids=["linear", "conv"])
def test_model_that_is_itself_a_layer_is_refused_with_the_remedy(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"is itself a layer, .*; wrap it in torch\.nn\.Sequential$"):
        qtrain.quantize(layer, X)
    assert qtrain.describe(qtrain.quantize(nn.Sequential(layer), X)).layers == {"0": (8, 8)}


def test_parameters_in_a_python_list_that_no_module_holds_are_named() -> None:
    class Unregistered(Net):
        def __init__(self) -> None:
            super().__init__()
            self.parts = [nn.Conv2d(8, 8, 1)]

        def middle(self, x: Tensor) -> Tensor:
            return self.conv(self.parts[0](x))

    skipped = find_layers(Unregistered(), X).skipped
    assert list(skipped) == ["unregistered parameter (8, 8, 1, 1)"]
    assert "torch.nn.ModuleList" in next(iter(skipped.values()))


def test_network_without_a_replaceable_layer_is_refused_with_the_reasons() -> None:
    model = nn.Sequential(nn.Flatten(), nn.GRU(192, 4))
    with pytest.raises(ValueError, match=r"Sequential has no layer that can be quantized; 1: the matrices of"):
        qtrain.quantize(model, X)


def test_hooks_of_a_layer_are_carried_over_and_quantizers_off_is_the_original() -> None:
    model = Net().eval()
    model.conv.register_forward_pre_hook(lambda module, args: (args[0] + 0.5,))
    model.conv.register_forward_hook(lambda module, args, output: output * 1.25)
    model.fc.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] - 1,), kwargs), with_kwargs=True)
    bare = Net().eval()
    expected = model(X)
    student = qtrain.quantize(model, X, weight_bits=4, input_bits=4, ends=None)
    assert isinstance(student.conv, QuantConv) and isinstance(student.fc, QuantLinear)
    set_quantization(student, enabled=False)
    assert torch.equal(student(X), expected)
    assert not torch.allclose(bare(X), expected), "the hooks change the output"


def test_backward_hooks_of_a_layer_are_carried_over() -> None:
    model, seen = Net(), []
    model.conv.register_full_backward_hook(lambda module, into, out: seen.append(out[0].shape))
    model.conv.register_full_backward_pre_hook(lambda module, out: (out[0] * 2,))
    student = qtrain.quantize(model, X, ends=None)
    set_quantization(student, enabled=False)
    plain, stem = Net(), student.stem
    student(X).sum().backward()
    plain(X).sum().backward()
    assert seen == [torch.Size([4, 8, 4, 4])]
    torch.testing.assert_close(stem.weight.grad, 2 * plain.stem.weight.grad)


def test_handle_of_a_hook_removes_it_from_the_quantized_layer() -> None:
    model, seen = Net(), []
    handle = model.conv.register_forward_hook(lambda *_: seen.append(1))
    layer = find_layers(model, X[:1]).layers["conv"]
    seen.clear()
    form = quantized_form(model.conv, layer)
    form(torch.rand(1, 8, 4, 4))
    handle.remove()
    form(torch.rand(1, 8, 4, 4))
    assert seen == [1]


def test_layer_with_hooks_on_its_state_dict_stays_in_full_precision() -> None:
    model = Net()
    model.conv.register_state_dict_post_hook(lambda module, state, prefix, metadata: None)
    assert "state dict" in find_layers(model, X).skipped["conv"]


@pytest.mark.parametrize("fold", ["before", "training"])
@pytest.mark.parametrize("place", ["conv", "norm"])
def test_batch_norm_beside_a_hook_is_not_folded_and_quantizers_off_is_the_original(
    fold: str, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten()]
    model = nn.Sequential(*parts, nn.Linear(8 * 16, 5)).eval()
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    model[0 if place == "conv" else 1].register_forward_hook(lambda module, args, output: output.abs())
    expected = model(X)
    student = qtrain.quantize(model, X, fold=fold)
    set_quantization(student, enabled=False)
    torch.testing.assert_close(student(X), expected)
    assert isinstance(student[1], nn.BatchNorm2d)
    assert isinstance(student[4], nn.BatchNorm2d) == (fold == "training"), "the norm without a hook is folded"
    assert "1: it, or the layer before it, has hooks" in caplog.text


def test_equalization_keeps_the_function_of_layers_and_activations_with_hooks() -> None:
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 5, 1)]
    model = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2], nn.ReLU(), convs[3]).eval()
    with torch.no_grad():
        for layer in convs:
            layer.weight.mul_(torch.logspace(-1, 1, len(layer.weight)).reshape(-1, 1, 1, 1))
    model[0].register_forward_hook(lambda module, args, output: output + 1)
    model[3].register_forward_pre_hook(lambda module, args: (args[0] - 0.5,))
    weights = [layer.weight.clone() for layer in convs]
    expected = model(X)
    CrossLayerEqualization()(model, X, {})
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
    changed = [not torch.equal(layer.weight, before) for layer, before in zip(convs, weights, strict=True)]
    assert changed == [False, False, True, True], "only between the last two does nothing depend on the scale"


def test_replaced_relu6_keeps_its_hooks() -> None:
    torch.manual_seed(0)
    model, seen = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 1)), []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    CrossLayerEqualization(replace_relu6=True)(model, X, {})
    seen.clear()
    model(X)
    assert type(model[1]) is nn.ReLU and seen == [1]


def test_exposed_operation_keeps_the_hooks_of_the_module_that_does_it_and_all_its_names() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.relu()

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Sum(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    model.add_module("again", model[1])
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    expected = model(X)
    student = qtrain.quantize(model, X, operations={"add": 8})
    assert student.again is student[1]
    assert {"1.add_0.left", "1.add_0.right"} <= qtrain.describe(student).layers.keys()
    set_quantization(student, enabled=False)
    assert torch.equal(student(X), expected)


def scripted() -> nn.Module:
    return torch.jit.script(nn.Conv2d(3, 3, 1))


COMPILED = {
    "by dynamo": (lambda: torch.compile(Net(), backend="eager"), "the network is compiled; quantize the network that"),
    "by jit": (scripted, "the network is compiled; quantize the network that was compiled, and compile the student"),
    "a part by jit": (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), scripted()), "1 of the network is compiled; quantize"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("how", COMPILED)
def test_compiled_network_is_refused_with_the_remedy(how: str) -> None:
    make, message = COMPILED[how]
    with pytest.raises(ValueError, match=message):
        qtrain.quantize(make(), X)
