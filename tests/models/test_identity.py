"""Two networks have one identity only where they compute the same; processes and origins make no difference."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qtrain.models.factory import create_model
from qtrain.models.identity import architecture_digest, structure_digest, weights_digest


class Scaled(nn.Module):
    """``f(x)`` times what ``scale`` finds in an option of any kind."""

    def __init__(self, option: Any, scale: Callable[[Any], float] = float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.option, self.scale, self.layer = option, scale, nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale(self.option)


@dataclass
class Options:
    t: float


class Plain:
    __slots__ = ("t",)

    def __init__(self, t: float) -> None:
        self.t = t


class Kind(Enum):
    LOW = 1.0
    HIGH = 5.0


def itself(t: float) -> float:
    return t


MAKERS: dict[str, tuple[Callable[[float], Any], Callable[[Any], float]]] = {
    "mapping": (lambda t: {"t": t}, lambda option: option["t"]),
    "nested": (lambda t: [{"a": {"t": t}}, "b"], lambda option: option[0]["a"]["t"]),
    "dataclass": (Options, lambda option: option.t),
    "namespace": (lambda t: SimpleNamespace(t=t), lambda option: option.t),
    "object with slots": (Plain, lambda option: option.t),
    "set": (lambda t: {t}, lambda option: next(iter(option))),
    "enumeration": (Kind, lambda option: option.value),
    "partial": (lambda t: partial(itself, t), lambda option: option()),
    "array": (np.array, float),
}
"""Kinds of options that hold a number: how they are made, and how it is found again."""


@pytest.mark.parametrize("name", MAKERS)
def test_an_option_of_any_kind_tells_two_networks_apart(name: str) -> None:
    make, scale = MAKERS[name]
    one, other, again = (Scaled(make(t), scale) for t in (1.0, 5.0, 1.0))
    x = torch.ones(1, 4)
    assert not torch.equal(one(x), other(x)) and torch.equal(one(x), again(x))
    assert weights_digest(one) == weights_digest(other)
    assert structure_digest(one) != structure_digest(other)
    assert structure_digest(one) == structure_digest(again)


def test_a_tensor_that_is_no_buffer_is_a_weight() -> None:
    networks = [Scaled(torch.tensor(t)) for t in (1.0, 5.0, 1.0)]
    digests = [weights_digest(network) for network in networks]
    assert digests[0] == digests[2] != digests[1]
    assert len({architecture_digest(network) for network in networks}) == 1, "whatever the values"


OLD = "0f1930db1eca277fcfb6a511cb599792e3743fd479c29041e96a866024fc9fe2"

CODE = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 5)

    def forward(self, x):
        return self.layer(x)
"""


def of_code(code: str) -> nn.Module:
    module = ModuleType("a_users_network")
    sys.modules[module.__name__] = module
    exec(code, vars(module))
    torch.manual_seed(0)
    network: nn.Module = module.Net()
    return network


def test_an_edited_forward_is_another_network_and_an_edited_comment_is_none() -> None:
    digest = structure_digest(of_code(CODE))
    assert structure_digest(of_code(CODE.replace("self.layer(x)\n", "self.layer(x).relu()\n"))) != digest
    assert structure_digest(of_code(CODE.replace("self.layer(x)\n", "3 * self.layer(x)\n"))) != digest
    assert structure_digest(of_code(CODE.replace("    def forward", "    # The answer.\n    def forward"))) == digest


def test_a_function_as_an_option_counts_with_its_code() -> None:
    digests = [structure_digest(Scaled(2.0, scale)) for scale in (lambda t: t, lambda t: 3 * t)]
    assert digests[0] != digests[1]


def test_where_weights_come_from_is_no_part_of_an_identity() -> None:
    one, other = Scaled(1.0), Scaled(1.0)
    one.pretrained_cfg, other.pretrained_cfg = {"file": "/a/weights.pth"}, {"file": "/b/weights.pth"}
    assert structure_digest(one) == structure_digest(other)


def test_an_option_that_holds_itself_ends() -> None:
    option: dict[str, Any] = {"t": 1.0}
    option["self"] = option
    assert structure_digest(Scaled(option, len)) == structure_digest(Scaled(option, len))


def test_networks_of_this_package_keep_the_identity_that_caches_know() -> None:
    """That of version 17f2ff0, so that answers which are kept on disk are still found."""
    model = create_model(name="cifar_resnet8", num_classes=10, in_channels=1, width=0.25)
    assert structure_digest(model) == OLD


SCRIPT = """if True:
    import sys
    sys.path.insert(0, {folder!r})
    import test_identity as t
    print([t.structure_digest(t.Scaled(*(make(1.0), scale))) for make, scale in t.MAKERS.values()])
    option = {{"b": {{"x", "y", "z"}}, "a": frozenset("uvw")}}
    print(t.structure_digest(t.Scaled(option, lambda o: o in {{"x", "y"}})))
"""


def test_another_process_finds_the_same_identities() -> None:
    script = SCRIPT.format(folder=str(Path(__file__).parent))
    found = {
        subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed},
            check=True, capture_output=True, text=True,
        ).stdout
        for seed in ("1", "2", "3")
    }  # fmt: skip
    assert len(found) == 1
