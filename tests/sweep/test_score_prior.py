"""The bits that a sweep begins with: better than chance at equal cost, repeatable, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qtrain.config.compose import compose
from qtrain.costs.count import count
from qtrain.models.cifar_resnet import cifar_resnet8
from qtrain.pipeline.load_data import load_data
from qtrain.run_task import run_task
from qtrain.settings.run_files import SCORES
from qtrain.sweep.bit_widths import BitWidths
from qtrain.sweep.knobs import Choice
from qtrain.sweep.make_search import make_searcher
from qtrain.sweep.make_space import make_space
from qtrain.sweep.score_prior import Width, draws, prior_points, raised, read_scores, widths_of
from qtrain.sweep.space import Given, Space
from qtrain.utils.errors import ConfigError

CHOICES = (2, 3, 4)
SMALL = ("model=cifar_resnet8", "model.width=0.25", "data.max_train=64", "data.max_test=50", "data.batch_size=32")
BITS = "{{_target_: qtrain.sweep.bit_widths.BitWidths, choices: [2, 3, 4], of: {}, per: layer}}"
KNOBS = ("task=sweep", f"+sweep.space.w={BITS.format('weight')}", f"+sweep.space.a={BITS.format('input')}")


def random_widths(seed: int, count: int = 5, *, equal: bool = False) -> list[Width]:
    """Scores that fall by less with each bit, and shares of all sizes, or of one."""
    source = Random(seed)
    shares = [1.0 if equal else source.uniform(0.2, 1.0) for _ in range(count)]
    first = [source.expovariate(1.0) for _ in range(count)]
    return [
        Width("bits", f"layer{n}", CHOICES, (own, own / 4, own / 16), share / sum(shares))
        for n, (own, share) in enumerate(zip(first, shares, strict=True))
    ]


def bits_of(widths: list[Width], point: Given) -> list[int]:
    found: Any = point
    return [found[width.knob][width.part] for width in widths]


def score(widths: list[Width], bits: Sequence[int]) -> float:
    return sum(width.scores[width.choices.index(own)] for width, own in zip(widths, bits, strict=True))


def mean(widths: list[Width], bits: Sequence[int]) -> float:
    return sum(width.share * own for width, own in zip(widths, bits, strict=True))


@pytest.fixture(scope="module")
def scores_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``task=allocate`` leaves for a small network with random weights on the digits."""
    folder = tmp_path_factory.mktemp("allocate")
    torch.manual_seed(0)
    save_file(cifar_resnet8(num_classes=10, in_chans=1, width=0.25).state_dict(), folder / "weights.safetensors")
    settings = compose(
        [
            "task=allocate", "allocate@quantize.bits=integer_program", *SMALL, "allocate.weight=[2,3,4]",
            "allocate.input=[2,3,4]", "allocate.batches=2", "logger=none", f"output={folder}",
            f"allocate.folder={folder}", f"model.weights={folder}/weights.safetensors",
        ]
    )  # fmt: skip
    run_task(settings)
    return Path(settings.run_dir) / SCORES


def test_the_first_proposals_are_better_than_chance_at_equal_cost(scores_file: Path) -> None:
    settings = compose([*KNOBS, *SMALL, f"sweep.prior.scores={scores_file}", "sweep.prior.trials=6"])
    data = load_data(settings)
    space = make_space(settings, data)
    points = prior_points(settings, space, data)
    assert points == prior_points(settings, space, data), "the same file and seed give the same points"
    model = cifar_resnet8(num_classes=10, in_chans=1, width=0.25)
    widths = widths_of(space, read_scores(scores_file), count(model, torch.zeros(1, 1, 8, 8)).layers)
    source, means = Random(0), []
    for point in points:
        bits = bits_of(widths, point)
        means.append(mean(widths, bits))
        # Any order of raising has the same mean, up to a step.
        blind = [width._replace(scores=(3.0, 2.0, 1.0)) for width in widths]
        chance = [score(widths, raised(blind, [source.random() for _ in blind], means[-1] + 0.02)) for _ in range(40)]
        assert score(widths, bits) < median(chance)
    assert max(means) - min(means) > 0.8, "from few bits to many"


@pytest.mark.parametrize("seed", range(4))
def test_without_spread_the_bits_are_the_best_of_their_mean(seed: int) -> None:
    widths = random_widths(seed, equal=True)
    for point in draws(widths, trials=5, spread=0.0, seed=0):
        bits = bits_of(widths, point)
        every = [b for b in product(CHOICES, repeat=5) if mean(widths, b) <= mean(widths, bits) + 1e-9]
        assert score(widths, bits) == pytest.approx(min(score(widths, b) for b in every))


def test_no_point_exceeds_its_mean_and_chance_makes_them_differ() -> None:
    widths = random_widths(1, count=12)
    points = draws(widths, trials=7, spread=0.5, seed=0)
    means = sorted(mean(widths, bits_of(widths, point)) for point in points)
    assert all(own <= 2 + 2 * (n + 1) / 8 + 1e-9 for n, own in enumerate(means))
    assert points != draws(widths, trials=7, spread=0.5, seed=1)
    assert points != draws(widths, trials=7, spread=0.0, seed=0)


@pytest.mark.parametrize("search", ["random", "tpe", "nsga2", "local", "population"])
def test_a_search_begins_with_start_and_the_prior_and_goes_on_by_itself(search: str) -> None:
    layers = ["conv1", "a", "b", "fc"]
    space = Space(
        {"bits": BitWidths(choices=CHOICES, per="layer"), "objective": Choice(options=["soft", "hard"])}, layers=layers
    )
    settings = compose(["task=sweep", "fit.epochs=4", f"search@sweep.search={search}", "sweep.start=[{bits: 4}]"])
    searcher = make_searcher(settings, space, [{"bits": {"a": 3, "b": 2}}, {"bits": {"a": 2, "b": 3}}])
    points: list[Any] = [searcher.suggest(str(n)) for n in range(4)]
    assert [(point["bits.a"], point["bits.b"]) for point in points[:3]] == [(4, 4), (3, 2), (2, 3)]
    assert {"bits.a", "bits.b", "objective"} <= {*points[3]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["sweep.prior.scores=nowhere.json"], r"sweep\.prior: scores: cannot read nowhere\.json \(No such file"),
        (["sweep.prior.scores={folder}/no.json"], r"no\.json holds no scores; give scores\.json of a task=allocate"),
        (["sweep.prior.scores={folder}/text.json"], r"text\.json holds no scores"),
        (["sweep.prior.scores={folder}/nan.json"], r"nan\.json holds no scores"),
        (["sweep.prior.scores={folder}/other.json"], r"scores: they are of no layer of this model"),
        (
            ["sweep.prior.scores={file}", "sweep.space.w.choices=[2,5]"],
            r"of layer '.*' at 5 bits; run task=allocate wi",
        ),
        (["sweep.prior.scores={file}", "sweep.prior.trials=0"], r"trials must be 1 or more, .* got 0 and 0\.5"),
        (
            ["sweep.prior.scores={file}", "sweep.space.w=null", "sweep.space.a=null", "+sweep.space.seed=[1,2]"],
            r"no knob of sweep\.space turns",
        ),
    ],
)
def test_what_is_no_prior_is_refused_in_one_line(scores_file: Path, options: list[str], message: str) -> None:
    folder = scores_file.parent
    (folder / "no.json").write_text("[1, 2]", encoding="utf-8")
    (folder / "other.json").write_text('{"weight": {"x": {"2": 1.0}}, "input": {}, "pairs": []}', encoding="utf-8")
    for name, value in (("text", '"1"'), ("nan", "NaN")):
        broken = f'{{"weight": {{"conv1": {{"2": {value}}}}}, "input": {{}}, "pairs": []}}'
        (folder / f"{name}.json").write_text(broken, encoding="utf-8")
    given = [option.replace("{folder}", str(folder)).replace("{file}", str(scores_file)) for option in options]
    settings = compose([*KNOBS, *SMALL, *given])
    data = load_data(settings)
    space = make_space(settings, data)
    with pytest.raises(ConfigError, match=message) as refused:
        prior_points(settings, space, data)
    assert "\n" not in str(refused.value)
