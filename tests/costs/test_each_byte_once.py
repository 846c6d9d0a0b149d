"""No byte of a network counts twice: not in a metric's sum, nor in the sums by which a search keeps a budget."""

import torch
from torch import Tensor, nn

import qtrain

IMAGES = torch.rand(4, 3, 8, 8)


class Products(nn.Module):
    """A convolution of 108 weights, 16 weights between, two products without a layer, a head of 20."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.query, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.query(self.stem(x).flatten(2).transpose(1, 2))
        return self.head(((y @ y.transpose(1, 2)).softmax(-1) @ y).mean(1))


def test_scales_of_operands_count_with_their_product() -> None:
    student = qtrain.quantize(Products(), IMAGES, operations={"matmul": 8})
    cost = qtrain.cost(student, IMAGES[:1], metrics=["size_bytes"])
    # Codes of 8, 4 and 8 bits, a scale for each output and each input; four scales of operands; 13 biases.
    layers = {"stem": 108 + 16 + 4, "query": 8 + 16 + 4, "head": 20 + 20 + 4, "matmul_0": 8, "matmul_1": 8}
    assert cost.metrics["size_bytes"].layers == layers
    assert cost.size_bytes == cost.metrics["size_bytes"].total == sum(layers.values()) + 4 * 13


def test_an_operand_with_the_quantizer_of_another_stores_nothing_more() -> None:
    student = qtrain.quantize(Products(), IMAGES, operations={"matmul": 8})
    student.matmul_1.right.input_quantizer = student.matmul_0.left.input_quantizer
    cost = qtrain.cost(student, IMAGES[:1], metrics=["size_bytes"])
    assert [cost.metrics["size_bytes"].layers[name] for name in ("matmul_0", "matmul_1")] == [8, 4]
    assert cost.size_bytes == cost.metrics["size_bytes"].total


class Scaled(nn.Linear):
    """A forward of its own, for which there is no quantized form."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Mixed(nn.Module):
    """A layer of 400 weights that stays in floating point among three that are quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.kept = nn.Conv2d(3, 4, 3), Scaled(4, 100)
        self.middle, self.head = nn.Linear(100, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.kept(self.stem(x).mean((2, 3)))))


def test_a_search_counts_a_layer_in_floating_point_once() -> None:
    # 8 bits for the ends, 4 for the middle; scales for outputs and inputs, biases.
    ends = (108 + 4 * 4 + 4 + 4 * 4) + (50 + 4 * 5 + 4 + 4 * 5)
    middle, kept = 500 + 4 * 10 + 4 + 4 * 10, 4 * (400 + 100)
    budget = ends + middle + kept
    student = qtrain.quantize(Mixed(), IMAGES, bits="integer_program", budgets={"size_bytes": budget})
    assert qtrain.describe(student).layers["middle"].weight == 4
    assert qtrain.cost(student, IMAGES[:1]).size_bytes == budget
