"""A converted model with quantizers of every layer at every width, so that any allocation is a few assignments away.

A search over bits evaluates one model at many allocations. Conversion and observation would take most of its time, and
what they see does not depend on the bits. So both are done once here, and each width has calibrated quantizers.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product, starmap
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from qtrain.convert.calibrate import observe_inputs, observe_weights
from qtrain.convert.layers import Quantizable
from qtrain.convert.plan import IN_FLOAT, LayerPlan, Policy, plan_layers
from qtrain.convert.swap import swap_layers
from qtrain.convert.tensors import readings, share_quantizers_, sharing
from qtrain.models.stored_weight import bits_as_they_are, weight_tensors
from qtrain.nn import Operand, QuantLayer
from qtrain.nn.folded import FoldedWeight
from qtrain.observers.base import Observer
from qtrain.quantizers.base import MakeQuantizer, Quantizer
from qtrain.spec import FULL_PRECISION, Allocation, Choice, LayerBits, LayerNames, Role
from qtrain.utils.errors import errors_of
from qtrain.utils.sharing import place_of
from qtrain.utils.suggestions import close_matches

ROLES: tuple[Role, Role] = ("weight", "input")

Quantizers = Mapping[str, Mapping[Role, Mapping[int, Quantizer]]]
"""Layer -> role -> bits -> its quantizer."""

Groups = Mapping[str, tuple[str, ...]]
"""The first layer of a group -> all layers of the group, itself included."""


class Widths(NamedTuple):
    """The bit widths to choose from; ``FULL_PRECISION`` among them allows floating point."""

    weight: tuple[int, ...]
    input: tuple[int, ...]


@final
@dataclass(frozen=True, eq=False)
class QuantizerBank:
    """``model``, converted, and ``quantizers[layer][role][bits]``, calibrated; made by :func:`make_bank`.

    ``options`` are the bits that each layer may have, and ``names`` the layers with weights. ``pinned`` are what
    policies decide, whatever an allocation says; ``fixed`` the bits of layers that it does not name. ``tied``
    are layers with one weight, and layers that share the quantizer of a tensor. Such a group has one quantizer, which
    is stored and scored with its first layer. So all layers of a group should get the same bits.
    """

    model: nn.Module
    quantizers: Quantizers
    options: Mapping[str, tuple[LayerBits, ...]]
    pinned: Mapping[tuple[str, Role], int]
    fixed: Allocation
    tied: Mapping[Role, Groups]
    plans: Mapping[str, LayerPlan]
    tensors: Sequence[list[str]] = ()
    names: LayerNames = field(default_factory=LayerNames)
    _folded: Mapping[str, FoldedWeight] = field(default_factory=dict)
    _sizes: dict[Choice, tuple[int, int]] = field(default_factory=dict)

    @property
    def layers(self) -> dict[str, QuantLayer]:
        """The layers of ``model`` that have quantizers, in the order in which they run."""
        found = {name: self.model.get_submodule(name) for name in self.quantizers}
        return {name: layer for name, layer in found.items() if isinstance(layer, QuantLayer)}

    def choices(self, role: Role | None = None) -> Iterator[Choice]:
        """Every weight and every input at every width; of layers that are tied only the first one's."""
        followers = {of: {name for names in self.tied[of].values() for name in names[1:]} for of in ROLES}
        for name, roles in self.quantizers.items():
            for of, widths in roles.items():
                if role in (None, of) and name not in followers[of]:
                    yield from (Choice(name, of, bits) for bits in widths)

    def use_(self, allocation: Allocation) -> None:
        """Give ``model`` the quantizers of ``allocation``, as if it had been converted and calibrated at these bits.

        Layers that it does not name have their fixed bits, or else full precision. Raises ``ValueError``, and changes
        nothing, for a layer that does not exist and for bits that the bank does not have.
        """
        for name in allocation:
            if name not in self.options:
                close = close_matches(name, self.options)
                raise ValueError(f"allocation: {name!r} is not a layer that can be quantized{close}")
        chosen: dict[tuple[str, Role], int] = {}
        for name in self.options:
            bits = allocation.get(name, self.fixed.get(name, IN_FLOAT))
            for role in self._roles(name):
                asked = self.pinned.get((name, role), getattr(bits, role))
                widths = self.quantizers.get(name, {}).get(role, {})
                if asked not in (*widths, FULL_PRECISION):
                    raise ValueError(
                        f"allocation: the {role} of layer {name!r} has no quantizer of {asked} bits here; its widths "
                        f"are {sorted(widths) or FULL_PRECISION}"
                    )
                chosen[name, role] = asked
        self._assign_(chosen)
        if self.tensors:
            plans = {name: replace(plan, bits=_chosen(chosen, name)) for name, plan in self.plans.items()}
            share_quantizers_(self.model, plans, list(self.tensors))

    def put_(self, choices: Iterable[Choice]) -> None:
        """Quantize what ``choices`` name and nothing else; a choice counts for all layers that are tied to its layer.

        Policies and fixed bits are left out, since a score asks for the effect of a single choice.
        """
        chosen = {}
        for choice in choices:
            for name in self.tied[choice.role].get(choice.layer, (choice.layer,)):
                chosen[name, choice.role] = choice.bits
        self._assign_(chosen)

    def storage_bits(self, layer: str, role: Role, bits: int) -> int:
        """Stored bits of a weight with its scales, or of an input quantizer; 0 where another layer of a group has them.

        In full precision a weight has the bits of its own type for each element, and an input 0.
        """
        owner = next((names[0] for names in self.tied[role].values() if layer in names), layer)
        if owner != layer:
            return 0
        return self._measured(Choice(layer, role, bits))[0]

    def operand_bits(self, layer: str, bits: int) -> int:
        """How wide a factor the weight of ``layer`` is at ``bits``: 32 where its values are looked up in a table."""
        return self._measured(Choice(layer, "weight", bits))[1]

    def _roles(self, name: str) -> tuple[Role, ...]:
        """What of a layer has bits: an operand has no weight, and the input of an embedding is a number of a row."""
        module = self.model.get_submodule(name)
        return ("input",) if isinstance(module, Operand) else ROLES[: 1 if isinstance(module, nn.Embedding) else 2]

    def _measured(self, choice: Choice) -> tuple[int, int]:
        """Stored bits of ``choice``, and the width of its factor in a product."""
        if choice not in self._sizes:
            self._sizes[choice] = self._measure(choice)
        return self._sizes[choice]

    @torch.no_grad()
    def _measure(self, choice: Choice) -> tuple[int, int]:
        layer, role, bits = choice
        module = self.model.get_submodule(layer)
        if role == "input":
            return 0 if bits == FULL_PRECISION else self.quantizers[layer][role][bits].storage_bits(), bits
        if bits == FULL_PRECISION or not isinstance(module, QuantLayer) or isinstance(module, Operand):
            return bits_as_they_are(weight_tensors(module)), bits
        stored = self.quantizers[layer][role][bits].quantize(module.effective_weight())
        return stored.nbits, stored.operand_bits

    def _assign_(self, chosen: Mapping[tuple[str, Role], int]) -> None:
        for name, layer in self.layers.items():
            for role, widths in self.quantizers[name].items():
                quantizer = widths.get(chosen.get((name, role), FULL_PRECISION))
                if quantizer is not None:
                    quantizer.train(layer.training)
                setattr(layer, f"{role}_quantizer", quantizer)
            layer.tensor_quantizer = None
            if name in self._folded:  # a weight in full precision is not rounded, so it is not merged for rounding
                setattr(layer, "weight_transform", self._folded[name] if layer.weight_quantizer is not None else None)  # noqa: B010


def make_bank(
    model: nn.Module,
    found: Quantizable,
    recipe: LayerPlan,
    widths: Widths,
    images: Sequence[Tensor],
    policies: Mapping[str, Policy] | None = None,
    *,
    fixed: Allocation | None = None,
    share: bool = False,
    finish: Callable[[nn.Module], object] | None = None,
) -> QuantizerBank:
    """Convert ``model`` in place, and calibrate quantizers of every layer at every one of ``widths``.

    The arguments up to ``policies`` are those of a conversion; ``images`` are calibration batches (N, C, H, W).
    ``fixed`` are layers with bits of their own; operands of operations that it does not name are in full precision.
    ``share`` lets the readers of one tensor share its quantizer (:mod:`qtrain.convert.tensors`), for a target that
    quantizes each tensor once; an observer sees a tensor once there, however many layers read it. ``finish`` is called
    with the converted model before its weights are observed, to merge batch norm for training for instance. The model
    has the fixed bits at the end, and all else is in full precision. Raises ``ValueError`` for what conversion refuses
    at any of the widths.
    """
    fixed = {**dict.fromkeys(found.operands, IN_FLOAT), **(fixed or {})}

    def plans_at(bits: LayerBits, kept: Allocation = fixed) -> dict[str, LayerPlan]:
        return plan_layers(found, {name: kept.get(name, bits) for name in found.layers}, recipe, policies)

    tried = {
        "weight": [plans_at(LayerBits(bits, FULL_PRECISION)) for bits in widths.weight],
        "input": [plans_at(LayerBits(FULL_PRECISION, bits)) for bits in widths.input],
    }
    allowed: dict[str, dict[Role, list[int]]] = {
        name: {role: sorted({getattr(p[name].bits, role) for p in tried[role]}) for role in ROLES}
        for name in found.layers
    }
    one, other = plans_at(LayerBits(1, 1), {}), plans_at(LayerBits(2, 2), {})
    pinned = {
        (name, role): int(getattr(one[name].bits, role))
        for name in found.layers
        for role in ROLES
        if getattr(one[name].bits, role) == getattr(other[name].bits, role)
    }
    plans = {name: replace(one[name], bits=_most(roles)) for name, roles in allowed.items()}
    swap_layers(model, found, plans)
    if finish is not None:
        finish(model)
    tensors = readings(model, images[0][:1]).tensors if share else []
    with torch.no_grad():
        weights, inputs = observe_weights(model, plans), observe_inputs(model, images, plans)
        quantizers = _quantizers(model, plans, allowed, weights, inputs)
    options = {
        name: tuple(starmap(LayerBits, product(*(_widths(quantizers, name, r, allowed) for r in ROLES))))
        for name in allowed
    }
    folded = {
        name: transform
        for name in quantizers
        if isinstance(transform := getattr(model.get_submodule(name), "weight_transform", None), FoldedWeight)
    }
    inputs_at_one = {name: next(iter(roles.get("input", {}).values()), None) for name, roles in quantizers.items()}
    tied: dict[Role, Groups] = {
        "weight": _tied_weights(model, found, quantizers),
        "input": sharing(plans, inputs_at_one, tensors),
    }
    bank = QuantizerBank(model, quantizers, options, pinned, fixed, tied, plans, tensors, found.weighted, folded)
    bank.use_({})
    return bank


def _quantizers(
    model: nn.Module,
    plans: Mapping[str, LayerPlan],
    allowed: Mapping[str, Mapping[Role, list[int]]],
    weights: Mapping[str, Observer],
    inputs: Mapping[str, Observer],
) -> dict[str, dict[Role, dict[int, Quantizer]]]:
    """Calibrated quantizers like those that conversion put into ``model``, at all ``allowed`` widths."""
    made: dict[tuple[Quantizer, int], Quantizer] = {}
    found: dict[str, dict[Role, dict[int, Quantizer]]] = {}
    for name, roles in allowed.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, QuantLayer):
            continue
        found[name] = {}
        for role, widths in roles.items():
            reference: Quantizer | None = getattr(layer, f"{role}_quantizer")
            if reference is None:
                continue
            make: MakeQuantizer = getattr(plans[name], role)
            seen = (weights if role == "weight" else inputs)[name]
            if seen.shape is None:
                raise ValueError(f"calibrate: layer {name!r} saw no image; give at least one calibration batch")
            at = found[name].setdefault(role, {})
            for bits in widths:
                if bits == FULL_PRECISION:
                    continue
                with errors_of(f"layer {name!r}"):
                    if (reference, bits) not in made:
                        made[reference, bits] = _like(reference, make, bits)
                    at[bits] = made[reference, bits]
                    tensor = None
                    if role == "weight" and not isinstance(layer, Operand):
                        tensor = layer.effective_weight()
                    at[bits].calibrate_(seen.observed(bits)._replace(tensor=tensor))
    return found


def _like(reference: Quantizer, make: MakeQuantizer, bits: int) -> Quantizer:
    """What conversion makes at ``bits`` where it made ``reference``."""
    if bits == int(reference.bits):
        return reference
    quantizer = make(spec=replace(reference.spec, bits=bits))
    quantizer.made_by = reference.made_by
    return quantizer.to(reference.bits.device)


def _widths(
    quantizers: Quantizers, name: str, role: Role, allowed: Mapping[str, Mapping[Role, list[int]]]
) -> list[int]:
    return allowed[name][role] if quantizers.get(name, {}).get(role) else [FULL_PRECISION]


def _tied_weights(model: nn.Module, found: Quantizable, quantizers: Quantizers) -> Groups:
    """Layers with one weight and one quantizer for it."""
    groups: dict[Hashable, list[str]] = {}
    for name in found.layers:
        if places := tuple(map(place_of, weight_tensors(model.get_submodule(name)))):
            own = tuple(quantizers.get(name, {}).get("weight", {}).values())
            groups.setdefault((places, own), []).append(name)
    return {names[0]: tuple(names) for names in groups.values() if len(names) > 1}


def _most(roles: Mapping[Role, Sequence[int]]) -> LayerBits:
    return LayerBits(*(max((b for b in roles[r] if b != FULL_PRECISION), default=FULL_PRECISION) for r in ROLES))


def _chosen(chosen: Mapping[tuple[str, Role], int], name: str) -> LayerBits:
    return LayerBits(*(chosen.get((name, role), FULL_PRECISION) for role in ROLES))
