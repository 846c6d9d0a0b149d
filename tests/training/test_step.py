"""One step of a student beside a teacher that learns: whose gradient goes where."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qtrain.distillation.hard import Hard
from qtrain.distillation.layers import LayerTerm
from qtrain.distillation.objective import Objective
from qtrain.distillation.soft import Soft
from qtrain.spec import StepOutputs
from qtrain.training.step import LearningTeacher, StudentStep


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3))


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, 2, 2, generator=generator), torch.randint(0, 3, (6,), generator=generator)


def objective(*names: str) -> Objective:
    terms = {"hard": Hard(weight=0.5), "soft": Soft(weight=0.5, temperature=2.0)}
    return Objective(terms={name: terms[name] for name in names})


def step(student_terms: tuple[str, ...], teacher_terms: tuple[str, ...]) -> StudentStep:
    teacher = LearningTeacher(model=network(1), objective=objective(*teacher_terms))
    return StudentStep(student=network(0), objective=objective(*student_terms), teacher=teacher)


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def test_total_is_the_sum_and_the_teachers_losses_have_a_name(batch: tuple[Tensor, Tensor]) -> None:
    losses = step(("hard", "soft"), ("hard", "soft"))(*batch)
    assert set(losses) == {"hard", "soft", "teacher/hard", "teacher/soft", "teacher/total", "total"}
    own = 0.5 * losses["hard"] + 0.5 * losses["soft"]
    torch.testing.assert_close(losses["total"], own + losses["teacher/total"])


def test_no_gradient_passes_between_student_and_learning_teacher(batch: tuple[Tensor, Tensor]) -> None:
    """Each one's gradient is what it would be beside a frozen other."""
    both = step(("hard", "soft"), ("hard", "soft"))
    both(*batch)["total"].backward()
    image, target = batch
    assert both.teacher is not None
    alone = StudentStep(student=network(0), objective=objective("hard", "soft"))
    with torch.no_grad():
        answer = network(1)(image)
    alone(image, target, answer)["total"].backward()
    swapped = StudentStep(student=network(1), objective=objective("hard", "soft"))
    with torch.no_grad():
        answer = network(0)(image)
    swapped(image, target, answer)["total"].backward()
    for mine, reference in ((both.student, alone.student), (both.teacher.model, swapped.student)):
        for got, expected in zip(gradients(mine), gradients(reference), strict=True):
            torch.testing.assert_close(got, expected)


class Undetached(LayerTerm):
    """A term of somebody's own that does not stop the other's gradient itself."""

    rule = "any"

    def comparable(self, student: object, teacher: object) -> bool:
        return True

    def compare(self, pair: int, student: Tensor, teacher: Tensor) -> Tensor:
        return nn.functional.mse_loss(student, teacher)

    def forward(self, outputs: StepOutputs) -> Tensor:
        return self.compare(0, outputs.features["1"], outputs.teacher_features["1"])


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_no_gradient_passes_through_features(who: str, batch: tuple[Tensor, Tensor]) -> None:
    """Whose objective is of labels alone has their gradient, however the other's term looks at its features."""
    hard = Objective(terms={"hard": Hard(weight=0.5)})
    looks = Objective(terms={"own": Undetached(student_layers=["1"], weight=1.0)})
    own, taught = (looks, hard) if who == "teacher" else (hard, looks)
    both = StudentStep(student=network(0), objective=own, teacher=LearningTeacher(model=network(1), objective=taught))
    both(*batch)["total"].backward()
    assert both.teacher is not None
    model = network(1 if who == "teacher" else 0)
    (0.5 * nn.functional.cross_entropy(model(batch[0]), batch[1])).backward()
    for got, expected in zip(
        gradients(both.teacher.model if who == "teacher" else both.student), gradients(model), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_teacher_with_labels_alone_is_trained_as_without_a_student(batch: tuple[Tensor, Tensor]) -> None:
    """Apprentice's joint training: the teacher does not know of the student."""
    both = step(("hard", "soft"), ("hard",))
    both(*batch)["total"].backward()
    assert both.teacher is not None
    model = network(1)
    (0.5 * nn.functional.cross_entropy(model(batch[0]), batch[1])).backward()
    for got, expected in zip(gradients(both.teacher.model), gradients(model), strict=True):
        torch.testing.assert_close(got, expected)


def test_the_step_compiles_as_one_graph(batch: tuple[Tensor, Tensor]) -> None:
    both = step(("hard", "soft"), ("hard", "soft"))
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for name, loss in both(*batch).items():
        torch.testing.assert_close(compiled(*batch)[name], loss)
