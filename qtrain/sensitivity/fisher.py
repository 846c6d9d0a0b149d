"""The rise of the loss to second order, from one forward and one backward for all layers and all widths."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from qtrain.convert.bank import QuantizerBank
from qtrain.functional.random import NOISE, uniform
from qtrain.nn import Operand, QuantLayer
from qtrain.sensitivity.base import Done, Score, chunks, members, part_of, probabilities, scores_of, scoring
from qtrain.spec import Batch, Choice, Scores
from qtrain.utils.calls import first_argument


@final
class Fisher(Score):
    """``1/2 E (g . d)^2``, in nats: ``d`` is what a choice changes of a layer's output, ``g`` the gradient there.

    The expectation is over images and over labels that the model itself believes in. Then it is the second-order
    expansion of ``KL(p || p_choice)``, ``1/2 d^T F d`` with the Fisher matrix ``F``. ``labels="model"`` draws
    the gradient of the logits as ``A r`` with random signs ``r`` and ``A A^T = diag(p) - p p^T``, which has the exact
    second moment and varies less than drawn labels; ``labels="data"`` takes the true labels, ``p - y`` (the empirical
    Fisher).

    ``form="whole"`` multiplies as written, so that errors of one weight at all places of an image add up.
    ``form="diagonal"`` keeps only the diagonal of ``F``, ``1/2 E sum_i g_i^2 d_i^2``, as BRECQ does (arXiv 2102.05426,
    §3.3). ``probes`` are backwards for each image. What a layer computes for each choice is computed once more from its
    own input, ``chunk`` images at a time; no gradient of a single image's weights is ever stored.
    """

    def __init__(
        self,
        *,
        labels: Literal["model", "data"] = "model",
        form: Literal["whole", "diagonal"] = "whole",
        probes: int = 1,
        chunk: int = 32,
    ) -> None:
        if labels not in ("model", "data"):
            raise ValueError(f"Fisher: labels must be model or data, got {labels!r}")
        if form not in ("whole", "diagonal"):
            raise ValueError(f"Fisher: form must be whole or diagonal, got {form!r}")
        if probes < 1 or (labels == "data" and probes > 1):
            raise ValueError(f"Fisher: probes must be 1 or more, and 1 for labels=data, got {probes}")
        self.labels, self.form, self.probes, self.chunk = labels, form, probes, chunk

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
        effects = _Effects(bank, weights, len(batch.image), whole=self.form == "whole")
        with _watching(bank, effects.add), torch.enable_grad():
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
    """What the choices change of their layers' outputs, multiplied by the gradients there, summed up as they come."""

    def __init__(self, bank: QuantizerBank, weights: Mapping[Choice, nn.Module], images: int, *, whole: bool) -> None:
        self.bank, self.weights, self.images, self.whole = bank, weights, images, whole
        self.squares: dict[Choice, float] = {}
        self._products: dict[Choice, Tensor] = {}
        self._choices = {name: [c for c in bank.choices() if name in members(bank, c)] for name in bank.layers}

    @torch.no_grad()
    def add(self, name: str, layer: QuantLayer, x: Tensor, gradient: Tensor, shared: bool) -> None:
        """A call of ``layer`` with ``x`` had ``gradient`` at its output; ``shared`` is one that all images share."""
        exact = layer.forward(x)
        for choice in self._choices[name]:
            quantizer = self.weights.get(choice) or self.bank.quantizers[name][choice.role][choice.bits]
            setattr(layer, f"{choice.role}_quantizer", quantizer)
            products = (layer.forward(x) - exact).mul_(gradient).double()
            setattr(layer, f"{choice.role}_quantizer", None)
            if not self.whole:
                self.squares[choice] = self.squares.get(choice, 0.0) + float(products.square().sum())
                continue
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
        if not shared and products.ndim and products.shape[0] % self.images == 0:
            return products.reshape(self.images, -1).sum(dim=1)
        return nn.functional.pad(products.sum().reshape(1), (0, self.images - 1))


@final
class _Rounded(nn.Module):
    """A quantized weight in place of its quantizer, so that it is not quantized anew for each batch."""

    enabled = True

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = values

    def forward(self, weight: Tensor) -> Tensor:
        return self.values


@torch.no_grad()
def _rounded_weights(bank: QuantizerBank) -> dict[Choice, nn.Module]:
    found: dict[Choice, nn.Module] = {}
    for choice in bank.choices("weight"):
        layer = bank.layers[choice.layer]
        assert not isinstance(layer, Operand)
        quantizer = bank.quantizers[choice.layer]["weight"][choice.bits].eval()
        found[choice] = _Rounded(quantizer(layer.effective_weight()))
    return found


@contextmanager
def _watching(bank: QuantizerBank, see: Callable[[str, QuantLayer, Tensor, Tensor, bool], None]) -> Iterator[None]:
    """Inside, each backward calls ``see`` for each call of a layer: :meth:`_Effects.add`."""

    def hook(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = first_argument(args, kwargs).detach()
        version = x._version
        shared = not output.requires_grad  # it does not depend on the image
        if shared:
            output = output.detach().requires_grad_() * 1

        def at(gradient: Tensor) -> None:
            if x._version != version:
                raise ValueError(f"score: the input of layer {name!r} is changed in place after the layer has read it")
            assert isinstance(layer, QuantLayer)
            see(name, layer, x, gradient, shared)

        output.register_hook(at)
        return output

    with ExitStack() as hooks:
        for name, layer in bank.layers.items():
            hooks.enter_context(layer.register_forward_hook(partial(hook, name), with_kwargs=True))
        yield
