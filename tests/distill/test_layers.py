"""Terms that compare layers: what they share, and that each is its function of the right tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qtrain.distill.attention import Attention
from qtrain.distill.blockwise import Blockwise
from qtrain.distill.hard import Hard
from qtrain.distill.hint import Hint
from qtrain.distill.layers import LayerTerm, same_grid
from qtrain.distill.objective import Objective
from qtrain.distill.relational import Relational, embedding
from qtrain.distill.similarity import Similarity
from qtrain.distill.soft import Soft
from qtrain.functional.losses import (
    attention_loss,
    relational_angle_loss,
    relational_distance_loss,
    relative_squared_error,
    similarity_loss,
)
from qtrain.models.factory import create_model
from qtrain.models.taps import FeatureTaps, feature_shapes
from qtrain.schedules.linear import Linear
from qtrain.spec import StepOutputs

TERMS: list[type[LayerTerm]] = [Hint, Attention, Similarity, Relational, Blockwise]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outputs(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> StepOutputs:
    n = len(next(iter(student.values())))
    return StepOutputs(noise(n, 3), torch.zeros(n, dtype=torch.long), student, noise(n, 3, seed=1), teacher)


def one_image(features: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: (1, *feature.shape[1:]) for name, feature in features.items()}


@pytest.mark.parametrize("kind", TERMS)
def test_pairs_are_summed_and_the_teacher_gets_no_gradient(kind: type[LayerTerm]) -> None:
    student = {name: noise(4, 3, 4, 4, seed=i).requires_grad_() for i, name in enumerate("ab")}
    teacher = {name: noise(4, 3, 4, 4, seed=i + 5).requires_grad_() for i, name in enumerate("xy")}
    losses = []
    for mine, theirs in (["a"], ["y"]), (["b"], ["x"]), (["a", "b"], ["y", "x"]):
        term = kind(student_layers=mine, teacher_layers=theirs)
        term.bind_(one_image(student), one_image(teacher))
        for parameter in term.parameters():
            torch.nn.init.ones_(parameter)
        losses.append(term(outputs(student, teacher)))
    torch.testing.assert_close(losses[0] + losses[1], losses[2])
    losses[2].backward()
    assert all(feature.grad is not None and feature.grad.any() for feature in student.values())
    assert all(feature.grad is None for feature in teacher.values())


@pytest.mark.parametrize("kind", TERMS)
def test_without_teacher_layers_the_names_are_the_students(kind: type[LayerTerm]) -> None:
    term = kind(student_layers=["layer1", "layer2"])
    assert term.teacher_taps == term.student_taps == ("layer1", "layer2")
    assert term.needs_teacher


@pytest.mark.parametrize("kind", TERMS)
def test_layer_lists_of_different_length_are_refused(kind: type[LayerTerm]) -> None:
    owner = kind.__name__
    with pytest.raises(ValueError, match=rf"{owner}: .* lists of equal length .* got \['a', 'b'\] and \['a'\]"):
        kind(student_layers=["a", "b"], teacher_layers=["a"])
    with pytest.raises(ValueError, match=rf"{owner}: .* at least one name, got \[\] and \[\]"):
        kind(student_layers=[])


@pytest.mark.parametrize(
    ("kind", "student", "teacher", "rule"),
    [
        (Hint, (1, 8, 4, 4), (1, 9, 12), "both must be maps"),
        (Hint, (1, 9, 8), (1, 10, 8), "tokens .* of one length"),
        (Attention, (1, 8), (1, 8), "vectors have no places to attend to"),
        (Attention, (1, 8, 4, 4), (1, 16, 8), "both must be maps"),
        (Similarity, (1,), (1, 8), "a row of features for each image"),
        (Relational, (1, 2, 2, 2, 2), (1, 8), "each must be a map"),
        (Blockwise, (1, 8, 4, 4), (1, 16, 4, 4), "both must have one shape; objective=hint compares layers of other"),
    ],
)
def test_layers_that_cannot_be_compared_are_refused(
    kind: type[LayerTerm], student: tuple[int, ...], teacher: tuple[int, ...], rule: str
) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}: 's' gives .* and 't' gives .* for one image; .*{rule}"):
        kind(student_layers=["s"], teacher_layers=["t"]).bind_({"s": student}, {"t": teacher})


@pytest.mark.parametrize(
    ("a", "b", "grid"), [((8, 8), (4, 4), (4, 4)), ((4, 8), (6, 2), (4, 2)), ((5, 5), (5, 5), (5, 5))]
)
def test_maps_are_pooled_to_the_smaller_grid(a: tuple[int, int], b: tuple[int, int], grid: tuple[int, int]) -> None:
    mine, theirs = noise(2, 3, *a), noise(2, 5, *b, seed=1)
    pooled = same_grid(mine, theirs)
    assert [tuple(x.shape) for x in pooled] == [(2, 3, *grid), (2, 5, *grid)]
    torch.testing.assert_close(pooled[0].mean(), F.adaptive_avg_pool2d(mine, grid).mean())
    if a == (8, 8):
        torch.testing.assert_close(pooled[0][0, 0, 1, 2], mine[0, 0, 2:4, 4:6].mean())
        assert pooled[1] is theirs
    tokens = (noise(2, 9, 4), noise(2, 9, 6))
    assert all(x is y for x, y in zip(same_grid(*tokens), tokens, strict=True))


def test_embeddings_are_means_over_places() -> None:
    maps = noise(2, 3, 4, 5)
    expected = torch.stack([torch.stack([maps[n, c].flatten().mean() for c in range(3)]) for n in range(2)])
    torch.testing.assert_close(embedding(maps), expected)
    torch.testing.assert_close(embedding(maps.flatten(2).transpose(1, 2)), expected)
    assert embedding(expected) is expected


def test_each_term_is_its_function() -> None:
    mine, theirs, wide = noise(4, 3, 4, 4), noise(4, 3, 4, 4, seed=1), noise(4, 6, 8, 8, seed=2)
    given = outputs({"s": mine}, {"t": theirs, "w": wide})

    def loss(kind: type[LayerTerm], layer: str, **options: Any) -> Tensor:
        result: Tensor = kind(student_layers=["s"], teacher_layers=[layer], **options)(given)
        return result

    assert torch.equal(loss(Attention, "w"), attention_loss(mine, F.avg_pool2d(wide, 2)))
    assert torch.equal(loss(Similarity, "w"), similarity_loss(mine, wide))
    assert torch.equal(loss(Blockwise, "t"), relative_squared_error(mine, theirs))
    vectors = mine.mean((2, 3)), wide.mean((2, 3))
    distance, angle = relational_distance_loss(*vectors), relational_angle_loss(*vectors)
    torch.testing.assert_close(loss(Relational, "w"), distance + 2 * angle)
    torch.testing.assert_close(loss(Relational, "w", distance=3.0, angle=0.0), 3 * distance)
    torch.testing.assert_close(loss(Relational, "w", distance=0.0, angle=0.5), 0.5 * angle)


@pytest.mark.parametrize(("distance", "angle"), [(0.0, 0.0), (-1.0, 2.0)])
def test_relational_needs_a_positive_factor(distance: float, angle: float) -> None:
    with pytest.raises(ValueError, match="Relational: distance and angle must be at least 0 and not both 0, got"):
        Relational(student_layers=["a"], distance=distance, angle=angle)


def every_term() -> Objective:
    return Objective(
        terms={
            "hard": Hard(weight=Linear(start=1.0, end=0.5)),
            "soft": Soft(temperature=Linear(start=8.0, end=1.0)),
            "hint": Hint(student_layers=["layer2"]),
            "attention": Attention(student_layers=["layer1", "layer3"], weight=Linear(start=0.0, end=1000.0)),
            "similarity": Similarity(student_layers=["layer3"]),
            "relational": Relational(student_layers=["layer3"]),
            "blockwise": Blockwise(student_layers=["layer1"]),
        }
    )


def test_all_terms_compile_once_for_all_weights() -> None:
    """Weights, temperature and balance are values of buffers."""
    graphs = 0

    def counting(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    features = {f"layer{i}": noise(6, 2 * i, 4, 4, seed=i) for i in (1, 2, 3)}
    guides = {name: noise(*feature.shape, seed=7) for name, feature in features.items()}
    objective = every_term()
    objective.bind_(one_image(features), one_image(guides))
    compiled = torch.compile(objective, backend=counting, fullgraph=True)
    given = outputs(features, guides)
    totals = []
    for progress, balance in ((0.0, 1.0), (0.5, 1.0), (1.0, 2.0)):
        objective.set_progress_(progress)
        objective.balance[1:].fill_(balance)
        totals.append(compiled(given)["total"])
        assert torch.equal(totals[-1], objective(given)["total"])
    assert graphs == 1
    assert len({float(total) for total in totals}) == 3


def test_all_terms_together_in_the_compiled_backward() -> None:
    torch._dynamo.reset()
    gradients = []
    objective = every_term()
    shapes = {f"layer{i}": (1, 2 * i, 4, 4) for i in (1, 2, 3)}
    objective.bind_(shapes, shapes)
    guides = {name: noise(6, *shape[1:], seed=7) for name, shape in shapes.items()}
    for run in (objective, torch.compile(objective, backend="aot_eager", fullgraph=True)):
        features = {name: noise(6, *shape[1:], seed=len(name)).requires_grad_() for name, shape in shapes.items()}
        objective.zero_grad()
        run(outputs(features, guides))["total"].backward()
        gradients.append([x.grad for x in features.values()] + [p.grad for p in objective.parameters()])
    for eager, compiled in zip(*gradients, strict=True):
        assert eager is not None and compiled is not None
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)


def test_hints_alone_train_the_student_up_to_the_guided_layer() -> None:
    """FitNets' first stage: no logits' loss; the regressor learns, what lies behind the layer stays."""
    torch.manual_seed(0)
    student, teacher = (
        create_model(name="cifar_resnet8", num_classes=4, in_channels=1, width=width) for width in (0.25, 0.5)
    )
    objective = Objective(terms={"hint": Hint(student_layers=["layer2"])})
    objective.bind_(
        feature_shapes(student, ["layer2"], (1, 1, 8, 8)), feature_shapes(teacher, ["layer2"], (1, 1, 8, 8))
    )
    image = noise(4, 1, 8, 8)
    logits, features = FeatureTaps(student, ["layer2"]).forward_with_features(image)
    guide_logits, guide = FeatureTaps(teacher, ["layer2"]).forward_with_features(image)
    target = torch.zeros(4, dtype=torch.long)
    objective(StepOutputs(logits, target, features, guide_logits, guide))["total"].backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters()), "though it could learn"
    learned = {name.split(".")[0] for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert learned == {"conv1", "bn1", "layer1", "layer2"}
