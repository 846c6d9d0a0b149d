"""One model of several bit widths: students that share their weights, one for each width."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn


@final
class ManyBits(nn.Module):
    """Students of the same network by their width, of which the one of :attr:`bits` computes.

    The students share the parameters of their layers, and have batch norms and quantizers of their own (Yu et al. 2019,
    arXiv 1911.07346, §3.2); :func:`qtrain.convert.many_bits.join` makes it so. Each is an ordinary student, a module
    named ``w8``, ``w4``, ... of this one. Raises ``ValueError`` for fewer than two widths.
    """

    def __init__(self, students: Mapping[int, nn.Module]) -> None:
        super().__init__()
        if len(students) < 2:
            raise ValueError(f"ManyBits: needs at least two widths, got {list(students)}; one width is a plain student")
        self.widths = tuple(sorted(students, reverse=True))
        """All widths, the widest first."""
        self.bits = self.widths[0]
        """The width in use; :meth:`use_` changes it."""
        for width in self.widths:
            self.add_module(label(width), students[width])

    def at(self, bits: int) -> nn.Module:
        """The student of ``bits`` bits, which shares its tensors with this module.

        Raises ``ValueError`` for a width that there is not.
        """
        if type(bits) is not int or bits not in self.widths:
            raise ValueError(f"bits: this student has {', '.join(map(str, self.widths))} bits, not {bits!r}; take one")
        return self.get_submodule(label(bits))

    @property
    def students(self) -> dict[int, nn.Module]:
        """The student of each width, the widest first."""
        return {width: self.at(width) for width in self.widths}

    @property
    def others(self) -> dict[int, nn.Module]:
        """The students of all widths but the widest."""
        return {width: self.at(width) for width in self.widths[1:]}

    def use_(self, bits: int) -> None:
        """Compute with ``bits`` bits from now on; nothing is loaded or copied. Raises as :meth:`at` does."""
        self.at(bits)
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.at(self.bits)(x)
        return logits


def label(bits: int) -> str:
    """What the student of ``bits`` bits is called in names of modules and metrics: ``w4``."""
    return f"w{bits}"


def in_use(student: nn.Module) -> nn.Module:
    """The student of the width in use; ``student`` itself if it has only one."""
    return student.at(student.bits) if isinstance(student, ManyBits) else student


def by_width(student: nn.Module) -> dict[int | None, nn.Module]:
    """The students of all widths, the widest first; ``student`` itself under ``None`` if it has only one."""
    if not isinstance(student, ManyBits):
        return {None: student}
    return {width: student.at(width) for width in student.widths}


@torch.no_grad()
def forward_all(student: nn.Module, x: Tensor) -> Tensor:
    """The logits of ``x`` at the width in use, after a forward at each other width, for hooks that look on."""
    if isinstance(student, ManyBits):
        for width, one in student.students.items():
            if width != student.bits:
                one(x)
    logits: Tensor = student(x)
    return logits
