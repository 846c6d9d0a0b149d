"""Starting a student from the student of an earlier stage: weights, statistics, and learned quantizers."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtrain.convert.layers import PLACES, quant_layers, quantizers_of
from qtrain.models.sharding import whole_state
from qtrain.quantizers.base import Quantizer
from qtrain.spec import FULL_PRECISION, LayerBits


@dataclass(frozen=True)
class StudentState:
    """What is saved of a student: its state dict, and the kind of each of its quantizers by qualified name."""

    tensors: Mapping[str, Tensor]
    kinds: Mapping[str, str]


def student_state_of(student: nn.Module) -> StudentState:
    """The state of ``student`` for a later stage, on the CPU; of a sharded student all ranks must call this."""
    tensors = {name: tensor.cpu().clone() for name, tensor in whole_state(student).items()}
    return StudentState(tensors, {name: _kind(quantizer) for name, quantizer in quantizers_of(student).items()})


@torch.no_grad()
def inherit_weights_(student: nn.Module, student_state: StudentState) -> None:
    """Give ``student`` everything that does not belong to quantizers: weights, biases, statistics.

    Raises ``ValueError`` where the two students are not the same network.
    """
    own = {name: tensor for name, tensor in student.state_dict().items() if not _of_quantizer(name)}
    theirs = {name: tensor for name, tensor in student_state.tensors.items() if not _of_quantizer(name)}
    wrong = [name for name in sorted(own.keys() | theirs.keys()) if _shape(own, name) != _shape(theirs, name)]
    if wrong:
        raise ValueError(
            f"stages: a stage's student has {wrong[0]!r} of shape {_shape(own, wrong[0])}, the one before "
            f"{_shape(theirs, wrong[0])}; all stages of a run must have the same model and the same quantize.operations"
        )
    for name, tensor in own.items():
        tensor.copy_(theirs[name])


@torch.no_grad()
def inherit_quantizers_(student: nn.Module, student_state: StudentState) -> dict[str, LayerBits]:
    """Give each quantizer of ``student`` the state of the earlier stage's quantizer in the same place.

    This is done where both are of the same kind and their states have the same shapes; other quantizers keep their own
    state. The bits are then those of the earlier stage. Returns, for the layers where these differ, the bits that
    ``student`` had before: those that are still to be switched to.
    """
    before = _widths(student)  # all of them first, since layers with one weight share its quantizer
    for name, quantizer in quantizers_of(student).items():
        _take_over_(quantizer, name, student_state)
    after = _widths(student)
    return {name: bits for name, bits in before.items() if bits != after[name]}


def _widths(student: nn.Module) -> dict[str, LayerBits]:
    quantizers = quantizers_of(student)

    def bits(name: str) -> int:
        return int(quantizers[name].bits) if name in quantizers else FULL_PRECISION

    return {name: LayerBits(*(bits(f"{name}.{place}") for place in PLACES)) for name in quant_layers(student)}


def _take_over_(quantizer: Quantizer, name: str, student_state: StudentState) -> None:
    own = quantizer.state_dict()
    theirs = {key: student_state.tensors[f"{name}.{key}"] for key in own if f"{name}.{key}" in student_state.tensors}
    if student_state.kinds.get(name) != _kind(quantizer) or any(_shape(own, key) != _shape(theirs, key) for key in own):
        return
    if int(theirs["bits"]) == int(quantizer.bits) or quantizer.switchable:
        quantizer.load_state_dict(theirs)


def _kind(quantizer: Quantizer) -> str:
    """The classes of a quantizer and of what it wraps, outermost first."""
    names = [type(module).__name__ for module in quantizer.modules() if isinstance(module, Quantizer)]
    return "/".join(names)


def _of_quantizer(name: str) -> bool:
    return any(f".{place}." in f".{name}" for place in (*PLACES, "tensor_quantizer", "gradient_quantizer"))


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None
