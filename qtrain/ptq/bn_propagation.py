"""The distribution of every activation of a model, from batch norm's statistics and without images.

A batch norm leaves each channel of its output with mean beta and standard deviation gamma over the training data. With
the normal distribution of those moments the rest of the network can be computed: a ReLU clips it, a sum adds
independent values, and so on along the traced graph (data-free quantization, Nagel et al. 2019, arXiv 1906.04721, §4.2,
which has the formulas for normals that are clipped).

A distribution is represented by ``ROWS`` equally likely values, the means of the cells between its quantiles. So any
function of the model is simply called on the values, and expectations of clipped normals agree with the formula to
1e-5. Two more values are the bounds of the distribution, ``beta -+ n gamma`` behind a batch norm.
"""

import math
import operator
from collections.abc import Callable, Mapping
from functools import cache
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

from qtrain.convert.fold import OutputStatistics
from qtrain.convert.graph import calls, trace
from qtrain.models.norms import NormForm, describe_norm
from qtrain.nn import Operand, QuantLayer, QuantWeighted
from qtrain.utils.calls import first_argument
from qtrain.utils.errors import first_line
from qtrain.utils.eval_mode import evaluating

DEVIATIONS = 6.0
"""n of the bounds ``beta -+ n gamma``, as in the paper."""

ROWS = 4096
BOUNDS = 2

_POOLING = (_AvgPoolNd, _MaxPoolNd, _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd)
_POOLING_FUNCTIONS = {F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, torch.max_pool2d}
_SUMS = {operator.add, operator.iadd, torch.add}
_PAIRS: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    operator.mul: torch.mul, operator.imul: torch.mul, torch.mul: torch.mul,
    operator.sub: torch.sub, operator.isub: torch.sub, torch.sub: torch.sub,
}  # fmt: skip


def standard_normal(rows: int = ROWS) -> Tensor:
    """Means of the ``rows`` equally likely cells of the standard normal, ascending: ``rows (phi(a) - phi(b))``."""
    edges = torch.special.ndtri(torch.linspace(0, 1, rows + 1, dtype=torch.float64))
    density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
    return ((density[:-1] - density[1:]) * rows).float()


def expected(values: Tensor) -> Tensor:
    """Expectation of each channel, (C,), from the ``values`` (BOUNDS + ROWS, C, ...) of :class:`BNPropagation`."""
    return values[BOUNDS:].double().mean(dim=0).flatten().float()


def follow(
    model: nn.Module,
    statistics: Mapping[str, OutputStatistics],
    image: Tensor | None = None,
    *,
    deviations: float = DEVIATIONS,
) -> dict[str, Tensor]:
    """The input of each quantized layer of ``model``: qualified name -> values (BOUNDS + ROWS, C, ...).

    ``statistics`` are those of the outputs of layers, by name; a batch norm that is still in the model has its own.
    ``image`` are values of the input, (BOUNDS + ROWS, C, 1, 1); ``None`` is a standard normal in each channel, since
    normalized images have these moments. Raises ``ValueError`` where there are no statistics, and for a module or an
    operation through which they cannot be followed.
    """
    forms = [describe_norm(module) for module in model.modules()]
    if not statistics and not any(isinstance(form, NormForm) and form.trained for form in forms):
        raise ValueError(
            f"statistics of {type(model).__name__}: it has no batch norm that has seen training data, which is where "
            "they come from; give trained weights of a model with batch norm, or take images"
        )
    graph = trace(model)
    flow = BNPropagation(graph, statistics, deviations)
    with torch.no_grad(), evaluating(model):
        if image is None:
            first = next((module for _, module in calls(graph) if isinstance(module, _ConvNd | nn.Linear)), None)
            channels = getattr(first, "in_channels", getattr(first, "in_features", 1))
            image = flow.normal(torch.zeros(channels), torch.ones(channels)).to(next(model.parameters()).device)
        try:
            flow.run(image)
        except ValueError as error:  # torch.fx adds lines about its graph
            raise ValueError(first_line(error)) from error
    return flow.inputs


class BNPropagation(fx.Interpreter):
    """Runs a graph on values (BOUNDS + ROWS, C, 1, 1), or (BOUNDS + ROWS, C) after flattening.

    All positions of a map have one distribution, so pooling changes nothing. In truth a mean over positions varies less
    and a maximum is larger, but the statistics do not tell by how much. Padding is taken for more such positions.
    """

    def __init__(self, graph: fx.GraphModule, statistics: Mapping[str, OutputStatistics], deviations: float) -> None:
        super().__init__(graph)
        self.statistics, self.deviations = statistics, deviations
        self.inputs: dict[str, Tensor] = {}
        self.begun = 0

    def normal(self, mean: Tensor, std: Tensor) -> Tensor:
        """Values (BOUNDS + ROWS, C, 1, 1) of normals with these moments, (C,) each, independent of all earlier ones."""
        self.begun += 1
        ends = torch.tensor([-self.deviations, self.deviations])
        rows = torch.cat((ends, standard_normal()[_order(self.begun)])).to(mean)
        return (mean + rows.unsqueeze(1) * std)[..., None, None]

    def run_node(self, n: fx.Node) -> Any:
        try:
            return super().run_node(n)
        except Exception as error:  # whatever a module does with maps of one pixel
            reason = first_line(error)
            owner = type(self.module).__name__
            raise ValueError(
                f"statistics of batch norm cannot be followed through {n.target} of {owner}: {reason}; take images"
            ) from error

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module, x = self.fetch_attr(target), first_argument(args, kwargs)
        if isinstance(module, QuantLayer):
            seen = self.inputs.get(target)
            self.inputs[target] = x if seen is None else torch.cat((seen, x))
        if isinstance(module, (Operand, *_POOLING)):
            return x
        if isinstance(module, _ConvNd | nn.Linear):
            return self._layer(target, module, x)
        form = describe_norm(module)
        if isinstance(form, NormForm) and form.trained:
            made = self.normal(form.mean, form.std)
            return form.rest(made.flatten(1) if x.ndim == 2 else made)
        if form is not None:
            raise ValueError("its statistics were never trained")
        return super().call_module(target, args, kwargs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in _POOLING_FUNCTIONS:
            return first_argument(args, kwargs)
        operands = [*args, *kwargs.values()]
        if len(operands) == 2 and all(isinstance(x, Tensor) and len(x) == BOUNDS + ROWS for x in operands):
            if target in _SUMS:
                return _sum(*operands)
            if target in _PAIRS:
                return _paired(_PAIRS[target], *operands)
        return super().call_function(target, args, kwargs)

    def _layer(self, name: str, layer: Any, x: Tensor) -> Tensor:
        """Output of a layer: from its statistics, else a normal of ``mean = W E[x] + b`` and ``var = W^2 Var[x]``."""
        if name in self.statistics:
            known = self.statistics[name]
            y = self.normal(known.mean, known.std)
        else:
            var, mean = torch.var_mean(x[BOUNDS:].flatten(1), dim=0, correction=0)
            weight = layer.effective_weight() if isinstance(layer, QuantWeighted) else layer.weight
            mean, var = product_mean(layer, weight, mean), product_mean(layer, weight.square(), var)
            y = self.normal(mean if layer.bias is None else mean + layer.bias, var.sqrt())
        return y.flatten(1) if isinstance(layer, nn.Linear) else y


def product_mean(layer: Any, weight: Tensor, mean: Tensor) -> Tensor:
    """``weight E[x]``, (O,): mean output of a convolution or linear layer without bias, whose input has ``mean`` (C,).

    ``weight`` (O, I / groups, ...) is used instead of the layer's own weight. The squared weight, with variances
    instead of means, gives the variance of a sum of independent values. The mean is the same at all positions, also in
    a channel that was flattened.
    """
    if isinstance(layer, _ConvTransposeNd):
        raise ValueError("a transposed convolution sums over other taps at each position")
    taps = weight.flatten(2).sum(dim=2) if weight.ndim > 2 else weight
    groups = getattr(layer, "groups", 1)
    places, rest = divmod(taps.shape[1] * groups, len(mean))
    if rest:
        raise ValueError(f"its input has {len(mean)} channels, but it takes {taps.shape[1] * groups}")
    mean = mean.repeat_interleave(places).reshape(groups, -1, 1)
    return (taps.reshape(groups, -1, taps.shape[1]) @ mean).flatten()


def _order(number: int) -> Tensor:
    """A permutation of the rows, (ROWS,): the ranks of ``k sqrt(p) mod 1`` for the prime ``p`` of that number.

    In Kronecker's sequence, two such orders pair the values of two normals as evenly as independent draws do on
    average, but without randomness.
    """
    steps = torch.arange(1, ROWS + 1, dtype=torch.float64) * math.sqrt(_prime(number))
    return steps.frac().argsort().argsort()


@cache
def _prime(number: int) -> int:
    candidate = 2 if number == 1 else _prime(number - 1) + 1
    while any(candidate % divisor == 0 for divisor in range(2, math.isqrt(candidate) + 1)):
        candidate += 1
    return candidate


def _sum(left: Tensor, right: Tensor) -> Tensor:
    """The sum of independent values; the squares of their deviations from the mean add up, as for normals.

    So ``n`` standard deviations of two normals become ``n`` of their sum, and a constant adds nothing.
    """
    if left is right:
        return left + right
    total = left + right
    means = [x[BOUNDS:].mean(dim=0) for x in (left, right)]
    low, high = (torch.hypot(left[i] - means[0], right[i] - means[1]) for i in range(BOUNDS))
    middle = means[0] + means[1]
    return torch.cat((torch.stack((middle - low, middle + high)), total[BOUNDS:]))


def _paired(function: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> Tensor:
    """``function`` of independent values; its bounds are the extremes over all pairs of the operands' bounds."""
    corners = torch.stack([function(left[i], right[j]) for i, j in product(range(BOUNDS), repeat=2)])
    return torch.cat((torch.stack(corners.aminmax(dim=0)), function(left[BOUNDS:], right[BOUNDS:])))
