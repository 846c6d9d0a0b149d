"""A module whose operations became children stays the module that it was: hooks, attributes, methods, copies, files."""

from __future__ import annotations

import copy
import logging
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qtrain
from qtrain.convert.operations import expose_operations


class Block(nn.Module):
    """A residual sum; ``gate`` scales the branch, ``aux`` and ``extra`` are for whoever holds the block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv: Any = nn.Conv2d(4, 4, 3, padding=1)
        self.aux = nn.Linear(4, 4)
        self.gate, self.heads = 1.0, 2

    def extra(self, x: Tensor) -> Tensor:
        return x * self.heads

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * torch.relu(self.conv(x))


class Net(nn.Module):
    """Reads what its block has besides its forward."""

    def __init__(self, block: nn.Module | None = None) -> None:
        super().__init__()
        self.b: Any
        self.stem, self.b, self.f = nn.Conv2d(3, 4, 3, padding=1), Block() if block is None else block, nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.stem(x))
        logits: Tensor = self.f(self.b.extra(y).mean((2, 3)) if hasattr(self.b, "extra") else y.mean((2, 3)))
        return logits


class Masked(nn.Module):
    """Has an optional argument by which it decides."""

    def __init__(self) -> None:
        super().__init__()
        self.l: Any = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.l(x)
        return x + (y if mask is None else y * mask)


class GivesMask(nn.Module):
    """Calls a :class:`Masked` with its argument, and ``also`` without it."""

    def __init__(self, *, also: bool) -> None:
        super().__init__()
        self.inner: Any = Masked()
        self.also = also

    def forward(self, x: Tensor) -> Tensor:
        masked: Tensor = self.inner(x, mask=x)
        return masked * (self.inner(x) if self.also else x)


def masking() -> nn.Module:
    return Net(GivesMask(also=False))


def images() -> Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def student(network: nn.Module) -> Any:
    return qtrain.quantize(network, images(), weight_bits=8, input_bits=8, operations={"add": 8})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_has_hooks_and_attributes_and_computes_the_same(copied: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    network = Net()
    network.b.register_forward_hook(doubled)
    made = student(network)
    assert isinstance(made.b, Block) and "add_0" in dict(made.b.named_children())
    other: Any = copied(made)
    assert torch.equal(other(images()), made(images()))
    assert other.b.heads == 2 and other.b.aux.weight is not made.b.aux.weight
    assert set(network.state_dict()) <= set(made.state_dict()), "what the forward does not call is there too"


def doubled(_: nn.Module, __: object, output: Tensor) -> Tensor:
    return 2 * output


def test_an_export_of_a_student_with_hooks_and_sums_computes_what_the_student_does(tmp_path: Path) -> None:
    import onnxruntime

    torch.manual_seed(0)
    network = Net()
    network.b.register_forward_hook(doubled)
    made = student(network)
    assert qtrain.export(made, tmp_path / "x.onnx", images()).passed
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"))
    (logits,) = session.run(None, {session.get_inputs()[0].name: images().numpy()})
    expected = made(images()).detach()
    assert (torch.from_numpy(logits) - expected).abs().max() <= 0.02 * expected.abs().max()


def test_a_fraction_among_the_attributes_may_change_later() -> None:
    torch.manual_seed(0)
    network = Net()
    x = images()
    expose_operations(network, ["add"], x)
    assert "add_0" in dict(network.b.named_children())
    network.b.gate = 0.0
    stem = network.stem(x)
    torch.testing.assert_close(network(x), network.f(2 * stem.mean((2, 3))))


def test_an_optional_argument_that_decides_has_its_default_where_it_is_never_given() -> None:
    torch.manual_seed(0)
    network = Net(Masked())
    x = images()
    expected = network(x)
    assert expose_operations(network, ["add"], x) == ["b.add_0"]
    torch.testing.assert_close(network(x), expected)
    with pytest.raises(AssertionError, match="mask"):
        network.b(torch.rand(1, 4, 8, 8), mask=torch.rand(1, 4, 8, 8))


def test_an_optional_argument_of_the_network_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.rand(4, 4, 8, 8)
    made = qtrain.quantize(nn.Sequential(Masked(), Masked()), x, operations={"add": 8}, target="onnxruntime")
    assert qtrain.export(made, tmp_path / "x.onnx", x).passed
    assert not any("cannot be traced" in reason for reason in qtrain.describe(made).skipped.values())


def test_a_file_knows_which_optional_arguments_are_given(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = images()
    made = qtrain.quantize(masking(), x, operations={"add": 8, "multiply": 8})
    inner = {name for name, _ in made.named_modules() if name.startswith("b.inner.")}
    assert {"b.inner.multiply_0", "b.inner.add_1"} <= inner
    qtrain.save(made, tmp_path / "x.safetensors", builder=masking)
    assert torch.equal(qtrain.load(tmp_path / "x.safetensors", builders=[masking])(x), made(x))


def test_a_module_that_is_called_in_two_ways_stays_as_it_is() -> None:
    torch.manual_seed(0)
    network = Net(GivesMask(also=True))
    x = images()
    expected = network(x)
    assert expose_operations(network, ["multiply"], x) == ["b.multiply_0"], "not the product inside of the inner one"
    assert torch.equal(network(x), expected)


class Stores(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        y: Tensor = self.conv(x)
        return x + y


class Appends(Block):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        y: Tensor = self.conv(x)
        return x + y


class Drops(Block):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and random.random() < 0.1:
            return x
        y: Tensor = self.conv(x)
        return x + y


@pytest.mark.parametrize(
    ("kind", "why"), [(Stores, "sets its attribute last"), (Appends, "seen"), (Drops, "draws random numbers")]
)
def test_what_a_graph_would_not_do_any_more_keeps_a_module_as_it_is(
    kind: type[Block], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    network = Net(kind())
    with caplog.at_level(logging.INFO), pytest.raises(ValueError, match="none that can be exposed"):
        expose_operations(network, ["add"], images())
    assert why in caplog.text
    assert type(network.b) is kind
    if isinstance(network.b, Appends):
        assert all(isinstance(one, Tensor) and not isinstance(one, torch.fx.Proxy) for one in network.b.seen)
    if isinstance(network.b, Stores):
        assert isinstance(network.b.last, Tensor)


def test_a_constant_that_the_forward_makes_is_no_part_of_the_state() -> None:
    class Shifted(Block):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x)
            return x + torch.relu(y * torch.tensor([0.5]))

    torch.manual_seed(0)
    network, x = Net(Shifted()), images()
    before, expected = set(network.state_dict()), network(x)
    assert expose_operations(network, ["add"], x) == ["b.add_0"]
    assert torch.equal(network(x), expected) and set(network.state_dict()) == before
    assert torch.equal(copy.deepcopy(network)(x), expected)
