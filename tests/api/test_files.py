"""``qtrain.save``, ``qtrain.load`` and ``qtrain.cost`` for networks of one's own and of timm."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import qtrain
from qtrain.packed.header import read
from tests.api.test_quantize import Net, images


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(images())
    return result


def test_a_class_without_arguments_needs_no_builder(tmp_path: Path) -> None:
    student = qtrain.quantize(Net(), images())
    path = tmp_path / "student.safetensors"
    size = qtrain.save(student, path, classes=["a", "b", "c", "d"], mean=[0.5] * 3, std=[0.25] * 3)
    assert size.file_bytes == path.stat().st_size == size.header_bytes + qtrain.cost(student, images()).size_bytes
    assert read(path)[0].images.classes == ("a", "b", "c", "d")
    for builders in ([Net], ["tests.api.test_quantize.Net"], ["tests"]):
        assert torch.equal(logits(qtrain.load(path, builders=builders)), logits(student))


def test_code_of_ones_own_is_not_run_unasked(tmp_path: Path) -> None:
    qtrain.save(qtrain.quantize(Net(), images()), tmp_path / "student.safetensors")
    with pytest.raises(ValueError, match=r"tests.api.test_quantize.Net is code of your own.*builders=\['tests'\]"):
        qtrain.load(tmp_path / "student.safetensors")


def test_arguments_are_said_by_builder_and_options(tmp_path: Path) -> None:
    student = qtrain.quantize(Net(width=6), images())
    with pytest.raises(ValueError, match=r"save: how a Net is built is not known \(.*give builder=... and its options"):
        qtrain.save(student, tmp_path / "student.safetensors")
    assert not list(tmp_path.iterdir())
    qtrain.save(student, tmp_path / "student.safetensors", builder=Net, options={"width": 6})
    assert torch.equal(logits(qtrain.load(tmp_path / "student.safetensors", builders=[Net])), logits(student))


def test_a_network_of_timm_needs_no_builder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = qtrain.quantize(timm.create_model("resnet10t", num_classes=4), images())
    qtrain.save(student, tmp_path / "student.safetensors")
    assert torch.equal(logits(qtrain.load(tmp_path / "student.safetensors")), logits(student))


def test_the_size_of_images_must_be_known_for_an_unquantized_network(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the size of the images is not known; give size="):
        qtrain.save(Net(), tmp_path / "model.safetensors")
    qtrain.save(Net().eval(), tmp_path / "model.safetensors", size=(3, 8, 8))


def test_a_printed_cost_has_a_row_a_layer_and_the_totals() -> None:
    text = str(qtrain.cost(qtrain.quantize(Net(), images()), images()))
    assert [line.split()[0] for line in text.splitlines()] == ["layer", "conv", "middle", "head", "(outside", "total"]


def test_further_metrics_are_those_of_a_search() -> None:
    """Bytes and bit operations, asked for as metrics, are counted in another way, and agree with the report's own."""
    student = qtrain.quantize(Net(), images(), weight_bits=3, input_bits=5)
    report = qtrain.cost(student, images(), metrics=["size_bytes", "bops", "energy", "area"])
    assert report.metrics["size_bytes"].total == report.size_bytes
    assert report.metrics["bops"].total == report.bops
    assert report.metrics["bops"].layers == {row.name: row.bops for row in report.layers}
    assert report.as_dict()["energy"] == report.metrics["energy"].total
    assert [one.unit for one in report.metrics.values()] == ["bytes", "bit operations", "uJ", "mm2"]
    assert "energy, uJ" in str(report).splitlines()[0]
    assert f"{report.metrics['area'].total:,.6g}" == str(report).splitlines()[-1].split()[-1]


def test_more_bits_take_more_energy_in_each_layer_that_has_them() -> None:
    few, many = (
        qtrain.cost(qtrain.quantize(Net(), images(), weight_bits=bits), images(), metrics=["energy"]).metrics["energy"]
        for bits in (3, 7)
    )
    assert few.total < many.total
    assert few.layers["middle"] < many.layers["middle"]
    assert few.layers["conv"] == many.layers["conv"], "the ends have 8 bits in both"


def test_options_choose_another_process() -> None:
    technology = "technology@allocate.costs.energy.technology=7nm"
    found = [
        qtrain.cost(Net(), images(), metrics=["energy"], options=options).metrics["energy"].total
        for options in ([], [technology])
    ]
    assert found[1] < found[0]


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("enrgy", r"there is no such cost; did you mean 'energy'\? \(available: area, bops, .*olaccel, size_bytes\)"),
        ("latency", r"missing: give allocate\.costs\.latency\.table="),
    ],
)
def test_a_metric_that_cannot_be_had_is_refused_in_one_line(metric: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        qtrain.cost(Net(), images(), metrics=[metric])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([torch.zeros(1, 3, 8, 8)], r"cost: images must be a tensor \(N, C, H, W\), got list"),
        (torch.zeros(1, 1, 8, 8), r"cost: Net fails on images \(1, 1, 8, 8\)"),
    ],
)
def test_cost_of_images_that_the_network_does_not_take_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qtrain.cost(Net(), given)


def test_classes_are_as_many_as_outputs(tmp_path: Path) -> None:
    student = qtrain.quantize(Net(), images())
    with pytest.raises(ValueError, match=r"save: student: .* must give logits \(1, 1\) .* got \(1, 4\); 1 classes are"):
        qtrain.save(student, tmp_path / "student.safetensors", classes=["a"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mean": (0.5, 0.5)}, r"mean must be a number for each of 3 channels, got \(0.5, 0.5\)"),
        ({"std": (1.0,)}, "std must be a number for each of 3 channels"),
        ({"std": (0.2, 0.0, 0.2)}, "std must be above 0 in each channel"),
        ({"mean": (0.0, float("nan"), 0.0)}, "mean: must be a finite number"),
        ({"size": (1, 8, 8)}, r"Net fails on images \(1, 1, 8, 8\)"),
    ],
)
def test_images_that_are_not_the_students_are_named_and_not_its_builder(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        qtrain.save(qtrain.quantize(Net(), images()), tmp_path / "student.safetensors", **given)
    assert not list(tmp_path.iterdir())


def test_a_builder_without_a_name_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    qtrain.save(qtrain.quantize(Net(), images()), tmp_path / "student.safetensors", builder=lambda: Net())
    assert "<lambda> has no name to import it by, so only this program can load the file" in caplog.text


def test_a_folder_that_cannot_be_made_is_said_by_its_argument(tmp_path: Path) -> None:
    student = qtrain.quantize(Net(), images())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^save: path: cannot write to .*file/sub \(.*\); give another path"):
        qtrain.save(student, tmp_path / "file" / "sub" / "student.safetensors")
    for path in (tmp_path / "file" / "sub", tmp_path / "file" / "net.onnx"):
        with pytest.raises(ValueError, match=r"^export: path: cannot write to .*file"):
            qtrain.export(student, path, images())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images(), torch.zeros(len(images())).long()))
    with pytest.raises(ValueError, match=r"^distill: folder: cannot write to .*file/sub"):
        qtrain.distill(student, loader, folder=tmp_path / "file" / "sub")


def test_a_target_needs_logits() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.net(x)}

    with pytest.raises(ValueError, match=r"operations: Two gives a dict; .* only where a network gives one tensor"):
        qtrain.quantize(Two(), images(), target="onnxruntime")


def test_of_two_networks_of_one_name_the_one_with_the_path_is_built(tmp_path: Path) -> None:
    made = {}
    for package, function in (("one", "relu"), ("other", "gelu")):
        text = (
            "import torch.nn.functional as F\nfrom torch import nn\n\n\nclass Net(nn.Module):\n"
            "    def __init__(self):\n        super().__init__()\n        self.fc = nn.Linear(12, 3)\n\n"
            f"    def forward(self, x):\n        return F.{function}(self.fc(x.flatten(1)))\n"
        )
        (tmp_path / f"shop_{package}.py").write_text(text)
        spec = importlib.util.spec_from_file_location(f"shop_{package}", tmp_path / f"shop_{package}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        made[package] = module.Net
    given = torch.rand(4, 3, 2, 2)
    student = qtrain.quantize(made["other"](), given)
    qtrain.save(student, tmp_path / "student.safetensors", builder=made["other"])
    for builders in ([made["one"], made["other"]], [made["other"], made["one"]], made["other"]):
        loaded = qtrain.load(tmp_path / "student.safetensors", builders=builders)
        assert torch.equal(loaded(given), student(given))


def test_no_image_has_no_cost() -> None:
    with pytest.raises(ValueError, match="cost: images must be at least one, got none"):
        qtrain.cost(Net(), torch.rand(0, 3, 8, 8))
