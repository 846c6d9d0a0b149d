"""Which layer gets which quantizer: an allocation of bits, one plan for all layers, and policies for some.

An allocation says how many bits each layer has, and the default plan which quantizers use them. A policy changes either
for the layers that it matches. The result is one plan for each layer; conversion and calibration read nothing else.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Protocol, final

from qtrain.convert.layers import Quantizable
from qtrain.observers.base import Observer
from qtrain.observers.squared_error import SquaredError
from qtrain.quantizers.base import MakeQuantizer, Quantizer
from qtrain.spec import FULL_PRECISION, Allocation, Granularity, LayerBits
from qtrain.utils.suggestions import close_matches

IN_FLOAT = LayerBits(FULL_PRECISION, FULL_PRECISION)


class MakeObserver(Protocol):
    """A constructor of an observer that lacks only ``granularity``, which its quantizer decides."""

    def __call__(self, *, granularity: Granularity) -> Observer: ...


def observer_for(quantizer: Quantizer, make: MakeObserver) -> Observer:
    """The observer of what ``quantizer`` rounds; one that asks where codes lie is told."""
    observer = make(granularity=quantizer.granularity)
    if quantizer.shifts_codes and isinstance(observer, SquaredError):
        observer.symmetric = False
    return observer


@final
@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What conversion does to one layer: bits of weight and input, their quantizers, and the observers of these."""

    bits: LayerBits = IN_FLOAT
    weight: MakeQuantizer
    input: MakeQuantizer
    weight_observer: MakeObserver
    input_observer: MakeObserver


@final
@dataclass(frozen=True, kw_only=True)
class Policy:
    """Settings for some layers: those that match a name pattern of ``layers`` and are of one of ``kinds``.

    ``layers`` are patterns of qualified names with ``*`` and ``?``; ``kinds`` are ``conv1d``, ``conv2d``, ``conv3d``,
    ``conv_transpose``, ``linear``, ``embedding``, ``depthwise``, ``pointwise``, ``add``, ``matmul``, ``softmax``,
    ``first`` and ``last``. An empty list matches every layer, but one of the two lists must be given. A setting that is
    ``None`` stays as it is; ``granularity`` is the weight quantizer's. Raises ``ValueError`` where both lists are
    empty, and for a number of bits that does not exist.
    """

    layers: Sequence[str] = field(default=())
    kinds: Sequence[str] = field(default=())
    weight_bits: int | None = None
    input_bits: int | None = None
    weight: MakeQuantizer | None = None
    input: MakeQuantizer | None = None
    granularity: Granularity | None = None
    weight_observer: MakeObserver | None = None
    input_observer: MakeObserver | None = None

    def __post_init__(self) -> None:
        if not self.layers and not self.kinds:
            raise ValueError("Policy: names no layer; give layers=[PATTERN, ...], or kinds=[linear, ...]")
        for name, bits in (("weight_bits", self.weight_bits), ("input_bits", self.input_bits)):
            if bits is not None and bits != FULL_PRECISION and not 1 <= bits <= 16:
                raise ValueError(f"Policy: {name} must be 1..16, or {FULL_PRECISION} for full precision, got {bits}")

    def matches(self, name: str, kinds: Iterable[str]) -> bool:
        """Whether this policy is for the layer ``name`` of these ``kinds``."""
        named = not self.layers or any(fnmatchcase(name, pattern) for pattern in self.layers)
        return named and (not self.kinds or not set(self.kinds).isdisjoint(kinds))

    def applied(self, plan: LayerPlan) -> LayerPlan:
        """``plan`` with the settings of this policy."""
        given = {name: getattr(self, name) for name in ("weight", "input", "weight_observer", "input_observer")}
        changed = replace(plan, **{name: value for name, value in given.items() if value is not None})
        if self.granularity is not None:
            weight_at = partial(changed.weight, granularity=self.granularity)  # type: ignore[call-arg]
            changed = replace(changed, weight=weight_at)
        weight = plan.bits.weight if self.weight_bits is None else self.weight_bits
        input = plan.bits.input if self.input_bits is None else self.input_bits
        return replace(changed, bits=LayerBits(weight, input))


def plan_layers(
    found: Quantizable, allocation: Allocation, recipe: LayerPlan, policies: Mapping[str, Policy] | None = None
) -> dict[str, LayerPlan]:
    """A plan for each of ``found``'s layers: ``recipe`` with the allocation's bits, then the policies in order.

    Of several policies that set the same thing for a layer the last wins. A layer that ``allocation`` does not name
    is in full precision. Raises ``ValueError`` for a name in ``allocation`` that is not a quantizable layer, and for a
    policy, a pattern or a kind that no layer matches.
    """
    for name in allocation:
        if name not in found.layers:
            reason = found.skipped.get(name) or f"no such layer{close_matches(name, found.layers)}"
            raise ValueError(f"allocation: layer {name!r} cannot be quantized: {reason}")
    plans = {name: replace(recipe, bits=allocation.get(name, recipe.bits)) for name in found.layers}
    for title, policy in (policies or {}).items():
        _check_matches(title, policy, found)
        for name in plans:
            if policy.matches(name, found.kinds(name)):
                plans[name] = policy.applied(plans[name])
    return plans


def _check_matches(title: str, policy: Policy, found: Quantizable) -> None:
    for pattern in policy.layers:
        if not any(fnmatchcase(name, pattern) for name in found.layers):
            skipped = [f"{name} ({reason})" for name, reason in found.skipped.items() if fnmatchcase(name, pattern)]
            why = f"; only {skipped[0]}" if skipped else close_matches(pattern, found.layers)
            raise ValueError(f"policies.{title}: pattern {pattern!r} matches no layer that can be quantized{why}")
    present = {kind for name in found.layers for kind in found.kinds(name)}
    for kind in policy.kinds:
        if kind not in present:
            raise ValueError(f"policies.{title}: no layer is of kind {kind!r}; this model has {sorted(present)}")
    if not any(policy.matches(name, found.kinds(name)) for name in found.layers):
        raise ValueError(
            f"policies.{title}: no layer has both a name like {list(policy.layers)} and a kind of {list(policy.kinds)}"
        )
