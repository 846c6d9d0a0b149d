"""Losses against their formulas in float64, and the properties that make them what they are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtrain.functional.losses import (
    attention_loss,
    attention_map,
    hard_loss,
    hint_loss,
    relational_angle_loss,
    relational_distance_loss,
    relative_squared_error,
    similarity_loss,
    similarity_matrix,
    soft_target_loss,
)
from qtrain.spec import NO_LABEL

Loss = Callable[[Tensor, Tensor], Tensor]

FEATURES: dict[str, Loss] = {
    "hint": hint_loss,
    "relative error": relative_squared_error,
    "attention": attention_loss,
    "similarity": similarity_loss,
    "distance": lambda s, t: relational_distance_loss(s.flatten(1), t.flatten(1)),
    "angle": lambda s, t: relational_angle_loss(s.flatten(1), t.flatten(1)),
}
"""Losses between features (N, C, H, W)."""


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 sum p log(p / q), mean over the batch, in float64 from plain exponentials."""
    p = (teacher.double() / temperature).exp()
    q = (student.double() / temperature).exp()
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    return temperature**2 * (p * (p / q).log()).sum(1).mean()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_soft_targets_are_the_divergence_times_temperature_squared(temperature: float) -> None:
    student, teacher = noise(16, 10) * 3, noise(16, 10, seed=1) * 3
    ours = soft_target_loss(student, teacher, torch.tensor(temperature))
    torch.testing.assert_close(ours.double(), kl(student, teacher, temperature), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, soft_target_loss(student, teacher, temperature))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_is_temperature_times_the_difference_of_probabilities(temperature: float) -> None:
    """Hinton 2015, eq. 2: dC/dz = (q - p) / T for the bare cross-entropy; T^2 times that here."""
    student, teacher = noise(8, 10).requires_grad_(), noise(8, 10, seed=1)
    (grad,) = torch.autograd.grad(soft_target_loss(student, teacher, temperature), student)
    q, p = ((z.detach().double() / temperature).softmax(1) for z in (student, teacher))
    torch.testing.assert_close(grad.double(), temperature * (q - p) / 8, rtol=1e-4, atol=1e-6)


def test_soft_gradient_is_independent_of_a_high_temperature() -> None:
    """Eq. 4: toward (z - v) / K for logits of zero mean, whatever T, which is what the factor T^2 is for."""
    student, teacher = noise(8, 10), noise(8, 10, seed=1)
    student, teacher = (z - z.mean(1, keepdim=True) for z in (student, teacher))
    leaf = student.clone().requires_grad_()
    grads = [torch.autograd.grad(soft_target_loss(leaf, teacher, t), leaf)[0] for t in (50.0, 500.0)]
    expected = (student - teacher) / 10 / 8
    torch.testing.assert_close(grads[0], expected, rtol=0.1, atol=1e-3)
    torch.testing.assert_close(grads[1], expected, rtol=0.02, atol=2e-4)


@given(st.integers(0, 1000), st.floats(0.5, 30))
def test_soft_loss_is_positive_unless_logits_agree(seed: int, temperature: float) -> None:
    student, teacher = noise(4, 5, seed=seed), noise(4, 5, seed=seed + 1)
    assert soft_target_loss(student, teacher, temperature) > 0
    assert soft_target_loss(teacher, teacher, temperature).abs() < 1e-9
    shifted = soft_target_loss(teacher + 3, teacher, temperature)  # a constant changes no probability
    assert shifted.abs() < 1e-4 * temperature**2


def test_hard_loss_takes_indices_and_probabilities() -> None:
    logits, target = noise(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    expected = -logits.double().log_softmax(1)[torch.arange(6), target].mean()
    torch.testing.assert_close(hard_loss(logits, target).double(), expected, rtol=1e-5, atol=1e-6)
    one_hot = torch.nn.functional.one_hot(target, 4).float()
    torch.testing.assert_close(hard_loss(logits, one_hot), hard_loss(logits, target))


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5])
def test_label_smoothing_mixes_probabilities_with_the_uniform_ones(epsilon: float) -> None:
    """``-sum ((1 - eps) p + eps / K) log q`` in float64, for labels as indices and as probabilities."""
    logits, indices = noise(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    mixed = (noise(6, 4, seed=1) * 2).softmax(1)
    q = logits.double().exp() / logits.double().exp().sum(1, keepdim=True)
    for target, p in ((indices, torch.eye(4)[indices]), (torch.eye(4)[indices], torch.eye(4)[indices]), (mixed, mixed)):
        expected = -(((1 - epsilon) * p.double() + epsilon / 4) * q.log()).sum(1).mean()
        torch.testing.assert_close(hard_loss(logits, target, epsilon).double(), expected, rtol=1e-5, atol=1e-6)


def test_image_without_a_label_has_no_loss_and_counts_in_the_mean() -> None:
    """-log softmax of (ln 3, 0) is ln 4 - ln 3 for the first class; the other two of three images have no label."""
    logits = torch.tensor([[math.log(3.0), 0.0], [5.0, 1.0], [-1.0, 2.0]], requires_grad=True)
    loss = hard_loss(logits, torch.tensor([0, NO_LABEL, NO_LABEL]))
    assert float(loss.detach()) == pytest.approx(math.log(4 / 3) / 3, rel=1e-6)
    loss.backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.25 / 3, 0.25 / 3], [0.0, 0.0], [0.0, 0.0]]))
    assert hard_loss(logits, torch.full((3,), NO_LABEL), 0.1) == 0.0


def test_excluded_classes_add_nothing_to_losses() -> None:
    """0 log 0 is 0: what is left is the loss over the other classes, in value and gradient."""
    student, teacher = noise(6, 4), noise(6, 4, seed=1)
    barred = torch.zeros(6, 4, dtype=torch.bool)
    barred[:, 2] = True
    teacher = teacher.masked_fill(barred, -math.inf)
    p = teacher.double().exp() / teacher.double().exp().sum(1, keepdim=True)
    rest = [0, 1, 3]
    for both in (False, True):
        leaf = (student.masked_fill(barred, -math.inf) if both else student).clone().requires_grad_()
        q = leaf.detach().double().exp() / leaf.detach().double().exp().sum(1, keepdim=True)
        soft = (p[:, rest] * (p[:, rest] / q[:, rest]).log()).sum(1).mean()
        cross = -(p[:, rest] * q[:, rest].log()).sum(1).mean()
        for loss, expected in ((soft_target_loss(leaf, teacher, 1.0), soft), (hard_loss(leaf, p.float()), cross)):
            torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
            (grad,) = torch.autograd.grad(loss, leaf, retain_graph=True)
            torch.testing.assert_close(grad.double(), (q - p) / 6, rtol=1e-4, atol=1e-6)


def test_a_class_that_only_the_student_excludes_is_infinitely_far() -> None:
    student = torch.tensor([[0.0, -math.inf]])
    assert soft_target_loss(student, torch.zeros(1, 2), 1.0) == math.inf
    assert hard_loss(student, torch.tensor([[0.5, 0.5]])) == math.inf
    assert soft_target_loss(torch.zeros(1, 2), torch.tensor([[math.nan, 0.0]]), 1.0).isnan()


def test_hint_is_half_the_mean_squared_error() -> None:
    guided, hint = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    expected = 0.5 * (guided.double() - hint.double()).square().mean()
    torch.testing.assert_close(hint_loss(guided, hint).double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", FEATURES)
def test_gradients_are_finite_differences(name: str) -> None:
    student, teacher = noise(4, 3, 2, 2).double().requires_grad_(), noise(4, 3, 2, 2, seed=1).double()
    assert torch.autograd.gradcheck(lambda s: FEATURES[name](s, teacher), student)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_soft_gradients_are_finite_differences_of_the_reference(temperature: float) -> None:
    """The factor T^2 is in the gradient too: central differences of the float64 formula above, element by element."""
    student, teacher = noise(3, 4).double() * 3, noise(3, 4, seed=1).double() * 3
    leaf = student.clone().requires_grad_()
    (grad,) = torch.autograd.grad(soft_target_loss(leaf, teacher, temperature), leaf)
    expected, step = torch.zeros_like(student), 1e-5
    for place in itertools.product(range(3), range(4)):
        moved = torch.zeros_like(student)
        moved[place] = step
        rise = kl(student + moved, teacher, temperature) - kl(student - moved, teacher, temperature)
        expected[place] = rise / (2 * step)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", FEATURES)
def test_losses_are_zero_for_equal_inputs(name: str) -> None:
    x = noise(5, 3, 4, 4)
    leaf = x.clone().requires_grad_()
    loss = FEATURES[name](leaf, x)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert loss == 0
    assert not grad.any()
    assert FEATURES[name](x, noise(5, 3, 4, 4, seed=1)) > 1e-4


def test_relative_error_has_no_unit() -> None:
    x, reference = noise(4, 3), noise(4, 3, seed=1)
    expected = ((x - reference).double() ** 2).sum() / (reference.double() ** 2).sum()
    torch.testing.assert_close(relative_squared_error(x, reference).double(), expected, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(relative_squared_error(100 * x, 100 * reference), relative_squared_error(x, reference))
    assert relative_squared_error(torch.zeros(4, 3), reference) == 1
    assert torch.isfinite(relative_squared_error(x, torch.zeros(4, 3)))


def test_attention_by_hand() -> None:
    """Two places with energies 9 + 16 = 25 and 0: the map (1, 0). The other's 0 and 4: the map (0, 1)."""
    student, teacher = torch.zeros(1, 2, 1, 2), torch.zeros(1, 3, 1, 2)
    student[0, :, 0, 0] = torch.tensor([3.0, 4.0])
    teacher[0, 2, 0, 1] = -2.0
    assert attention_map(student).tolist() == [[1.0, 0.0]]
    assert attention_loss(student, teacher) == 0.5  # half the mean of 1 and 1
    tokens = [x.flatten(2).transpose(1, 2) for x in (student, teacher)]  # (N, L, C)
    assert attention_loss(*tokens) == 0.5


def test_attention_ignores_a_factor_on_the_features() -> None:
    """Free of a factor for each sample, of the channels' number and order, and of their signs."""
    student, teacher = noise(4, 6, 3, 3), noise(4, 2, 3, 3, seed=1)
    loss = attention_loss(student, teacher)
    factor = torch.tensor([0.1, 1.0, 7.0, 300.0]).view(4, 1, 1, 1)
    torch.testing.assert_close(attention_loss(factor * student, teacher), loss)
    torch.testing.assert_close(attention_loss(-student.flip(1), teacher), loss)
    torch.testing.assert_close(attention_loss(student, 50 * teacher), loss)
    assert abs(attention_loss(student.flip(3), teacher) - loss) > 1e-3


def rotation(size: int) -> Tensor:
    q, _ = torch.linalg.qr(noise(size, size, seed=9).double())
    return q


def test_similarity_by_loops() -> None:
    student, teacher = noise(4, 6), noise(4, 2, 3, seed=1)
    total = 0.0
    for i, j in itertools.product(range(4), range(4)):
        entry = []
        for x in (student.flatten(1).double(), teacher.flatten(1).double()):
            row = torch.stack([x[i] @ x[k] for k in range(4)])
            entry.append(row[j] / row.square().sum().sqrt())
        total += float((entry[0] - entry[1]) ** 2)
    assert similarity_loss(student, teacher).item() == pytest.approx(total / 16, rel=1e-5)
    torch.testing.assert_close(similarity_matrix(student).norm(dim=1), torch.ones(4))


def test_similarity_ignores_rotation_and_factor() -> None:
    student, teacher = noise(5, 8).double(), noise(5, 3, seed=1).double()
    loss = similarity_loss(student, teacher)
    torch.testing.assert_close(similarity_loss(30 * student @ rotation(8), teacher), loss)
    assert abs(similarity_loss(student + 1, teacher) - loss) > 1e-3, "a shift is no rotation"


def huber(x: float) -> float:
    return 0.5 * x * x if abs(x) <= 1 else abs(x) - 0.5


def test_relational_distances_by_loops() -> None:
    student, teacher = noise(5, 4).double() * noise(5, 1, seed=2), noise(5, 7, seed=1).double()
    pairs = list(itertools.permutations(range(5), 2))
    distances = []
    for x in (student, teacher):
        plain = {(i, j): float((x[i] - x[j]).square().sum().sqrt()) for i, j in pairs}
        mean = sum(plain.values()) / len(pairs)
        distances.append({pair: distance / mean for pair, distance in plain.items()})
    expected = sum(huber(distances[0][pair] - distances[1][pair]) for pair in pairs) / len(pairs)
    assert relational_distance_loss(student, teacher).item() == pytest.approx(expected)


def test_relational_angles_by_loops() -> None:
    student, teacher = noise(5, 4).double(), noise(5, 7, seed=1).double()
    triples = list(itertools.permutations(range(5), 3))

    def cosine(x: Tensor, i: int, j: int, k: int) -> float:
        a, b = x[j] - x[i], x[k] - x[i]
        return float(a @ b / (a.norm() * b.norm()))

    expected = sum(huber(cosine(student, *t) - cosine(teacher, *t)) for t in triples) / len(triples)
    assert relational_angle_loss(student, teacher).item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", [relational_distance_loss, relational_angle_loss])
def test_relational_losses_ignore_shift_rotation_and_factor(loss: Loss) -> None:
    student, teacher = noise(6, 4).double(), noise(6, 3, seed=1).double()
    moved = 7 * student @ rotation(4) + noise(1, 4, seed=3)
    torch.testing.assert_close(loss(moved, teacher), loss(student, teacher))
    torch.testing.assert_close(loss(student, -0.1 * teacher + 2), loss(student, teacher))


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("case", ["one sample", "two samples", "the same sample twice", "a dead layer"])
def test_odd_batches_give_finite_gradients(name: str, case: str) -> None:
    student, teacher = noise(5, 3, 2, 2), noise(5, 3, 2, 2, seed=1)
    if case == "the same sample twice":
        student[1] = student[0]
    elif case == "a dead layer":
        student = torch.zeros_like(student)
    else:
        size = 1 if case == "one sample" else 2
        student, teacher = student[:size], teacher[:size]
    student = student.requires_grad_()
    loss = FEATURES[name](student, teacher)
    (grad,) = torch.autograd.grad(loss, student)
    assert torch.isfinite(loss)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("name", FEATURES)
def test_losses_are_computed_in_float32_under_autocast(name: str) -> None:
    """Neither features in bfloat16 nor autocast: what is compared is then small beside the rounding of a product."""
    student, teacher = noise(8, 3, 4, 4).bfloat16(), noise(8, 3, 4, 4, seed=1).bfloat16()
    expected = FEATURES[name](student.float(), teacher.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = FEATURES[name](student, teacher)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("loss", [lambda x: hint_loss(x, x + 1), lambda x: soft_target_loss(x, x + 1, 2.0)])
def test_half_precision_is_summed_in_float32(loss: object) -> None:
    assert loss(noise(4, 5).bfloat16()).dtype == torch.float32  # type: ignore[operator]


@pytest.mark.parametrize("loss", [relational_angle_loss, similarity_loss])
def test_samples_that_do_not_differ_give_no_endless_gradient(loss: Loss) -> None:
    """A layer of few bits may give one output for several images: there is no direction between those."""
    teacher, student = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(0))
    student = student.clone()
    student[1] = student[0] + 1e-9
    student[2] = 0
    student.requires_grad_()
    found = loss(student, teacher)
    found.backward()
    assert bool(found.isfinite()) and float(student.grad.abs().max()) < 10
