"""Each recipe below conf/experiment runs to its end: in miniature, on handwritten digits or a few drawn images.

That all budgets and variants compose is tests/test_configs.py's affair.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from qtrain.config.compose import compose
from qtrain.run_task import run_task
from qtrain.settings.conf_dir import conf_dir
from tests.helpers.latent import latent_state

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")

SHORT = """
    budget=probe trainer=cpu logger=none fit.epochs=1 fit.compile=false fit.reestimate_bn=0 fit.health_every_steps=0
    quantize.calibration_batches=1 data.batch_size=8 model.weights=null distill.teacher_weights=null
    full_precision.epochs=1 full_precision.optimizer.weight_decay=0.0001
""".split()
DIGITS = """
    data=digits ~data.root data.mean=null data.std=null data.max_train=48 data.max_test=32
    model=cifar_resnet8 model.width=0.25
""".split()
PICTURES = """
    data.image_size=32 data.crop=random_resized data.crop_pct=0.875 data.workers=0
    data.max_train=null data.max_test=null model.pretrained=false
    full_precision.epochs=10 full_precision.optimizer.lr=0.01
""".split()
"""After few steps batch norm's running statistics are not a batch's, and quantizers are calibrated to wrong values."""
SMALL_TEACHER = ["teacher=cifar_resnet20", "teacher.model.width=0.25"]
CONVOLUTIONS = ["model=timm", "model.name=test_efficientnet"]
TRANSFORMER = ["model=timm", "model.name=test_vit"]
SAME_METHOD = ("cifar100/", "imagenet/apot", "imagenet/qkd", "imagenet/profit")
"""Recipes of methods that run on CIFAR-10's settings anyway: among the slow tests."""
LONG_ENOUGH = "fit.epochs=14"  # a quarter of it holds one measurement of instability, in the 20th step


class Recipe(NamedTuple):
    """What a miniature of an experiment needs besides the above, and what its row of results must then say."""

    overrides: list[str]
    w_bits: int
    a_bits: int
    distill: str = "none"
    stages: str = ""


PROGRESSIVE, QKD, APOT = "w8 w5 w4 third two_thirds norms", "self_study co_study tutoring", "w4 w3 w2"
ON_DIGITS = {
    "cifar10/lsq": Recipe([], 2, 2),
    "cifar10/pact": Recipe([], 4, 4),
    "cifar10/apot": Recipe([], 2, 2, stages=APOT),
    "cifar10/ewgs_adam": Recipe([], 2, 2),
    "cifar10/sqakd": Recipe([], 2, 2, "soft"),
    "cifar10/qkd": Recipe(SMALL_TEACHER, 2, 2, "soft", QKD),
    "cifar10/apprentice": Recipe([*SMALL_TEACHER, "select=[joint]"], 2, 8, "soft"),
    "cifar10/profit": Recipe([*SMALL_TEACHER, LONG_ENOUGH], 4, 4, "soft", PROGRESSIVE),
    "cifar10/inq": Recipe(["fit.epochs=2"], 5, 32),  # of 12 steps the last is past the last milestone, 0.9
    "cifar10/oscillation": Recipe(["select=[frozen]"], 3, 3),
    "cifar10/deep_compression": Recipe(["select=[pruned60]"], 4, 32, "soft", "prune share"),
    "cifar100/lsq": Recipe([], 4, 4),
    "cifar100/qkd": Recipe(SMALL_TEACHER, 4, 4, "soft", QKD),
    "cifar100/sqakd": Recipe([], 2, 2, "soft"),
}
ON_PICTURES = {
    "imagenet/lsq": Recipe(CONVOLUTIONS, 4, 4),
    "imagenet/apot": Recipe(CONVOLUTIONS, 2, 2, stages=APOT),
    "imagenet/qkd": Recipe([*CONVOLUTIONS, *SMALL_TEACHER], 4, 4, "soft", QKD),
    "imagenet/profit": Recipe([*CONVOLUTIONS, *SMALL_TEACHER, LONG_ENOUGH], 4, 4, "soft", PROGRESSIVE),
    "imagenet/oscillation": Recipe([*CONVOLUTIONS, "select=[dampened]"], 4, 4),
    "imagenet/deit": Recipe(TRANSFORMER, 4, 4, "soft"),
}


def cases(recipes: dict[str, Recipe]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] * name.startswith(SAME_METHOD)) for name in recipes]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full-precision weights, trained once for all tests here."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of noise images, 16 of each for training and 2 for the test."""
    root = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for part, count in (("train", 16), ("val", 2)):
        for name in ("bird", "cat", "dog"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def run(experiment: str, recipe: Recipe, cache: Path, folder: Path, *data: str) -> dict[str, Any]:
    """Run the miniature; its row of results."""
    overrides = [f"+experiment={experiment}", *SHORT, *data, *recipe.overrides]
    overrides += [f"output={folder}", f"full_precision.folder={cache}", f"results={folder / 'rows.csv'}"]
    run_task(compose(overrides), overrides)
    with (folder / "rows.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    return dict(row)


def check(row: dict[str, Any], experiment: str, recipe: Recipe) -> None:
    assert row["experiment"] == experiment
    assert (int(row["w_bits"]), int(row["a_bits"])) == (recipe.w_bits, recipe.a_bits)
    assert row["distill"] == recipe.distill
    assert row["notes"].partition("stages ")[2] == recipe.stages
    assert 0 <= float(row["top1"]) <= 100


@pytest.mark.parametrize("experiment", cases(ON_DIGITS))
def test_recipe_runs_on_digits(experiment: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QTRAIN_CIFAR10", "QTRAIN_CIFAR100"):  # a key that is null cannot be taken away
        monkeypatch.setenv(name, "unused")
    recipe = ON_DIGITS[experiment]
    check(run(experiment, recipe, cache, tmp_path, *DIGITS), experiment, recipe)
    if experiment == "cifar10/inq":
        assert_all_weights_are_powers_of_two(tmp_path)


def assert_all_weights_are_powers_of_two(folder: Path) -> None:
    """After INQ's last step no layer's weight, first and last included, is anything but 0 or a power of two."""
    (path,) = folder.rglob("student.ckpt")
    weights = {
        name: tensor for name, tensor in latent_state(path.parent).items() if re.search(r"(conv\d|fc)\.weight$", name)
    }
    assert len(weights) > 5
    for name, weight in weights.items():
        mantissa, _ = torch.frexp(weight[weight != 0].abs())
        assert (mantissa == 0.5).all(), name


@pytest.mark.parametrize("experiment", cases(ON_PICTURES))
def test_recipe_runs_on_image_files(experiment: str, cache: Path, pictures: Path, tmp_path: Path) -> None:
    recipe = ON_PICTURES[experiment]
    check(run(experiment, recipe, cache, tmp_path, f"data.root={pictures}", *PICTURES), experiment, recipe)


@pytest.mark.parametrize("experiment", [*ON_DIGITS, *ON_PICTURES])
def test_recipe_stands_in_the_table(experiment: str) -> None:
    assert re.search(rf"^\| `{experiment}` \|", PAGE, re.MULTILINE), "a row in docs/recipes.md"


def test_the_table_names_recipes_that_exist() -> None:
    named = re.findall(r"^\| `([\w/]+)` \|", PAGE, re.MULTILINE)
    assert named
    missing = [name for name in named if not (conf_dir() / "experiment" / f"{name}.yaml").is_file()]
    assert missing == []
