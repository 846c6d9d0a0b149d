"""The rise of the loss to second order, from one forward and one backward for all layers and all widths."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from qtrain.convert.bank import QuantizerBank
from qtrain.functional.random import NOISE, uniform
from qtrain.nn import Operand
from qtrain.sensitivity.base import Done, Given, Score, chunks, members, part_of, probabilities, scores_of, scoring
from qtrain.spec import Batch, Choice, Role, Scores
from qtrain.utils.calls import first_argument

Form = Literal["whole", "diagonal"]


@final
class Fisher(Score):
    """``1/2 E (g . d)^2``, in nats: ``d`` is what a choice changes of a tensor, ``g`` the gradient there.

    The expectation is over images and over labels that the model itself believes in. Then it is the second-order
    expansion of ``KL(p || p_choice)``, ``1/2 d^T F d`` with the Fisher matrix ``F``. ``labels="model"`` draws
    the gradient of the logits as ``A r`` with random signs ``r`` and ``A A^T = diag(p) - p p^T``, which has the exact
    second moment and varies less than drawn labels; ``labels="data"`` takes the true labels, ``p - y`` (the empirical
    Fisher).

    A change is that of a layer's output for its weight, and of what it reads for its input. ``weight`` and ``input``
    say how the elements of a change come together. ``"whole"`` multiplies as written: errors of one weight at all
    places of an image add up. ``"diagonal"`` keeps the diagonal of ``F``, ``1/2 E sum_i g_i^2 d_i^2``, as BRECQ does
    (arXiv 2102.05426, §3.3): errors of inputs have signs of their own, so that what they have in common is mostly
    noise of few images.

    ``probes`` are backwards for each image. What a layer computes with each choice is computed from its own input in
    the backward, ``chunk`` images at a time; no gradient of one image by a weight is ever formed.
    """

    def __init__(
        self,
        *,
        labels: Literal["model", "data"] = "model",
        weight: Form = "whole",
        input: Form = "diagonal",
        probes: int = 1,
        chunk: int = 32,
    ) -> None:
        if labels not in ("model", "data"):
            raise ValueError(f"Fisher: labels must be model or data, got {labels!r}")
        for name, form in (("weight", weight), ("input", input)):
            if form not in ("whole", "diagonal"):
                raise ValueError(f"Fisher: {name} must be whole or diagonal, got {form!r}")
        if probes < 1 or (labels == "data" and probes > 1):
            raise ValueError(f"Fisher: probes must be 1 or more, and 1 for labels=data, got {probes}")
        self.labels, self.probes, self.chunk = labels, probes, chunk
        self.forms: dict[Role, Form] = {"weight": weight, "input": input}

    def __call__(self, bank: QuantizerBank, batches: Sequence[Batch], *, seed: int, done: Done | None = None) -> Scores:
        choices = list(bank.choices())
        total, images = torch.zeros(len(choices), dtype=torch.float64), 0
        with scoring(bank):
            weights = _rounded_weights(bank)
            for name, batch in chunks(batches, self.chunk):
                rises = part_of(done, name, partial(self._rises, bank, weights, choices, batch, seed))
                total += torch.tensor(rises, dtype=torch.float64)
                images += len(batch.image)
        return scores_of(dict(zip(choices, (total / images).tolist(), strict=True)))

    def _rises(
        self, bank: QuantizerBank, weights: Mapping[Choice, nn.Module], choices: list[Choice], batch: Batch, seed: int
    ) -> list[float]:
        """The sum over the images of ``batch`` for each of ``choices``."""
        effects = _Effects(bank, weights, len(batch.image), self.forms)
        with _watching(bank, effects), torch.enable_grad():
            logits = bank.model(batch.image.detach().requires_grad_())
            for probe in range(self.probes):
                gradient = self._gradient(logits.detach(), batch, seed, probe)
                torch.autograd.backward(logits, gradient, retain_graph=probe < self.probes - 1)
                effects.square()
        return [0.5 * effects.squares.get(choice, 0.0) / self.probes for choice in choices]

    def _gradient(self, logits: Tensor, batch: Batch, seed: int, probe: int) -> Tensor:
        """The gradient of the logits (N, K)."""
        p = logits.softmax(dim=1)
        if self.labels == "data":
            return p - probabilities(batch.target, p)
        draw = uniform(seed=seed, epoch=probe, index=batch.index, stream=NOISE, count=logits.shape[1])
        signs = torch.where(draw < 0.5, -1.0, 1.0).to(p)
        return p.sqrt() * signs - p * (p.sqrt() * signs).sum(dim=1, keepdim=True)


class _Effects:
    """What choices change, multiplied by the gradients there, and summed up as the gradients come."""

    def __init__(
        self, bank: QuantizerBank, weights: Mapping[Choice, nn.Module], images: int, forms: Mapping[Role, Form]
    ) -> None:
        self.bank, self.weights, self.images, self.forms = bank, weights, images, forms
        self.squares: dict[Choice, float] = {}
        self._products: dict[Choice, Tensor] = {}
        self._choices = {name: [c for c in bank.choices() if name in members(bank, c)] for name in bank.layers}

    @torch.no_grad()
    def of_weight(self, name: str, x: Tensor, gradient: Tensor, shared: bool) -> None:
        """A call of the layer ``name`` with ``x`` had ``gradient`` at its output.

        ``shared``: all images share it, since it does not depend on them.
        """
        layer, choices = self.bank.layers[name], [c for c in self._choices[name] if c.role == "weight"]
        exact = layer.forward(x) if choices else x
        for choice in choices:
            setattr(layer, "weight_quantizer", self.weights[choice])  # noqa: B010
            self._add(choice, layer.forward(x).sub_(exact).mul_(gradient), shared)
        if choices:
            layer.weight_quantizer = None

    @torch.no_grad()
    def of_input(self, name: str, x: Tensor, gradient: Tensor, shared: bool) -> None:
        """A call of the layer ``name`` had ``gradient`` at ``x``, which it reads."""
        for choice in self._choices[name]:
            if choice.role == "input":
                quantizer = self.bank.quantizers[name]["input"][choice.bits].eval()
                self._add(choice, (quantizer(x) - x).mul_(gradient), shared)

    def _add(self, choice: Choice, products: Tensor, shared: bool) -> None:
        if self.forms[choice.role] == "diagonal":
            self.squares[choice] = self.squares.get(choice, 0.0) + float(_sums(products.square_()).sum())
            return
        by_image = self._by_image(products, shared)
        self._products[choice] = self._products[choice] + by_image if choice in self._products else by_image

    def square(self) -> None:
        """All calls of this backward have been added."""
        for choice, products in self._products.items():
            self.squares[choice] = self.squares.get(choice, 0.0) + float(products.square().sum())
        self._products.clear()

    def _by_image(self, products: Tensor, shared: bool) -> Tensor:
        """Sums of each image, (N,). Where all images share the output there is one sum, in the first place.

        Its square has the expectation of the sum of the images' squares, since their gradients have independent signs.
        A tensor of windows or patches has those of one image next to each other.
        """
        sums = _sums(products)
        if not shared and products.ndim and products.shape[0] % self.images == 0:
            return sums.reshape(self.images, -1).sum(dim=1)
        return nn.functional.pad(sums.sum().reshape(1), (0, self.images - 1))


def _sums(products: Tensor) -> Tensor:
    """The sum over each element of the first dimension, in float64; inside it is added in float32 at least."""
    if products.ndim < 2:
        return products.double()
    wide = torch.promote_types(products.dtype, torch.float32)
    return products.sum(dim=tuple(range(1, products.ndim)), dtype=wide).double()


@torch.no_grad()
def _rounded_weights(bank: QuantizerBank) -> dict[Choice, nn.Module]:
    found: dict[Choice, nn.Module] = {}
    for choice in bank.choices("weight"):
        layer = bank.layers[choice.layer]
        assert not isinstance(layer, Operand)
        quantizer = bank.quantizers[choice.layer]["weight"][choice.bits].eval()
        found[choice] = Given(quantizer(layer.effective_weight()))
    return found


class _Reader(nn.Module):
    """In place of an input's quantizer: what it is given, with a gradient that ``effects`` see."""

    enabled = True

    def __init__(self, name: str, effects: _Effects) -> None:
        super().__init__()
        self.name, self.effects = name, effects

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # the layer is computed once more, in the backward
            return x
        read = x.view_as(x) if x.requires_grad else x.detach().requires_grad_() * 1
        see = partial(self.effects.of_input, self.name, x.detach(), shared=not x.requires_grad)
        read.register_hook(_unchanged(self.name, x, see))
        return read


@contextmanager
def _watching(bank: QuantizerBank, effects: _Effects) -> Iterator[None]:
    """Inside, each backward tells ``effects`` of the gradients at what layers read and give."""

    def hook(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = first_argument(args, kwargs)
        if not output.requires_grad:
            output = output.detach().requires_grad_() * 1
        see = partial(effects.of_weight, name, x.detach(), shared=not x.requires_grad)
        output.register_hook(_unchanged(name, x, see))
        return output

    with ExitStack() as hooks:
        for name, layer in bank.layers.items():
            if "weight" in bank.quantizers[name]:
                hooks.enter_context(layer.register_forward_hook(partial(hook, name), with_kwargs=True))
            if "input" in bank.quantizers[name]:
                setattr(layer, "input_quantizer", _Reader(name, effects))  # noqa: B010
                hooks.callback(setattr, layer, "input_quantizer", None)
        yield


def _unchanged(name: str, x: Tensor, see: Callable[..., None]) -> Callable[[Tensor], None]:
    """``see(gradient=...)``, unless ``x`` is another by then."""
    version = x._version

    def at(gradient: Tensor) -> None:
        if x._version != version:
            raise ValueError(f"score: the input of layer {name!r} is changed in place after the layer has read it")
        see(gradient=gradient)

    return at
