"""The objective: what each term computes, that it teaches the student, and that nothing reaches the teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtrain.distillation.base import Term
from qtrain.distillation.hard import Hard
from qtrain.distillation.hint import Hint
from qtrain.distillation.objective import Objective
from qtrain.distillation.soft import Soft
from qtrain.functional.losses import hard_loss, soft_target_loss
from qtrain.models.factory import create_model
from qtrain.models.taps import FeatureTaps, feature_shapes
from qtrain.models.teacher import FrozenTeacher
from qtrain.schedules.linear import Linear
from qtrain.spec import StepOutputs


def model(width: float, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return create_model(name="cifar_resnet8", num_classes=10, in_channels=1, width=width)


def bound(objective: Objective, student: nn.Module, teacher: nn.Module) -> Objective:
    objective.bind_(
        feature_shapes(student, objective.student_taps, (1, 1, 8, 8)),
        feature_shapes(teacher, objective.teacher_taps, (1, 1, 8, 8)),
    )
    return objective


def full_objective() -> Objective:
    hint = Hint(student_layers=["layer1", "layer3"], teacher_layers=["layer2", "layer3"], weight=0.3)
    return Objective(terms={"hard": Hard(weight=0.5), "soft": Soft(weight=0.5, temperature=2.0), "hint": hint})


def step(student: nn.Module, teacher: FrozenTeacher, objective: Objective) -> dict[str, Tensor]:
    """One batch, always the same; the labels are what the teacher thinks, so that the terms do not contradict."""
    image = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    teacher_logits, teacher_features = teacher(image)
    with FeatureTaps(student, objective.student_taps) as taps:
        logits, features = taps.forward_with_features(image)
    losses: dict[str, Tensor] = objective(
        StepOutputs(logits, teacher_logits.argmax(1), features, teacher_logits, teacher_features)
    )
    return losses


def test_the_loss_falls_and_gradients_reach_student_and_regressors_but_not_the_teacher() -> None:
    student, teacher_model = model(0.5, 0), model(1.0, 1)
    with torch.no_grad():
        teacher_model.get_submodule("linear").weight.mul_(20)  # an opinion to learn, where a fresh model has none
    objective = bound(full_objective(), student, teacher_model)
    teacher = FrozenTeacher(teacher_model, names=objective.teacher_taps)
    before = {name: tensor.clone() for name, tensor in teacher_model.state_dict().items()}
    optimizer = torch.optim.Adam([*student.parameters(), *objective.parameters()], lr=3e-3)
    totals: list[dict[str, float]] = []
    for _ in range(12):
        losses = step(student, teacher, objective)
        totals.append({name: loss.item() for name, loss in losses.items()})
        optimizer.zero_grad()
        losses["total"].backward()
        if len(totals) == 1:
            for name, parameter in [*student.named_parameters(), *objective.named_parameters()]:
                assert parameter.grad is not None, name
                assert parameter.grad.abs().sum() > 0, name
        optimizer.step()
    for name in ("hard", "soft", "hint", "total"):
        assert totals[-1][name] < 0.8 * totals[0][name], name
    assert len(list(objective.parameters())) == 2
    for name, parameter in teacher_model.named_parameters():
        assert not parameter.requires_grad, name
        assert parameter.grad is None, name
    for name, tensor in teacher_model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name}: batch statistics too stay as they were"


def test_the_total_is_the_weighted_sum() -> None:
    student, teacher_model = model(0.5, 0), model(1.0, 1)
    objective = bound(full_objective(), student, teacher_model)
    losses = step(student, FrozenTeacher(teacher_model, names=objective.teacher_taps), objective)
    expected = 0.5 * losses["hard"] + 0.5 * losses["soft"] + 0.3 * losses["hint"]
    torch.testing.assert_close(losses["total"], expected)
    assert all(loss.ndim == 0 for loss in losses.values())


def test_terms_are_their_functions() -> None:
    logits, teacher, target = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    outputs = StepOutputs(logits, target, teacher_logits=teacher)
    assert torch.equal(Hard(label_smoothing=0.1)(outputs), hard_loss(logits, target, 0.1))
    torch.testing.assert_close(Soft(temperature=3.0)(outputs), soft_target_loss(logits, teacher, 3.0))


def test_weights_and_temperature_follow_their_schedules_in_place() -> None:
    soft = Soft(weight=Linear(start=1.0, end=0.0), temperature=Linear(start=4.0, end=2.0))
    objective = Objective(terms={"hard": Hard(), "soft": soft})
    weights, temperature = objective.weights, soft.value
    objective.set_progress_(0.5)
    assert objective.weights is weights
    assert weights.tolist() == [1.0, 0.5]
    assert soft.value is temperature
    assert temperature.item() == 3.0


def test_a_schedule_recompiles_nothing() -> None:
    graphs = 0

    def counting(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    soft = Soft(weight=Linear(start=1.0, end=0.1), temperature=Linear(start=4.0, end=2.0))
    objective = Objective(terms={"hard": Hard(), "soft": soft})
    compiled = torch.compile(objective, backend=counting, fullgraph=True)
    outputs = StepOutputs(torch.randn(4, 5), torch.tensor([0, 1, 2, 3]), {}, torch.randn(4, 5), {})
    for progress in (0.0, 0.5, 1.0):
        objective.set_progress_(progress)
        assert torch.equal(compiled(outputs)["total"], objective(outputs)["total"])
    assert graphs == 1


def test_terms_given_as_none_are_left_out() -> None:
    assert list(Objective(terms={"hard": Hard(), "soft": None}).terms) == ["hard"]
    with pytest.raises(ValueError, match="Objective: no terms; name at least one, for instance objective=hard"):
        Objective(terms={"soft": None})


@pytest.mark.parametrize("terms", [{"hard": Hard()}, {"hard": Hard(), "soft": Soft()}])
def test_the_objective_says_whether_it_needs_a_teacher(terms: dict[str, Term]) -> None:
    objective = Objective(terms=terms)
    assert objective.needs_teacher == ("soft" in terms)
    assert objective.teacher_terms == [name for name in terms if name != "hard"]


@pytest.mark.parametrize(
    ("student", "teacher", "regressor"),
    [
        ((1, 8, 4, 4), (1, 16, 4, 4), (16, 8, 1, 1)),
        ((1, 8, 8, 8), (1, 16, 4, 4), (16, 8, 1, 1)),  # the larger grid is pooled to the smaller, whosever it is
        ((1, 8, 4, 4), (1, 16, 8, 8), (16, 8, 1, 1)),
        ((1, 9, 8), (1, 9, 12), (12, 8)),  # tokens
        ((1, 8), (1, 12), (12, 8)),  # vectors
    ],
)
def test_hints_between_layers_of_any_kind(
    student: tuple[int, ...], teacher: tuple[int, ...], regressor: tuple[int, ...]
) -> None:
    hint = Hint(student_layers=["s"], teacher_layers=["t"])
    hint.bind_({"s": student}, {"t": teacher})
    assert [tuple(p.shape) for p in hint.parameters()] == [regressor]
    mine = torch.randn(3, *student[1:], requires_grad=True)
    theirs = torch.randn(3, *teacher[1:], requires_grad=True)
    loss = hint(StepOutputs(torch.zeros(3, 2), torch.zeros(3), {"s": mine}, None, {"t": theirs}))
    loss.backward()
    assert mine.grad is not None
    assert theirs.grad is None


def test_a_hint_that_cannot_be_compared_is_refused() -> None:
    hint = Hint(student_layers=["s"], teacher_layers=["t"])
    with pytest.raises(ValueError, match=r"Hint: 's' gives \(1, 8, 4, 4\) and 't' gives \(1, 9, 12\) for one image"):
        hint.bind_({"s": (1, 8, 4, 4)}, {"t": (1, 9, 12)})
    with pytest.raises(ValueError, match="lists of equal length"):
        Hint(student_layers=["a", "b"], teacher_layers=["a"])


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Hard: label_smoothing must be in \[0, 1\), got 1.2"):
        Hard(label_smoothing=1.2)
    with pytest.raises(ValueError, match="Soft: temperature must be positive, got 0"):
        Soft(temperature=0.0)


def test_balance_multiplies_each_term_in_the_total_and_not_in_the_losses() -> None:
    """0.5 * 2 * hard + 0.25 * 3 * soft; a balance of 1 is that of a new objective."""
    logits, teacher, target = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    objective = Objective(terms={"hard": Hard(weight=0.5), "soft": Soft(weight=0.25, temperature=3.0)})
    outputs = StepOutputs(logits, target, teacher_logits=teacher)
    hard, soft = hard_loss(logits, target), soft_target_loss(logits, teacher, 3.0)
    torch.testing.assert_close(objective(outputs)["total"], 0.5 * hard + 0.25 * soft)
    objective.balance.copy_(torch.tensor([2.0, 3.0]))
    losses = objective(outputs)
    torch.testing.assert_close(losses["total"], hard + 0.75 * soft)
    assert torch.equal(losses["hard"], hard) and torch.equal(losses["soft"], soft)
    assert "balance" not in objective.state_dict()
