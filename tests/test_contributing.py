"""The examples in CONTRIBUTING.md are whole: put in place as they stand, they work, and nothing else is edited."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qtrain.config.compose import AD_HOC, compose
from qtrain.pipeline.build_model import build_model
from qtrain.pipeline.load_data import load_data
from qtrain.pipeline.prepare import prepare_student
from qtrain.run_task import run_task
from qtrain.settings.run_settings import RunSettings
from qtrain.spec import StepOutputs
from tests.allocate.problems import best_score, random_problem
from tests.helpers.latent import latent_state

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^ *```(?:python|yaml)\n(?P<text>.*?)^ *```", flags=re.MULTILINE | re.DOTALL)


def examples() -> dict[str, str]:
    """Path -> text of each file that CONTRIBUTING.md shows; a block's first line is its path."""
    blocks = BLOCK.finditer((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    split = (textwrap.dedent(block["text"]).split("\n", 1) for block in blocks)
    return {first.removeprefix("# "): rest for first, rest in split}


@pytest.fixture
def in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The examples as files of the package, without writing into it."""
    rooms = set()
    for name, text in examples().items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        if path.suffix == ".py":
            rooms.add(path.parent.name)
    for room in rooms:
        package = importlib.import_module(f"qtrain.{room}")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / "qtrain" / room)])
    yield tmp_path
    for room in rooms:
        sys.modules.pop(f"qtrain.{room}.mine", None)


def config(folder: Path, *overrides: str) -> RunSettings:
    return compose([f"hydra.searchpath=[file://{folder / 'conf'}]", *overrides])


def laws() -> ModuleType:
    spec = importlib.util.spec_from_file_location("laws_for_contributing", ROOT / "tests" / "test_laws.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_each_addition_is_code_and_config() -> None:
    names = {
        "quantizers": "quantizer", "distillation": "objective", "allocate": "allocate", "data": "data",
        "models": "model",
    }  # fmt: skip
    files = {f"qtrain/{room}/mine.py" for room in names} | {f"conf/{group}/mine.yaml" for group in names.values()}
    assert set(examples()) == files
    assert all(text.startswith("# ") for name, text in examples().items() if name.endswith(".yaml"))


def test_the_quantizer_obeys_the_laws(in_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(in_place, "quantizer@quantize.weight=mine").quantize.weight.build()
    module = laws()
    monkeypatch.setattr(module, "constructor", lambda name, options: made)
    for law in module.LAWS:
        module.test_law("mine", {}, law)


def test_the_quantizer_is_known_to_conversion_cost_checkpoint_and_training(in_place: Path, tmp_path: Path) -> None:
    overrides = [
        f"hydra.searchpath=[file://{in_place / 'conf'}]", f"output={tmp_path}", "name=mine", "trainer=cpu",
        f"full_precision.folder={tmp_path / 'cache'}", "full_precision.epochs=1", "fit.epochs=1", "fit.reestimate_bn=1",
        "data.max_train=256", "data.max_test=64", "model=cifar_resnet8", "model.width=0.25",
        "quantizer@quantize.weight=mine", "quantizer@quantize.input=mine", "fit.health_every_steps=1",
    ]  # fmt: skip
    metrics = run_task(compose(overrides), overrides)
    summary = json.loads((tmp_path / AD_HOC / "mine" / "summary.json").read_text())
    assert summary["top1"] == metrics["top1"] and summary["quantizer"] == "shift"
    convolution = summary["layers"][1]
    decoding = 32 * convolution["shape"][0]
    assert convolution["weight_storage_bits"] == convolution["weights"] * 4 + decoding, (
        "cost read it off the stored tensor"
    )
    state = latent_state(tmp_path / AD_HOC / "mine")
    scales = [tensor for name, tensor in state.items() if name.endswith("weight_quantizer.scale")]
    assert len(scales) == 8 and all(torch.equal(scale.log2(), scale.log2().round()) for scale in scales)
    again = [*overrides, "task=evaluate", f"checkpoint={tmp_path / AD_HOC / 'mine'}"]
    assert run_task(compose(again), again)["top1"] == pytest.approx(metrics["top1"])


def test_the_loss_teaches_the_student_alone(in_place: Path) -> None:
    objective = config(in_place, "teacher=cifar_resnet20", "objective=mine").objective.build()
    assert objective.teacher_terms == ["logits"]
    student, teacher = torch.zeros(2, 3, requires_grad=True), torch.full((2, 3), 2.0)
    objective.set_progress_(0.5)
    losses = objective(StepOutputs(student, torch.tensor([0, 1]), teacher_logits=teacher))
    assert losses["logits"].item() == pytest.approx(4.0)
    assert losses["total"].item() == pytest.approx(losses["hard"].item() + 0.4)
    losses["total"].backward()
    assert student.grad is not None and teacher.grad is None


@pytest.mark.parametrize("seed", range(4))
def test_the_allocator_meets_the_budgets_and_is_near_the_best(seed: int, in_place: Path) -> None:
    search = config(in_place, "task=allocate", "allocate@quantize.bits=mine").quantize.bits.build()
    problem = random_problem(seed)
    allocation = search.search(problem)
    widest = {layer: max(options, key=sum) for layer, options in problem.options.items()}
    assert list(allocation) == list(problem.options) and problem.fits(allocation) and not problem.fits(widest)
    assert best_score(problem) <= problem.scores.total(allocation) * (1 + 1e-9)
    assert search.reference.rest == (4, 4)


def test_the_data_set_gives_batches(in_place: Path) -> None:
    data = config(in_place, "data=mine", "data.size=6").data.build()
    data.setup()
    info = data.info
    assert (info.name, info.num_classes, info.in_channels, info.image_size) == ("stripes", 2, 1, 6)
    assert (info.train_size, info.test_size) == (96, 32)
    batch = next(iter(data.train_dataloader()))
    assert batch.image.shape == (32, 1, 6, 6) and batch.target.dtype == torch.int64


def test_the_model_is_built_for_the_data_and_converted(in_place: Path) -> None:
    settings = config(in_place, "model=mine", "model.options.width=4", "+model@teacher.model=mine", "objective=soft")
    assert settings.teacher.model is not None
    assert settings.model.name == settings.teacher.model.name == "one_convolution"
    data = load_data(settings)
    model = build_model(settings.model, data.info)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10) and model.conv.out_channels == 4
    prepared = prepare_student(settings, model, data)
    assert list(prepared.allocation) == ["conv", "classifier"]


def test_a_wrong_option_of_the_data_set_ends_in_one_line(in_place: Path) -> None:
    with pytest.raises(ValueError, match=r"data: Stripes: size must be at least 2 pixels, got 1"):
        config(in_place, "data=mine", "data.size=1").data.build()
    with pytest.raises(ValueError, match=r"data.sise: Stripes has no such argument; did you mean 'size'\?"):
        config(in_place, "data=mine", "+data.sise=1")
