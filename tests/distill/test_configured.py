"""Objectives from the command line: any terms together, with weights and temperatures that follow schedules."""

from __future__ import annotations

import pytest

from qtrain.config.compose import compose
from qtrain.distill.attention import Attention
from qtrain.distill.objective import Objective
from qtrain.distill.similarity import Similarity
from qtrain.distill.soft import Soft
from qtrain.schedules.cosine import Cosine
from qtrain.schedules.linear import Linear
from qtrain.utils.errors import ConfigError


def objective(*overrides: str) -> Objective:
    made = compose(overrides).objective.build()
    assert isinstance(made, Objective)
    return made


def weights(made: Objective) -> dict[str, float]:
    return dict(zip(made.terms, made.weights.tolist(), strict=True))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hard", {"hard": 1.0}),
        ("kl", {"soft": 1.0}),
        ("hint", {"hint": 1.0}),
        ("soft", {"hard": 0.5, "soft": 0.5}),
        ("soft_hint", {"hard": 0.5, "soft": 0.5, "hint": 1.0}),
        ("attention", {"hard": 0.5, "soft": 0.5, "attention": 1000.0}),
        ("similarity", {"hard": 0.5, "soft": 0.5, "similarity": 3000.0}),
        ("relational", {"hard": 0.5, "soft": 0.5, "relational": 25.0}),
        ("blockwise", {"hard": 0.5, "soft": 0.5, "blockwise": 1.0}),
    ],
)
def test_each_objective_has_its_terms(name: str, expected: dict[str, float]) -> None:
    assert weights(objective(f"objective={name}")) == expected


@pytest.mark.parametrize("base", ["hard", "soft", "kl", "hint", "blockwise"])
def test_any_objective_takes_another_term(base: str) -> None:
    before = objective(f"objective={base}")
    after = objective(
        f"objective={base}",
        "+term@objective.terms.attention=attention",
        "objective.terms.attention.weight=7",
        "objective.terms.attention.student_layers=[layer1,layer3]",
        "objective.terms.attention.teacher_layers=null",
    )
    assert weights(after) == {**weights(before), "attention": 7.0}
    added = after.terms["attention"]
    assert isinstance(added, Attention)
    assert added.student_taps == added.teacher_taps == ("layer1", "layer3")


def test_the_same_term_twice_under_two_names() -> None:
    made = objective(
        "+term@objective.terms.early=similarity",
        "objective.terms.early.student_layers=[layer1]",
        "+term@objective.terms.late=similarity",
        "distill.student_layers=[layer3]",
    )
    early, late = made.terms["early"], made.terms["late"]
    assert isinstance(early, Similarity) and isinstance(late, Similarity)
    assert (early.student_taps, late.student_taps) == (("layer1",), ("layer3",))
    assert made.student_taps == ["layer1", "layer3"]


def test_term_can_be_removed() -> None:
    assert list(objective("objective=soft_hint", "~objective.terms.hard").terms) == ["soft", "hint"]


def test_temperature_and_weights_follow_schedules() -> None:
    made = objective(
        "objective=attention",
        "+schedule@objective.terms.soft.temperature=linear",
        "objective.terms.soft.temperature.start=8",
        "objective.terms.soft.temperature.end=2",
        "+schedule@objective.terms.hard.weight=cosine",
        "objective.terms.hard.weight.end=0.2",
        "+schedule@objective.terms.attention.weight=linear",
        "objective.terms.attention.weight.start=100",
    )
    soft = made.terms["soft"]
    assert isinstance(soft, Soft) and isinstance(soft.temperature, Linear)
    assert isinstance(made.terms["hard"].weight, Cosine)
    assert weights(made) == {"hard": 1.0, "soft": 0.5, "attention": 100.0}
    made.set_progress_(0.5)
    assert soft.value.item() == 5.0
    assert weights(made) == pytest.approx({"hard": 0.6, "soft": 0.5, "attention": 50.0})


def test_a_learning_teachers_objective_takes_terms_too() -> None:
    cfg = compose(
        ["+objective@teacher.objective=hard", "+term@teacher.objective.terms.similarity=similarity", "objective=soft"]
    )
    assert list(cfg.teacher.objective.build().terms) == ["hard", "similarity"]
    assert list(cfg.objective.build().terms) == ["hard", "soft"]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["+term@objective.terms.a=attentoin"], "term=attentoin: there is no such term; did you mean 'attention'?"),
        (["objective=atention"], "objective=atention: there is no such objective; did you mean 'attention'?"),
        (["objective=soft", "objective.terms.soft.temprature=2"], "objective.terms.soft.temprature"),
        (["objective=soft", "objective.terms.soft.weight=much"], "objective.terms.soft.weight: Soft takes float or"),
        (
            ["objective=soft", "schedule@objective.terms.soft.temperature=linear"],
            "use +schedule@objective.terms.soft.temperature=linear",
        ),
    ],
)
def test_mistyped_term_gives_a_one_line_error(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose(overrides)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_schedule_to_zero_temperature_is_refused_at_once() -> None:
    """The default of ``schedule=linear`` ends at 0, which only the last step would find."""
    with pytest.raises(ConfigError, match=r"objective.*Soft: temperature must be positive, got 0\.0 at progress 1\.00"):
        objective("objective=soft", "+schedule@objective.terms.soft.temperature=linear")
