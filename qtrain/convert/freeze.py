"""Freezing the weights of some layers, while normalization, biases and the other layers go on learning.

PROFIT (Park and Yoo 2020, arXiv 2008.04693) trains all layers first and then in three phases, in which the most
unstable third, two thirds and finally all of them are frozen. The rest then adapts to weights that no longer jump.
"""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from qtrain.nn import QuantWeighted
from qtrain.utils.suggestions import close_matches


def weighted_layers(student: nn.Module) -> dict[str, nn.Module]:
    """Layers of ``student`` with a weight of two or more axes, quantized or not, by qualified name."""
    found = {}
    for name, module in student.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is not None and weight.ndim > 1:
            found[name] = module
    return found


def layers_to_freeze(
    student: nn.Module,
    *,
    patterns: Sequence[str] = (),
    metrics: Mapping[str, float] | None = None,
    share: float | None = None,
) -> list[str]:
    """Names of the layers that match one of ``patterns`` or are among the most unstable ``share``, in model order.

    ``metrics`` are layer name -> instability, one for each layer whose weight is quantized. Raises ``ValueError`` for a
    pattern that matches no layer, and for a ``share`` without metrics.
    """
    layers = weighted_layers(student)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in layers):
            close = close_matches(pattern, layers)
            raise ValueError(f"fit.freeze.layers: pattern {pattern!r} matches no layer with a weight{close}")
    chosen = {name for name in layers if any(fnmatchcase(name, pattern) for pattern in patterns)}
    if share is not None:
        chosen |= set(_most_unstable(layers, metrics or {}, share))
    return [name for name in layers if name in chosen]


def freeze_(student: nn.Module, names: Iterable[str]) -> None:
    """Stop the weight and the weight quantizer of these layers from learning, in place.

    From here on the quantizer is in eval mode. It gathers no statistics, adds no noise and mixes in no raw weights, so
    that the layer computes what will be stored. The optimizer gets no frozen parameters
    (:func:`qtrain.training.optim.parameter_groups`), and projections do not change them.
    """
    layers = weighted_layers(student)
    for name in names:
        layer = layers[name]
        parts = [getattr(layer, part, None) for part in ("weight_quantizer", "weight_transform")]
        for parameter in (layer.weight, *(p for part in parts if part is not None for p in part.parameters())):
            parameter.requires_grad_(False)
        if parts[0] is not None:
            parts[0].eval()


def _most_unstable(layers: Mapping[str, nn.Module], metrics: Mapping[str, float], share: float) -> list[str]:
    if not 0 < share <= 1:
        raise ValueError(f"fit.freeze.share: must be in (0, 1], got {share}; null freezes none by instability")
    if not metrics:
        raise ValueError(
            "fit.freeze.share: nothing is known of how unstable the layers are; let an earlier stage measure it with "
            "+callback@callbacks.instability=instability"
        )
    quantized = [name for name, layer in layers.items() if _has_quantized_weight(layer)]
    if set(metrics) != set(quantized):
        odd = sorted(set(metrics) ^ set(quantized))[0]
        raise ValueError(
            f"fit.freeze.share: instability was measured of other layers than are quantized here ({odd!r} is only in "
            "one of the two); measure it with the same layers quantized, and none of them frozen"
        )
    ranked = sorted(quantized, key=lambda name: -metrics[name])
    return ranked[: max(1, round(share * len(ranked)))]


def _has_quantized_weight(layer: nn.Module) -> bool:
    return isinstance(layer, QuantWeighted) and layer.weight_quantizer is not None
