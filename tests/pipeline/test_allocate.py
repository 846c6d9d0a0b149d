"""A search over bits by a run's settings: the file that it leaves, its use, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from qtrain.config.compose import compose
from qtrain.costs.geometry import layer_geometries
from qtrain.costs.latency_table import LatencyTable, LayerShape, Time, write_table
from qtrain.models.cifar_resnet import cifar_resnet8
from qtrain.pipeline import allocate
from qtrain.pipeline.summary import read_summary
from qtrain.run_task import run_task
from qtrain.sensitivity.fisher import Fisher
from qtrain.sensitivity.one_layer import OneLayer
from qtrain.spec import NO_LABEL, Batch, LayerBits
from qtrain.utils.errors import ConfigError

SMALL = ("data.max_train=64", "data.max_test=50", "data.batch_size=32", "quantize.calibration_batches=2", "logger=none")
PROGRAM = "allocate@quantize.bits=integer_program"

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    torch.manual_seed(0)
    save_file(cifar_resnet8(num_classes=10, in_chans=1, width=0.25).state_dict(), path)
    return path


@pytest.fixture
def run(tmp_path: Path, weights: Path) -> Run:
    def run(*more: str) -> dict[str, Any]:
        own = ["model=cifar_resnet8", "model.width=0.25", f"model.weights={weights}", "allocate.batches=2"]
        folders = [f"output={tmp_path / 'outputs'}", f"allocate.folder={tmp_path / 'cache'}"]
        return run_task(compose([*own, *SMALL, *folders, PROGRAM, *more]))

    return run


def written(folder: Path, name: str = "allocate") -> dict[str, Any]:
    content = yaml.safe_load((folder / "outputs" / "adhoc" / name / "allocation.yaml").read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def bits_of(folder: Path, run: str) -> dict[str, tuple[int, int]]:
    layers = read_summary(folder / "outputs" / "adhoc" / run / "summary.json").layers
    return {str(row["name"]): (row["weight_bits"], row["input_bits"]) for row in layers}


def test_the_file_is_taken_by_a_calibration_which_costs_what_was_predicted(run: Run, tmp_path: Path) -> None:
    found = run("task=allocate", "quantize.bits.weight=3", "quantize.bits.input=3")
    content = written(tmp_path)
    assert content["predicted"]["size_bytes"] == found["size_bytes"] <= content["budgets"]["size_bytes"]
    assert content["predicted"]["score"] < content["uniform"]["score"]
    assert {tuple(content["layers"][name]) for name in ("conv1", "linear")} == {(8, 8)}, "the ends keep their bits"
    file = tmp_path / "outputs" / "adhoc" / "allocate" / "allocation.yaml"
    run("task=calibrate", "name=used", "allocate@quantize.bits=from_file", f"quantize.bits.path={file}")
    assert bits_of(tmp_path, "used") == {name: tuple(pair) for name, pair in content["layers"].items()}
    summary = read_summary(tmp_path / "outputs" / "adhoc" / "used" / "summary.json")
    assert (summary.size_bytes, summary.bops) == (found["size_bytes"], found["bops"])


def test_a_run_whose_bits_are_a_search_gets_the_same_bits(run: Run, tmp_path: Path) -> None:
    run("task=allocate", "quantize.bits.weight=3", "allocate.weight_error=0.5")
    run("task=calibrate", "name=found", "quantize.bits.weight=3", "allocate.weight_error=0.5")
    assert bits_of(tmp_path, "found") == {name: tuple(pair) for name, pair in written(tmp_path)["layers"].items()}


def test_what_was_found_before_is_not_searched_again(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("task=calibrate", "name=first")
    monkeypatch.setattr(allocate, "find_bits", None)
    run("task=calibrate", "name=second")
    assert bits_of(tmp_path, "first") == bits_of(tmp_path, "second")
    with pytest.raises(TypeError, match="not callable"):
        run("task=calibrate", "name=third", "allocate.budgets.size_bytes=90%")


@pytest.mark.parametrize("text", ["{", "[1]", '{"conv1": [8]}', '{"conv1": ["4", 8]}', '{"conv1": [3.7, 8]}'])
def test_a_damaged_file_of_bits_that_were_found_is_one_line(run: Run, tmp_path: Path, text: str) -> None:
    run("task=calibrate", "name=first")
    (file,) = tmp_path.rglob("allocation.json")
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"allocate\.folder: .*allocation\.json is damaged \(.*\); remove it, and"):
        run("task=calibrate", "name=second")


def test_damaged_scores_are_one_line(run: Run, tmp_path: Path) -> None:
    run("task=allocate", "name=a")
    (file,) = (tmp_path / "cache").rglob("scores.json")
    file.write_text(file.read_text().replace("{", "[", 1))
    with pytest.raises(ConfigError, match=r"allocate\.folder: .*scores\.json is damaged \(.*\); remove it, and"):
        run("task=allocate", "name=b", "allocate.budgets.size_bytes=90%")


def test_scores_are_shared_by_searches_with_other_budgets(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("task=allocate", "name=a")
    monkeypatch.setattr(Fisher, "__call__", None)
    run("task=allocate", "name=b", "allocate.budgets={size_bytes:80%}")
    assert (
        written(tmp_path, "allocate-b")["predicted"]["size_bytes"]
        < written(tmp_path, "allocate-a")["predicted"]["size_bytes"]
    )


def test_a_score_around_the_bits_of_a_file_is_measured_again_once_the_file_is_edited(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "reference.yaml"
    file.write_text('layers: {"layer*": [7, 3], conv1: [8, 8], linear: [8, 8]}', encoding="utf-8")
    around = ("score@allocate.score=one_layer", "+allocate@allocate.score.reference=from_file")
    options = ("task=allocate", *around, f"allocate.score.reference.path={file}")
    run("name=first", *options)
    monkeypatch.setattr(OneLayer, "__call__", None)
    run("name=second", "allocate.budgets={size_bytes:80%}", *options)
    file.write_text('layers: {"layer*": [3, 7], conv1: [8, 8], linear: [8, 8]}', encoding="utf-8")
    with pytest.raises(TypeError, match="not callable"):
        run("name=third", *options)


def test_pins_ties_and_policies_hold(run: Run, tmp_path: Path) -> None:
    tied = "allocate.tied={stages:[layer2.*,layer3.0.conv2]}"
    run("task=allocate", "allocate.pinned={layer1.0.conv1:[6,5]}", tied, "allocate.budgets.bops=null")
    layers = written(tmp_path)["layers"]
    assert layers["layer1.0.conv1"] == [6, 5]
    assert len({tuple(layers[name]) for name in layers if name.startswith("layer2") or name == "layer3.0.conv2"}) == 1
    assert len({tuple(pair) for pair in layers.values()}) > 2
    run("task=allocate", "name=policy", "+policy@quantize.policies.keep=policy",
        "quantize.policies.keep.layers=[layer2.*]", "quantize.policies.keep.weight_bits=7")  # fmt: skip
    assert {pair[0] for name, pair in written(tmp_path, "allocate-policy")["layers"].items() if "layer2" in name} == {7}


def test_with_a_target_inputs_have_the_widths_that_it_computes_with(run: Run, tmp_path: Path) -> None:
    bits = ("quantize.bits.weight=4", "quantize.bits.input=8", "quantize.bits.first.input=4")
    run("task=allocate", "target=onnxruntime", *bits)
    pairs = written(tmp_path)["layers"].values()
    assert {pair[1] for pair in pairs} == {8}
    assert len({pair[0] for pair in pairs}) > 1, "fewer bits of a weight make the file shorter in any case"


@pytest.mark.parametrize("score", ["fisher", "one_layer", "hawq_trace"])
def test_with_a_target_and_nothing_else_the_same_bits_are_a_bound_that_it_can_keep(
    run: Run, tmp_path: Path, score: str
) -> None:
    """Operands of sums have 8 bits there, and share a tensor with layers that are scored at other widths too.

    Uniform 4 bits are computed as W4A8, so that is what 100% refers to.
    """
    run("task=allocate", "target=onnxruntime", f"score@allocate.score={score}")
    content = written(tmp_path)
    assert {pair[1] for pair in content["layers"].values()} == {8}
    assert content["budgets"]["bops"] == content["uniform"]["bops"]
    assert max(pair[0] for name, pair in content["layers"].items() if "layer" in name) > 2, (
        "weights have 4 bits to give"
    )


def test_products_with_a_codebook_cost_what_a_calibration_counts(run: Run, tmp_path: Path) -> None:
    """Its entries are floats, whatever the width of an index: a budget of operations counts 32 bits."""
    found = run("task=allocate", "quantizer@quantize.weight=kmeans", "allocate.weight=[2,4]", "allocate.input=[4,8]")
    file = tmp_path / "outputs" / "adhoc" / "allocate" / "allocation.yaml"
    own = ("quantizer@quantize.weight=kmeans", "allocate@quantize.bits=from_file", f"quantize.bits.path={file}")
    run("task=calibrate", "name=used", *own)
    summary = read_summary(tmp_path / "outputs" / "adhoc" / "used" / "summary.json")
    assert (summary.size_bytes, summary.bops) == (found["size_bytes"], found["bops"])


def test_full_precision_is_a_width_like_others(run: Run, tmp_path: Path) -> None:
    """A pinned layer may have it, and without budgets it is the best choice, since it loses nothing."""
    run("task=allocate", "name=pinned", "allocate.pinned={conv1:[32,32]}", "quantize.bits.last.weight=32")
    layers = written(tmp_path, "allocate-pinned")["layers"]
    assert (layers["conv1"], layers["linear"][0]) == ([32, 32], 32)
    run("task=allocate", "name=free", "allocate.weight=[4,32]", "allocate.input=[4,32]", "allocate.budgets=null")
    free = written(tmp_path, "allocate-free")
    assert all(pair == [32, 32] for name, pair in free["layers"].items() if "layer" in name)
    file = tmp_path / "outputs" / "adhoc" / "allocate-pinned" / "allocation.yaml"
    run("task=calibrate", "name=used", "allocate@quantize.bits=from_file", f"quantize.bits.path={file}")
    assert bits_of(tmp_path, "used") == {name: tuple(pair) for name, pair in layers.items()}
    size = read_summary(tmp_path / "outputs" / "adhoc" / "used" / "summary.json").size_bytes
    assert size == written(tmp_path, "allocate-pinned")["predicted"]["size_bytes"]


def latency_file(path: Path, times: Callable[[int, int], float]) -> Path:
    """A table in which the layer in place ``i`` takes ``times(i, bits)`` microseconds."""
    network = cifar_resnet8(num_classes=10, in_chans=1, width=0.25)
    layers: dict[LayerShape, dict[LayerBits, Time]] = {}
    for place, geometry in enumerate(layer_geometries(network, torch.zeros(1, 1, 8, 8))):
        at = {LayerBits(bits, bits): Time(times(place, bits), 1.0, 1.0) for bits in (4, 8, 32)}
        layers.setdefault(LayerShape.of(geometry), at)
    peaks = {LayerBits(32, 32): 1e9}
    write_table(path, LatencyTable("net", {}, layers, {LayerBits(8, 8): 5.0}, peaks, 1e10))
    return path


BY_LATENCY = (
    "+cost@allocate.costs.latency=latency",
    "allocate.budgets={size_bytes:null,bops:null}",
    "+allocate.budgets.latency=90%",
    "quantize.bits={weight:8,input:8}",
    "allocate.weight=[4,8]",
    "allocate.input=[4,8]",
)


def test_a_table_that_was_measured_again_is_another_question(run: Run, tmp_path: Path) -> None:
    """The key of what is kept has the times in it, not the name of their file."""
    file = tmp_path / "latency.json"
    own = (*BY_LATENCY, f"allocate.costs.latency.table={file}")
    latency_file(file, lambda place, bits: 10.0 if bits >= 8 or place <= 4 else 3.0)
    run("task=calibrate", "name=late", *own)
    latency_file(file, lambda place, bits: 10.0 if bits >= 8 or place > 4 else 3.0)
    run("task=calibrate", "name=early", *own)
    assert bits_of(tmp_path, "late") != bits_of(tmp_path, "early")


def test_times_that_fall_with_the_bits_are_within_a_budget_too(run: Run, tmp_path: Path) -> None:
    """4 bits are slower than 8 in all layers, and the file is written whatever chance finds."""
    file = latency_file(tmp_path / "latency.json", lambda place, bits: {4: 12.0, 8: 10.0, 32: 30.0}[bits])
    own = [one.replace("90%", "100%") for one in BY_LATENCY]
    run("task=allocate", *own, f"allocate.costs.latency.table={file}")
    assert {tuple(pair) for pair in written(tmp_path)["layers"].values()} == {(8, 8)}


def test_every_search_runs_and_stays_within_the_budgets(run: Run, tmp_path: Path) -> None:
    shortened = {
        "pareto": [],
        "random": [],
        "evolution": ["quantize.bits.generations=1", "quantize.bits.population=4", "quantize.bits.children=8"],
        "learned": ["quantize.bits.steps=2"],
    }
    for search, options in shortened.items():
        run("task=allocate", f"allocate@quantize.bits={search}", f"name={search}", *options)
        content = written(tmp_path, f"allocate-{search}")
        for name, budget in content["budgets"].items():
            assert content["predicted"][name] <= budget, search
        assert (tmp_path / "outputs" / "adhoc" / f"allocate-{search}" / "allocation.html").is_file(), search


def test_the_page_draws_bits_sensitivity_cost_and_predicted_against_measured(run: Run, tmp_path: Path) -> None:
    run("task=allocate", "quantize.bits.weight=3", "quantize.bits.input=3", "allocate.weight_error=1")
    content = written(tmp_path)
    page = (tmp_path / "outputs" / "adhoc" / "allocate" / "allocation.html").read_text(encoding="utf-8")
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    drawn = re.search(r"^const charts = (\{.*\}), config = ", page, flags=re.MULTILINE)
    assert drawn is not None
    rows = [rows_of(one) for one in json.loads(drawn[1]).values()]
    bits, scores, costs, compared = rows
    assert [heading.partition(":")[0] for heading in headings[:4]] == [
        "Bits", "Sensitivity", "Cost", "Predicted against measured",
    ]  # fmt: skip
    layers = content["layers"]
    assert {(row["layer"], row["what"]): row["value"] for row in bits} == {
        **{(layer, "weights"): pair[0] for layer, pair in layers.items()},
        **{(layer, "inputs"): pair[1] for layer, pair in layers.items()},
    }
    (file,) = (tmp_path / "cache").rglob("scores.json")
    known = json.loads(file.read_text())
    assert {(row["layer"], row["bits"]): row["value"] for row in scores if row["what"] == "weights"} == {
        (layer, width): value for layer, of in known["weight"].items() for width, value in of.items() if value > 0
    }
    parts = {metric: [row["value"] for row in costs if row["what"] == metric] for metric in ("size_bytes", "bops")}
    assert sum(parts["bops"]) == pytest.approx(1.0), "nothing else multiplies"
    assert 0.5 < sum(parts["size_bytes"]) < 1.0, "batch norms and the like are the rest"
    found = next(row for row in compared if row["name"] == "found")
    assert (found["score"], found["loss"]) == pytest.approx(
        (content["predicted"]["score"], content["predicted"]["loss"])
    )


def rows_of(chart: dict[str, Any]) -> list[dict[str, Any]]:
    """The numbers that a chart of the page is drawn from."""
    data = chart.get("data") or next(iter(chart["datasets"].values()))
    values = data["values"] if "values" in data else chart["datasets"][data["name"]]
    assert isinstance(values, list)
    return values


def test_an_allocation_that_somebody_may_have_edited_is_not_overwritten(run: Run, tmp_path: Path) -> None:
    run("task=allocate")
    file = tmp_path / "outputs" / "adhoc" / "allocate" / "allocation.yaml"
    text = file.read_text(encoding="utf-8")
    run("task=allocate")
    file.write_text(text + "# mine\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"holds another allocation, .* overwrite=true"):
        run("task=allocate")
    run("task=allocate", "overwrite=true")
    assert file.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["allocate@quantize.bits=uniform"],
            r"quantize\.bits: task=allocate needs a search over bits; choose .*program",
        ),
        (["allocate.budgets.size_bytes=100"], r"allocate: budgets\.size_bytes: 100 bytes cannot be reached; the cheap"),
        (["allocate.budgets.size_bytes=soon"], r"allocate: budgets\.size_bytes: must be a number of bytes such as"),
        (["+allocate.budgets.latency=3 ms"], r"budgets\.latency: there is no such cost; .*\+cost@allocate\.costs\.lat"),
        (["allocate.pinned={layerX:[8,8]}"], r"allocate: pinned\.layerX: fits no quantizable layer"),
        (["allocate.pinned={conv1:8}"], r"allocate: pinned\.conv1: must be \[weight, input\] bits"),
        (
            ["target=onnxruntime", "allocate.pinned={layer1.*:[4,5]}"],
            r"pinned\.layer1\.\*: onnxruntime computes inputs of 8 bits, so 5 gain nothing; take \[4, 8\], or target=",
        ),
        (["allocate.tied={a:[layerX]}"], r"allocate: tied\.a: fits no quantizable layer"),
        (["allocate.weight=[0,4]"], r"allocate\.weight: widths must be 1\.\.16 bits, or 32, got 0"),
        (["quantize.enabled=false"], r"quantize\.enabled: is false"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_line(run: Run, more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        run("task=allocate", *more)
    assert "\n" not in str(refused.value)


class Bank:
    model = torch.nn.Flatten()
    used: dict[str, LayerBits]

    def use_(self, allocation: dict[str, LayerBits]) -> None:
        self.used = allocation


def test_a_measured_loss_is_the_mean_over_all_images_that_have_a_label() -> None:
    logits = torch.randn(5, 3)
    target = torch.tensor([0, NO_LABEL, 2, NO_LABEL, 1])
    batches = [Batch(logits[:2], target[:2], target[:2]), Batch(logits[2:], target[2:], target[2:])]
    wanted = -logits.log_softmax(1)[[0, 2, 4], [0, 2, 1]].mean()
    assert allocate.loss_of(Bank(), batches, {}) == pytest.approx(float(wanted))  # type: ignore[arg-type]
    hidden = [batch._replace(target=torch.full_like(batch.target, NO_LABEL)) for batch in batches]
    with pytest.raises(ValueError, match=r"a loss needs the labels of some of the images"):
        allocate.loss_of(Bank(), hidden, {})  # type: ignore[arg-type]


def test_images_without_labels_have_bits_but_no_loss(run: Run, tmp_path: Path) -> None:
    """Fisher's scores need none; a search that measures losses says so."""
    run("task=allocate", "data.labeled=1", "data.max_train=null", "allocate.batches=1")
    content = written(tmp_path)
    assert "loss" not in content["predicted"]
    for score in ("limpq", "hawq_trace", "hawq_eigenvalue", "one_layer allocate.score.measure=loss"):
        with pytest.raises(ConfigError, match=r"allocate: this score needs labels, .*; take score fisher"):
            run("task=allocate", "name=s", "data.labeled=1", "data.max_train=null", "allocate.batches=1",
                *f"score@allocate.score={score}".split())  # fmt: skip
    with pytest.raises(ConfigError, match=r"allocate: a loss needs the labels of some"):
        run("task=allocate", "name=e", "data.labeled=1", "data.max_train=null", "allocate.batches=1",
            "allocate@quantize.bits=evolution")  # fmt: skip
    with pytest.raises(ConfigError, match=r"allocate: Learned: needs labels"):
        run("task=allocate", "name=l", "data.labeled=1", "data.max_train=null", "allocate.batches=1",
            "allocate@quantize.bits=learned")  # fmt: skip


def test_a_measured_loss_is_the_mean_over_all_images_of_all_batches() -> None:
    logits = torch.randn(5, 3)
    target = torch.tensor([0, 1, 2, 0, 1])
    batches = [Batch(logits[:2], target[:2], target[:2]), Batch(logits[2:], target[2:], target[2:])]
    bank = Bank()
    wanted = -logits.log_softmax(1)[torch.arange(5), target].mean()
    assert allocate.loss_of(bank, batches, {"a": LayerBits(2, 2)}) == pytest.approx(float(wanted))  # type: ignore[arg-type]
    assert bank.used == {"a": LayerBits(2, 2)}


@pytest.mark.parametrize(
    ("more", "left"),
    [
        (["task=calibrate"], 1.0),
        (["task=calibrate", "rounding@quantize.rounding=brecq"], 0.1),
        (["task=train"], 0.1),
        (["task=allocate"], 0.1),
        (["task=calibrate", "allocate.weight_error=0.3"], 0.3),
        (["task=train", "score@allocate.score=limpq"], 0.1),
    ],
)
def test_what_makes_up_for_rounding_leaves_a_part_of_a_weights_error(more: list[str], left: float) -> None:
    assert allocate.weight_error(compose(more)) == left
