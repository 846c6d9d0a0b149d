"""Several teachers as one: their means by loops, their layers by name, and one as good as itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qtrain.config.compose import compose
from qtrain.models.ensemble import Combine, Ensemble, combine_logits
from qtrain.models.taps import feature_shapes
from qtrain.models.teacher import FrozenTeacher
from qtrain.pipeline.load_data import load_data
from qtrain.pipeline.pretrain import members_of, trained_model
from qtrain.run_task import run_task
from qtrain.utils.errors import ConfigError


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def member(seed: int, width: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))


def test_probabilities_are_averaged_by_loops() -> None:
    logits, shares = noise(2, 4, 3) * 3, [0.25, 0.75]
    answer = combine_logits(logits, torch.tensor(shares), "probabilities")
    for n in range(4):
        expected = [0.0, 0.0, 0.0]
        for m in range(2):
            powers = [math.exp(float(z)) for z in logits[m, n]]
            for k in range(3):
                expected[k] += shares[m] * powers[k] / sum(powers)
        assert answer[n].softmax(0).tolist() == pytest.approx(expected, rel=1e-5)
        assert answer[n].exp().sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_averaged_logits_are_the_geometric_mean_at_any_temperature(temperature: float) -> None:
    logits, shares = noise(3, 4, 5).double() * 3, torch.tensor([0.2, 0.3, 0.5]).double()
    answer = combine_logits(logits, shares, "logits").double() / temperature
    product = torch.stack([(z / temperature).softmax(1) ** s for z, s in zip(logits, shares, strict=True)]).prod(0)
    torch.testing.assert_close(answer.softmax(1), product / product.sum(1, keepdim=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("combine", ["logits", "probabilities"])
def test_equal_members_answer_like_one(combine: Combine) -> None:
    one = member(0).eval()
    both = Ensemble(members={"a": one, "b": one}, shares={"a": 1.0, "b": 5.0}, combine=combine).eval()
    image = noise(6, 3, 2, 2)
    torch.testing.assert_close(both(image).softmax(1), one(image).softmax(1))


@pytest.mark.parametrize("combine", ["logits", "probabilities"])
def test_shares_are_normalized_and_belong_to_names(combine: Combine) -> None:
    a, b = member(0).eval(), member(1, width=6).eval()
    image = noise(6, 3, 2, 2)
    answer = Ensemble(members={"a": a, "b": b}, shares={"b": 6.0, "a": 2.0}, combine=combine)(image)
    expected = combine_logits(torch.stack([a(image), b(image)]), torch.tensor([0.25, 0.75]), combine)
    torch.testing.assert_close(answer, expected)
    equal = Ensemble(members={"a": a, "b": b}, combine=combine)(image)
    torch.testing.assert_close(equal, combine_logits(torch.stack([a(image), b(image)]), torch.full((2,), 0.5), combine))


def test_as_a_teacher_its_layers_have_the_members_names() -> None:
    ensemble = Ensemble(members={"small": member(0), "large": member(1, width=6)})
    before = {name: tensor.clone() for name, tensor in ensemble.state_dict().items()}
    teacher = FrozenTeacher(ensemble, names=["large.1", "small.3"])
    image = noise(6, 3, 2, 2)
    logits, features = teacher(image)
    torch.testing.assert_close(logits, ensemble(image))
    assert {name: tuple(f.shape) for name, f in features.items()} == {"large.1": (6, 6), "small.3": (6, 4)}
    torch.testing.assert_close(features["large.1"], member(1, width=6).eval()[:2](image))
    assert feature_shapes(ensemble, ["large.1"], (1, 3, 2, 2)) == {"large.1": (1, 6)}
    assert not any(parameter.requires_grad for parameter in ensemble.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in ensemble.state_dict().items())


def test_it_compiles_as_one_graph() -> None:
    ensemble = Ensemble(members={"a": member(0), "b": member(1)}, combine="probabilities").eval()
    compiled = torch.compile(ensemble, fullgraph=True, backend="aot_eager")
    image = noise(6, 3, 2, 2)
    torch.testing.assert_close(compiled(image), ensemble(image))


def test_half_precision_members_are_averaged_in_float32() -> None:
    ensemble = Ensemble(members={"a": member(0), "b": member(1)}, combine="probabilities").eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ensemble(noise(6, 3, 2, 2)).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": {}}, "Ensemble: members is empty"),
        ({"shares": {"a": 1.0}}, "Ensemble: shares must give each of a, b a number above 0, got {'a': 1.0}"),
        ({"shares": {"a": 1.0, "b": 0.0}}, "number above 0, got {'a': 1.0, 'b': 0.0}"),
        ({"members": {"a.b": member(0)}}, "Ensemble: 'a.b' cannot be a member's name"),
        ({"members": {"forward": member(0)}}, "Ensemble: 'forward' cannot be a member's name"),
    ],
)
def test_invalid_ensembles_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ensemble(**{"members": {"a": member(0), "b": member(1)}, **options})


TINY = """
    trainer=cpu data.max_train=96 data.max_test=32 data.batch_size=32 model=cifar_resnet8 model.width=0.25
    full_precision.epochs=1 fit.epochs=1 fit.reestimate_bn=0 quantize.calibration_batches=1 fit.log_every_steps=1
    fit.health_every_steps=0 optimizer.lr=0.01
""".split()
ENSEMBLE = [
    "teacher=ensemble",
    "teacher.model.members.first.width=0.25",
    "teacher.model.members.second.name=cifar_resnet8",
    "teacher.model.members.second.width=0.5",
]


def test_members_without_weights_are_trained_and_used_as_teacher(tmp_path: Path) -> None:
    cache = f"full_precision.folder={tmp_path / 'cache'}"
    layers = ["distill.student_layers=[layer3]", "distill.teacher_layers=[second.layer3]"]
    overrides = [*TINY, *ENSEMBLE, *layers, "objective=soft_hint", f"output={tmp_path}", cache]
    cfg = compose(overrides)
    assert run_task(cfg, overrides)["top1"] is not None
    kept = {path.parent.name: load_file(path) for path in (tmp_path / "cache").rglob("model.safetensors")}
    assert len(kept) == 3, "the student's own, and one for each member"
    ensemble = trained_model(cfg.teacher.model, cfg, load_data(cfg))
    (first,) = (state for name, state in kept.items() if "resnet20" in name)
    for name, tensor in ensemble.get_submodule("first").state_dict().items():
        assert torch.equal(tensor, first[name]), name


def test_self_teacher_has_the_students_weights(tmp_path: Path) -> None:
    """Self-distillation: what ``teacher=self`` names is found under the student's key, and not trained again."""
    overrides = [*TINY, "teacher=self", "objective=blockwise", f"output={tmp_path}"]
    overrides.append(f"full_precision.folder={tmp_path / 'cache'}")
    cfg = compose(overrides)
    run_task(cfg, overrides)
    (kept,) = (tmp_path / "cache").rglob("model.safetensors")
    twin = trained_model(cfg.teacher.model, cfg, load_data(cfg))
    assert all(torch.equal(tensor, load_file(kept)[name]) for name, tensor in twin.state_dict().items())


def test_the_command_line_adds_members() -> None:
    cfg = compose(
        [*ENSEMBLE, "+model@teacher.model.members.third=cifar_resnet32", "+teacher.model.members.self=${model}"]
    )
    members = members_of(cfg.teacher.model)
    assert list(members) == ["first", "second", "third", "self"]
    assert members["self"].plain == cfg.model.plain


def test_wrong_share_gives_a_one_line_error(tmp_path: Path) -> None:
    cfg = compose([*TINY, *ENSEMBLE, "teacher.model.shares={first:1}", f"full_precision.folder={tmp_path}"])
    with pytest.raises(ConfigError, match=r"^teacher\.model: Ensemble: shares must give each of first, second"):
        trained_model(cfg.teacher.model, cfg, load_data(cfg))
