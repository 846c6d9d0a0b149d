"""Layers that are called by keyword: the student is bit for bit that of the same network with calls by place."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qtrain
from qtrain.synthesis.statistics import StatisticsMatch
from qtrain.training.callbacks.instability import layer_moments
from qtrain.training.health import examine

X = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.3


class Sum(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.add(left, right)


class SumByKeyword(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.add(input=left, other=right)


class ByPlace(nn.Module):
    """Convolutions, two with batch norm, a sum, a transposed convolution and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.sum, self.point = Sum(), nn.Conv2d(8, 8, 1)
        self.relu, self.fc = nn.ReLU(), nn.Linear(8, 5)
        for norm in (self.bn, self.bn2):
            nn.init.uniform_(norm.running_mean, -0.5, 0.5), nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 2), nn.init.uniform_(norm.bias, -0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn(self.conv(x)))
        y = self.sum(y, self.relu(self.bn2(self.deep(y))))
        return self.fc(torch.mean(self.relu(self.point(y)), (2, 3)))


class ByKeyword(ByPlace):
    def __init__(self) -> None:
        super().__init__()
        self.sum = SumByKeyword()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(input=self.bn(input=self.conv(input=x)))
        y = self.sum(left=y, right=self.relu(input=self.bn2(input=self.deep(input=y))))
        return self.fc(input=torch.mean(input=self.relu(input=self.point(input=y)), dim=(2, 3)))


CHOICES: dict[str, dict[str, Any]] = {
    "plain": {},
    "fold before": {"fold": "before"},
    "fold training": {"fold": "training"},
    "equalize": {"fold": "before", "equalize": "cross_layer"},
    "dfq": {"fold": "before", "equalize": "dfq", "bias": "statistics"},
    "bias": {"fold": "before", "bias": "batches"},
    "adaround": {"rounding": "adaround", "options": ["quantize.rounding.iterations=20"]},
    "operations": {"operations": {"add": 4}},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_student_of_keyword_calls_equals_that_of_calls_by_place(choice: str) -> None:
    students = [qtrain.quantize(kind().eval(), X, weight_bits=3, **CHOICES[choice]) for kind in (ByPlace, ByKeyword)]
    reports = [qtrain.describe(student) for student in students]
    assert reports[0] == reports[1]
    assert list(reports[0].layers)[:2] == ["conv", "deep"]
    assert torch.equal(students[0](X), students[1](X))
    assert students[0].state_dict().keys() == students[1].state_dict().keys()
    costs = [qtrain.cost(student, X) for student in students]
    assert costs[0] == costs[1]


def test_what_watches_a_student_reads_keywords() -> None:
    place, keyword = (qtrain.quantize(kind().eval(), X) for kind in (ByPlace, ByKeyword))
    assert examine(place, X).metrics == examine(keyword, X).metrics
    moments = [layer_moments(student, X) for student in (place, keyword)]
    assert moments[0].keys() == moments[1].keys() != set()
    assert all(torch.equal(moments[0][name].mean, moments[1][name].mean) for name in moments[0])
    losses = []
    for kind in (ByPlace, ByKeyword):
        network = kind().eval()
        with StatisticsMatch(network) as match:
            network(X)
            losses.append(match.loss())
    assert torch.equal(*losses)


def test_transposed_convolution_with_its_output_size_and_input_by_keyword() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up = nn.ConvTranspose2d(3, 6, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, [18, 18])

    class UpByKeyword(Up):
        def forward(self, x: Tensor) -> Tensor:
            return self.up(output_size=[18, 18], input=x)

    place, keyword = (qtrain.quantize(kind(), X, ends=None) for kind in (Up, UpByKeyword))
    assert torch.equal(place(X), keyword(X))
    macs = [qtrain.cost(student, X).macs for student in (place, keyword)]
    assert macs == [8 * 8 * 3 * 6 * 9] * 2, "each of 8 x 8 x 3 inputs with a kernel of 6 x 3 x 3"
