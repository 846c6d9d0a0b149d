"""From a trained network and a few images to a quantized student, by the choices that the config has too."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.api.arguments import (
    Images,
    allocation_of,
    check_choices,
    check_mapping,
    check_network,
    check_policies,
    check_widths,
    first_batches,
    hint_for,
    readable,
)
from qtrain.config.compose import compose
from qtrain.convert.calibrate import calibrate
from qtrain.convert.layers import quantizers_of
from qtrain.convert.plan import MakeObserver, Policy
from qtrain.deployment.lint import Finding, lint
from qtrain.models.trial import answer, placed
from qtrain.nn.many_bits import in_use
from qtrain.pipeline.allocate import find_bits, is_search, with_bits
from qtrain.pipeline.conversion import convert, target_of
from qtrain.pipeline.many_bits import joined, settings_by_width
from qtrain.pipeline.prepare import correct_, settle_for_target_
from qtrain.quantizers.base import MakeQuantizer
from qtrain.settings.component import Component
from qtrain.settings.run_settings import QuantizeSettings, RunSettings
from qtrain.spec import Allocation, Batch, Granularity, LayerBits
from qtrain.utils.copies import copied
from qtrain.utils.errors import one_line
from qtrain.utils.eval_mode import evaluating

RECORD = "qtrain_record"
"""Attribute of a student that holds its :class:`Record`."""


@dataclass(frozen=True)
class Report:
    """What :func:`quantize` did: bits of each layer, and what it left in full precision, with the reason for each.

    ``skipped`` are layers, and parameters that are multiplied without being a layer's, by qualified name. ``findings``
    are what a target does not compute with the integers that are stored, if one was asked about.
    """

    layers: dict[str, LayerBits]
    skipped: dict[str, str]
    findings: list[Finding] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{name}: weight {bits.weight} bits, input {bits.input} bits" for name, bits in self.layers.items()]
        skipped = (f"{name}: full precision: {reason}" for name, reason in self.skipped.items())
        return "\n".join([*lines, *skipped, *map(str, self.findings)])


@dataclass(frozen=True)
class Record:
    """What is known of a student beside its tensors.

    That is the report, the size (C, H, W) of the images it takes, and whether it is made for a target.
    """

    report: Report
    size: tuple[int, ...]
    for_target: bool = False


def quantize(
    model: nn.Module,
    images: Images,
    *,
    weight_bits: int = 4,
    input_bits: int = 4,
    ends: LayerBits | None = LayerBits(8, 8),  # noqa: B008 - immutable
    bits: str | Mapping[str, LayerBits | tuple[int, int]] | None = None,
    budgets: Mapping[str, float | str] | None = None,
    weight: str | MakeQuantizer | None = None,
    input: str | MakeQuantizer | None = None,
    weight_observer: str | MakeObserver | None = None,
    input_observer: str | MakeObserver | None = None,
    granularity: str | Granularity | None = None,
    policies: Mapping[str, Policy] | None = None,
    fold: str | None = None,
    equalize: str | Callable[..., None] | None = None,
    rounding: str | Callable[..., None] | None = None,
    bias: str | Callable[..., None] | None = None,
    operations: Mapping[str, int] | None = None,
    widths: Sequence[int] | None = None,
    target: str | None = None,
    options: Sequence[str] = (),
    seed: int = 0,
) -> nn.Module:
    """A quantized and calibrated copy of ``model``, in eval mode: layers are found, swapped and calibrated.

    ``model`` is any network of one input; ``images`` are a few batches of its training images, of which the first eight
    serve. All layers get ``weight_bits`` and ``input_bits``, those that read the image or give the logits ``ends``
    (``None``: as the rest); or each the bits that ``bits`` gives it by its qualified name, and the others full
    precision. ``bits="integer_program"``, or another search of ``conf/allocate``, finds the bits of each layer within
    ``budgets``: a number, ``"120 kB"`` or a percentage of what ``weight_bits`` and ``input_bits`` cost in all layers,
    by the cost's name (``size_bytes``, ``bops``); both at most 100 % if there are none. A search that measures losses
    takes the labels beside the images, or what the network itself predicts.

    The other choices are those of the config. Each is a name from ``conf/`` (``weight="lsq_plus"``,
    ``rounding="brecq"``, ``granularity="channel"``) or an object: for quantizers and observers a constructor that
    lacks only its ``spec`` or ``granularity``. ``None`` leaves the config's default. ``fold`` is ``none``, ``before``
    or ``training``. ``target`` is the runtime that the student is for, ``onnxruntime``, ``openvino`` or ``tensorrt``:
    what it computes in integers between the layers is quantized too, and each tensor once. Biases are then rounded to
    its steps, by half a step at most. ``operations`` are bits of such operations by kind (``add``, ``matmul``,
    ``softmax``, ...), with a target or without. ``widths``, as ``[8, 4, 2]``, are those of one student of many bits, in
    the place of ``weight_bits`` and ``input_bits``; :func:`set_bits` chooses among them. ``options`` are further
    overrides, as on the command line: ``["quantize.weight.init=range"]``.

    :func:`describe` says what was left in full precision. The student trains with :func:`distill` or in a loop of one's
    own. Raises ``ValueError``, in one line, for a choice that does not exist or does not fit the network.

    >>> import torch, qtrain
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(),
    ...                               torch.nn.Linear(8 * 36, 10))
    >>> student = qtrain.quantize(network, torch.rand(16, 3, 8, 8), weight_bits=4, input_bits=4, ends=None)
    >>> print(qtrain.describe(student))
    0: weight 4 bits, input 4 bits
    3: weight 4 bits, input 4 bits
    """
    named = {
        "quantizer@quantize.weight": weight, "quantizer@quantize.input": input,
        "observer@quantize.weight_observer": weight_observer, "observer@quantize.input_observer": input_observer,
        "equalize@quantize.equalize": equalize, "rounding@quantize.rounding": rounding, "bias@quantize.bias": bias,
        "granularity@quantize.weight.granularity": granularity,
    }  # fmt: skip
    check_network("quantize: model", model)
    if layers := quantizers_of(model):
        raise ValueError(f"quantize: model is a student already, it has {next(iter(layers))}; give the trained network")
    check_mapping("quantize: operations", operations, "{'add': 8}")
    check_mapping("quantize: budgets", budgets, "{'size_bytes': '120 kB'}")
    check_policies(policies)
    check_choices({key.rpartition(".")[2]: choice for key, choice in named.items()})
    check_widths(widths, ends)
    images = readable(images)
    overrides = [f"{key}={choice}" for key, choice in named.items() if isinstance(choice, str)]
    overrides += [f"quantize.bits.weight={weight_bits}", f"quantize.bits.input={input_bits}", f"seed={seed}"]
    overrides += [f"quantize.operations.{kind}={width}" for kind, width in (operations or {}).items()]
    overrides += _searched(bits, budgets)
    overrides += [] if widths is None else [f"many_bits.widths={list(widths)}"]
    overrides += [] if target is None else [f"target={target}"]
    overrides += [] if fold is None else [f"quantize.fold={fold}"]
    settings = compose([*overrides, *_ends(ends), *options])
    given = {key.rpartition(".")[2]: choice for key, choice in named.items() if not isinstance(choice, str)}
    chosen = _with_objects(settings.quantize, given, None if isinstance(bits, str) else bits, policies)
    settings = replace(settings, quantize=chosen)
    model = _copy(model)
    if alone := settings_by_width(settings):
        batches = _batches(settings, model, images)
        return joined({width: _quantized(own, copied(model), batches) for width, own in alone.items()}).eval()
    if is_search(settings):
        images = images if isinstance(images, Tensor) else list(islice(images, settings.allocate.batches))
        settings = with_bits(settings, _found_bits(settings, copied(model), images))
    return _quantized(settings, model, _batches(settings, model, images))


def _copy(model: nn.Module) -> nn.Module:
    """Raises ``ValueError`` for a network that torch cannot copy."""
    try:
        return copied(model)
    except Exception as error:  # whatever a network keeps that has no copy
        raise ValueError(
            f"quantize: {type(model).__name__} cannot be copied ({one_line(error)}); a weight that is computed from "
            "others becomes plain by torch.nn.utils.prune.remove or remove_weight_norm"
        ) from error


def describe(student: nn.Module, target: str | None = None) -> Report:
    """What :func:`quantize` did to ``student``, and what the runtime ``target`` will do with it, if one is named.

    Of a student of many bits, what was done for the width in use. Raises ``ValueError`` for a network that did not come
    from :func:`quantize`, and for a target that does not exist.

    >>> import torch, qtrain
    >>> network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU(), torch.nn.Linear(4, 4))
    >>> student = qtrain.quantize(network, torch.rand(2, 4), weight_bits=7, ends=None, target="onnxruntime")
    >>> qtrain.describe(student).layers["0"]
    LayerBits(weight=7, input=4)
    >>> for finding in qtrain.describe(student, "onnxruntime").findings:
    ...     print(finding)
    0: size only: weights of 7 bits are computed in 8, inputs of 4 bits are computed in 8
    2: size only: weights of 7 bits are computed in 8, inputs of 4 bits are computed in 8
    1: float: gelu: it has integers for sigmoid, leaky ReLU, hard sigmoid and hard swish only
    """
    record = record_of(student)
    report, chosen = record.report, None if target is None else target_of(compose([f"target={target}"]))
    if chosen is None:
        return report
    example = placed(torch.zeros(1, *record.size), student)
    return replace(report, findings=lint(in_use(student), chosen, example, report.skipped))


def record_of(student: nn.Module) -> Record:
    """What is known of ``student``. Raises ``ValueError`` for a network that :func:`quantize` did not make."""
    check_network("student", student)
    found = vars(in_use(student)).get(RECORD)
    if not isinstance(found, Record):
        raise ValueError(f"{type(student).__name__} is no student of qtrain.quantize; quantize it first")
    return found


def _batches(settings: RunSettings, model: nn.Module, images: Images) -> list[Tensor]:
    """The images that calibration looks at, as ``model`` takes them. Raises ``ValueError`` where it does not."""
    batches = [placed(batch, model) for batch in first_batches(images, settings.quantize.calibration_batches)]
    example = batches[0][:1]
    answer(model, example, where="quantize", hint=hint_for(example.shape))
    return batches


def _found_bits(settings: RunSettings, model: nn.Module, images: Images) -> Allocation:
    """What the search of ``settings`` finds for ``model``, which is of no use afterwards."""
    given = [images] if isinstance(images, Tensor) else list(images)
    batches, seen = [], 0
    with evaluating(model), torch.no_grad():
        for image, one in zip(_batches(settings, model, given), given, strict=False):
            labels = one[1] if isinstance(one, tuple | list) and len(one) > 1 else model(image).argmax(1)
            index = torch.arange(seen, seen + len(image), device=image.device)
            batches.append(Batch(image, labels.to(image.device), index))
            seen += len(image)
        return find_bits(settings, model, batches, keep=False).allocation


def _searched(bits: object, budgets: Mapping[str, float | str] | None) -> list[str]:
    """The overrides that choose a search and its budgets."""
    if not isinstance(bits, str):
        if budgets is not None:
            raise ValueError("quantize: budgets are for a search; give bits='integer_program', for example")
        return []
    none = [] if budgets is None else ["allocate.budgets.size_bytes=null", "allocate.budgets.bops=null"]
    own = [f"++allocate.budgets.{name}={value}" for name, value in (budgets or {}).items()]
    return [f"allocate@quantize.bits={bits}", *none, *own]


def _quantized(settings: RunSettings, model: nn.Module, images: list[Tensor]) -> nn.Module:
    with torch.random.fork_rng(), evaluating(model):
        torch.manual_seed(settings.seed)
        converted = convert(settings, model, images[0][:1])
        calibrate(model, images, converted.plans)
        correct_(settings, model, images, converted)
        if settings.target is not None:
            settle_for_target_(model)
        answer(model, images[0][:1], where="quantize: the student")
    bits = {name: plan.bits for name, plan in converted.plans.items()}
    setattr(
        model, RECORD, Record(Report(bits, converted.skipped), tuple(images[0].shape[1:]), settings.target is not None)
    )
    return model.eval()


def _ends(ends: LayerBits | None) -> list[str]:
    if ends is None:
        return ["quantize.bits.first=null", "quantize.bits.last=null"]
    sides = {"weight": ends[0], "input": ends[1]}
    return [f"quantize.bits.{end}.{side}={bits}" for end in ("first", "last") for side, bits in sides.items()]


def _with_objects(
    chosen: QuantizeSettings,
    given: Mapping[str, Any],
    bits: Mapping[str, LayerBits | tuple[int, int]] | None,
    policies: Mapping[str, Policy] | None,
) -> QuantizeSettings:
    """``chosen`` with what the caller gave as an object in the place of the config's choice."""
    fields: dict[str, Any] = {name: _object(f"quantize.{name}", own) for name, own in given.items() if own is not None}
    shared = fields.pop("granularity", None)
    if bits is not None:
        allocation = allocation_of(bits)
        fields["bits"] = _object("quantize.bits", lambda _: allocation)
    chosen = replace(chosen, **fields)
    if shared is not None:
        weight = partial(chosen.weight.build(), granularity=shared.build())
        chosen = replace(chosen, weight=_object("quantize.weight", weight))
    if policies is not None:
        chosen = replace(chosen, policies={name: _object("quantize.policies", own) for name, own in policies.items()})
    return chosen


def _object(key: str, value: Any) -> Component:
    return Component(key=key, plain={}, target=lambda: value)
