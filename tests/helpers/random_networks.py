"""Small networks at random: branches, shared modules and weights, keywords, lists, functional calls, hooks.

A network is a list of steps of plain values, so that a student's file can hold it. Each step adds a map of CHANNELS x
SIZE x SIZE to a pool and reads earlier ones, counted from the last. What conversion should find, and what it all
multiplies, follows from the steps alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

CHANNELS, SIZE, CLASSES = 4, 6, 3
CALLS = ("place", "keyword", "list", "reference", "functional")
RELUS = ("module", "inplace", "function", "method", "keyword", "relu6", "leaky")
SUMS = ("operator", "keyword", "method", "inplace")

Step = list[Any]

_number = st.sampled_from((0, 0, 0, 0, 0, 1, 1, 2, 3, 5))
"""How far back in the pool a step reads: mostly what the step before it made, so that there are chains."""


def _steps(*parts: Any) -> st.SearchStrategy[Step]:
    return st.tuples(*(part if isinstance(part, st.SearchStrategy) else st.just(part) for part in parts)).map(list)


STEPS: st.SearchStrategy[list[Step]] = st.lists(
    st.one_of(
        # a convolution, the likeliest step: source, kernel, groups, bias, batch norm, hook, how it is called
        _steps("conv", _number, st.sampled_from((1, 3)), st.sampled_from((1, 2, 4)), st.booleans(), st.booleans(),
               st.sampled_from((False, False, False, True)), st.sampled_from((*CALLS[:2] * 3, *CALLS))),
        _steps("conv", 0, 3, 1, True, True, False, "place"),
        _steps("conv", 0, 1, 1, True, False, False, "keyword"),
        _steps("again", _number, _number),  # an earlier convolution is called once more
        _steps("tied", _number, _number),  # another convolution with the weight of an earlier one
        _steps("relu", _number, st.sampled_from(RELUS)),
        _steps("add", _number, _number, st.sampled_from(SUMS)),
        _steps("mul", _number, _number, st.booleans()),
        _steps("cat", _number, _number, st.booleans()),
        _steps("pool", _number),
    ),
    min_size=2, max_size=9,
)  # fmt: skip

HEADS = _steps(st.booleans(), st.booleans(), st.booleans())
"""Whether the head reads a flattened map, is called by keyword, and has a second one beside it."""


class RandomNetwork(nn.Module):
    """The network of ``steps`` and ``head``; its numbers are a function of ``seed``."""

    def __init__(self, *, steps: list[Step], head: Step, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.steps, self.head = steps, head
        self.convs, self.norms, self.acts = nn.ModuleList(), nn.ModuleDict(), nn.ModuleList()
        self.listed: list[nn.Module] = []
        for kind, *options in steps:
            if kind == "conv":
                _, kernel, groups, bias, norm, hook, _ = options
                conv = nn.Conv2d(CHANNELS, CHANNELS, kernel, padding=kernel // 2, groups=groups, bias=bias)
                if norm:
                    self.norms[str(len(self.convs))] = _trained_norm()
                if hook:
                    conv.register_forward_hook(lambda module, args, output: output * 0.5 + 0.25)
                self._add(conv)
            elif kind == "tied":
                self._add(nn.Conv2d(CHANNELS, CHANNELS, 1))
                if (earlier := self._earlier(options[1], len(self.convs) - 1)) is not None:
                    kernel = earlier.kernel_size[0]
                    tied = nn.Conv2d(CHANNELS, CHANNELS, kernel, padding=kernel // 2, groups=earlier.groups)
                    tied.weight = earlier.weight
                    self.convs[-1] = self.listed[-1] = tied
            elif kind == "cat":
                self._add(nn.Conv2d(2 * CHANNELS, CHANNELS, 1))
            elif kind == "relu":
                made = {"relu6": nn.ReLU6(), "leaky": nn.LeakyReLU(0.1), "inplace": nn.ReLU(inplace=True)}
                self.acts.append(made.get(options[1], nn.ReLU()))
        width = CHANNELS * (SIZE**2 if head[0] else 1)
        self.fc = nn.Linear(width, CLASSES)
        self.fc2 = nn.Linear(width, CLASSES) if head[2] else nn.Identity()

    def _add(self, conv: nn.Conv2d) -> None:
        self.convs.append(conv)
        self.listed.append(conv)

    def _earlier(self, number: int, before: int) -> Any:
        """One of the convolutions of CHANNELS inputs among the first ``before``; ``None`` where there is none."""
        plain = [conv for conv in self.listed[:before] if conv.in_channels == CHANNELS]
        return plain[number % len(plain)] if plain else None

    def forward(self, x: Tensor) -> Tensor:
        pool, made, acts = [x], 0, iter(self.acts)
        for kind, *options in self.steps:
            y = pool[-1 - options[0] % len(pool)]
            other = pool[-1 - options[1] % len(pool)] if kind in ("add", "mul", "cat") else None
            if kind in ("conv", "tied"):
                y = self._convolved(made, y, options[-1] if kind == "conv" else "place")
                if str(made) in self.norms and kind == "conv":
                    norm = self.norms[str(made)]
                    y = norm(input=y) if options[-1] == "keyword" else norm(y)
                made += 1
            elif kind == "again":
                number = self._again(options[1], made)
                y = y if number is None else self.convs[number](y)
            elif kind == "relu":
                y = _rectified(y, options[1], next(acts))
            elif kind == "add":
                y = _sum(y, other, options[2])
            elif kind == "mul":
                gate = torch.sigmoid(other)
                y = torch.mul(y, other=gate) if options[2] else y * gate
            elif kind == "cat":
                both = torch.cat(tensors=[y, other], dim=1) if options[2] else torch.cat([y, other], 1)
                y = self.convs[made](both)
                made += 1
            else:
                y = F.avg_pool2d(y, 3, 1, 1)
            pool.append(y)
        features = pool[-1].flatten(1) if self.head[0] else pool[-1].mean(dim=(2, 3))
        logits = self.fc(input=features) if self.head[1] else self.fc(features)
        return (logits + self.fc2(features)) / 2 if self.head[2] else logits

    def _again(self, number: int, made: int) -> int | None:
        earlier = self._earlier(number, made)
        return None if earlier is None else next(i for i, conv in enumerate(self.listed) if conv is earlier)

    def _convolved(self, number: int, x: Tensor, call: str) -> Tensor:
        if call == "list" or call == "reference":
            return (self.listed[number] if call == "list" else self.listed[number].__call__)(x)
        conv = self.convs[number]
        if call == "functional":
            return F.conv2d(x, conv.weight, conv.bias, padding=conv.padding, groups=conv.groups)
        return conv(input=x) if call == "keyword" else conv(x)

    def expected(self) -> tuple[set[str], int]:
        """Names of the layers that conversion can quantize, and the multiplications for one image."""
        macs, made = 0, 0
        called: dict[int, set[str]] = {}
        for kind, *options in self.steps:
            number: int | None = made
            if kind == "again":
                number = self._again(options[1], made)
            elif kind not in ("conv", "tied", "cat"):
                continue
            if number is not None:
                called.setdefault(number, set()).add(options[-1] if kind == "conv" else "place")
                macs += SIZE**2 * self.listed[number].weight.numel()
            made += kind in ("conv", "tied", "cat")
        used = {number for number, calls in called.items() if calls <= {"place", "keyword"}}
        heads = {"fc", "fc2"} if self.head[2] else {"fc"}
        macs += len(heads) * CLASSES * self.fc.in_features
        return {f"convs.{number}" for number in used} | heads, macs


def _trained_norm() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(CHANNELS)
    for tensor, low, high in ((norm.weight, 0.5, 2.0), (norm.bias, -0.5, 0.5), (norm.running_mean, -0.5, 0.5)):
        nn.init.uniform_(tensor, low, high)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return norm


def _rectified(y: Tensor, style: str, module: nn.Module) -> Tensor:
    if style == "function":
        return F.relu(y)
    if style == "method":
        return y.relu()
    return F.relu(input=y) if style == "keyword" else module(y)


def _sum(y: Tensor, other: Any, style: str) -> Tensor:
    if style == "keyword":
        return torch.add(input=y, other=other)
    if style == "method":
        return y.add(other)
    if style == "inplace":
        y = y.clone()
        y += other
        return y
    return y + other
