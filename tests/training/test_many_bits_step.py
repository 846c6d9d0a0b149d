"""One training step of all widths: the sum of what each would learn alone beside the widest."""

from __future__ import annotations

import pytest
import torch

from qtrain.distillation.hard import Hard
from qtrain.distillation.objective import Objective
from qtrain.distillation.soft import Soft
from qtrain.nn.many_bits import ManyBits
from qtrain.training.step import ManyBitsStep, StudentStep
from tests.helpers.many_bits import images, labels, many_bits


def objectives() -> tuple[Objective, Objective]:
    return Objective(terms={"hard": Hard()}), Objective(terms={"soft": Soft(temperature=2.0)})


@pytest.fixture
def student() -> ManyBits:
    return many_bits().train()


def test_losses_are_named_by_width_and_summed(student: ManyBits) -> None:
    wide, narrow = objectives()
    losses = ManyBitsStep(student=student, objective=wide, narrow=narrow)(images(), labels())
    assert list(losses) == ["hard", "total", "w4/soft", "w2/soft"]
    torch.testing.assert_close(losses["total"], losses["hard"] + losses["w4/soft"] + losses["w2/soft"])


def test_gradient_is_the_sum_of_the_widths_and_none_reaches_the_widest_as_teacher(student: ManyBits) -> None:
    wide, narrow = objectives()
    ManyBitsStep(student=student, objective=wide, narrow=narrow)(images(), labels())["total"].backward()
    got = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad(set_to_none=True)
    StudentStep(student=student.at(8), objective=wide)(images(), labels())["total"].backward()
    with torch.no_grad():
        answer = student.at(8)(images())
    for bits in (4, 2):
        StudentStep(student=student.at(bits), objective=narrow)(images(), labels(), answer)["total"].backward()
    wanted = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, msg=name)


def test_all_widths_compile_to_one_graph(student: ManyBits) -> None:
    wide, narrow = objectives()
    step = ManyBitsStep(student=student, objective=wide, narrow=narrow)
    torch.compiler.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend=backend)
    for progress in (0.0, 0.5):
        wide.set_progress_(progress)
        narrow.set_progress_(progress)
        compiled(images(), labels())["total"].backward()
    assert len(graphs) == 1
    torch.compiler.reset()
