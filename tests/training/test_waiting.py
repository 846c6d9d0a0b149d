"""Nothing of a training step waits for a number: forward, every objective, backward, optimizer, projection."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import qtrain
from qtrain.config.compose import compose
from qtrain.models.taps import feature_shapes
from qtrain.nn.project import project_weights_
from qtrain.quantizers.hooks import begin_step_
from qtrain.settings.conf_dir import conf_dir
from qtrain.training.optim import parameter_groups
from qtrain.training.step import StudentStep
from tests.helpers.no_wait import NoWait

OBJECTIVES = sorted(path.stem for path in (conf_dir() / "objective").glob("*.yaml"))


class Net(nn.Module):
    """Two convolutions, under the names that the objectives look at."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.layer2, self.layer3 = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.layer3(self.layer2(self.norm(self.layer1(x)).relu()))
        logits: torch.Tensor = self.head(hidden.mean((2, 3)))
        return logits


def check(objective: str, weight: str = "lsq") -> None:
    torch.manual_seed(0)
    image, target = torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])
    bits = 1 if weight == "binary_connect" else 4
    student = qtrain.quantize(Net(), image, weight=weight, weight_bits=bits, ends=None)
    teacher = Net().eval()
    layers = ["distill.student_layers=[layer1,layer3]", "distill.teacher_layers=null"]
    made = compose([f"objective={objective}", *layers]).objective.build()
    shape = (1, 1, 6, 6)
    made.bind_(feature_shapes(student, made.student_taps, shape), feature_shapes(teacher, made.teacher_taps, shape))
    step = StudentStep(student=student.train(), objective=made)
    optimizer = partial(torch.optim.SGD, lr=0.01, momentum=0.9)(parameter_groups([student, made], scale_lr=0.001))
    features = {name: torch.randn(4, *shapes[1:]) for name, shapes in _shapes(teacher, made.teacher_taps, shape)}
    for number in range(2):
        with NoWait():  # type: ignore[no-untyped-call]
            begin_step_(student, seed=0, step=number, progress=number / 2)
            made.set_progress_(number / 2)
            optimizer.zero_grad()
            step(image, target, torch.randn(4, 3), features)["total"].backward()
            optimizer.step()
            project_weights_(student)
    learned = [p.grad for p in student.parameters() if p.grad is not None]  # hints alone leave the head as it is
    assert learned and all(grad.isfinite().all() for grad in learned)


def _shapes(model: nn.Module, names: list[str], shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(found)) for name, found in feature_shapes(model, names, shape).items()]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_waits_for_no_number_whatever_the_objective(objective: str) -> None:
    check(objective)


@pytest.mark.parametrize("weight", ["binary_connect", "oscillation", "prox_quant"])
def test_a_step_waits_for_no_number_where_weights_are_projected(weight: str) -> None:
    check("hard", weight)


@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x[x > 0]])
def test_what_waits_is_seen(wait: object) -> None:
    assert callable(wait)
    with pytest.raises(AssertionError, match="makes the host wait"), NoWait():  # type: ignore[no-untyped-call]
        wait(torch.ones(3))
