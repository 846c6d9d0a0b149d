"""``qtrain.export`` and ``qtrain.verify``: what the command does, for a student and images at hand."""

from __future__ import annotations

import ast
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from PIL import Image, ImageOps
from torch import nn

import qtrain
from qtrain.data.decode import to_8_bits
from tests.api.test_quantize import Net, images

OWN = """
import torch
from torch import nn

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).mean(dim=(2, 3)))

loader = [(torch.rand(16, 3, 8, 8), torch.randint(4, (16,))) for _ in range(3)]
"""

PROGRAM = """
import qtrain
from own import Own, loader

student = qtrain.quantize(Own(), loader, weight_bits=4, input_bits=4)
verdict = qtrain.export(student, "shipped", loader, builder=Own, classes=["ant", "bee", "cat", "dog"])
print(verdict)
assert verdict.passed
assert qtrain.verify(student, "shipped", loader, runtimes=None).passed
assert qtrain.load("shipped/student.safetensors", builders=[Own]) is not None
"""


def test_a_network_of_ones_own_is_quantized_exported_and_verified_in_a_folder_of_its_own(tmp_path: Path) -> None:
    assert len(PROGRAM.strip().splitlines()) <= 12
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(Path(qtrain.__file__).parents[1])}
    run = [sys.executable, "program.py"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "constants: as the student gives them"
    assert done.stdout.splitlines()[-1].startswith("top-1 on 48 images: student ")
    folder = tmp_path / "shipped"
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "labels.json", "model.onnx", "run.py", "student.safetensors", "verify.json",
    }  # fmt: skip
    verdict = json.loads((folder / "verify.json").read_text())
    assert (verdict["passed"], verdict["images"], verdict["test_images"]) == (True, 48, 48)
    assert [tier["name"] for tier in verdict["tiers"]][-1] == "openvino"
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / "black.png")
    program = [sys.executable, str(folder / "run.py"), "black.png"]
    said = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert {"ant", "bee", "cat", "dog"} == {part.split()[0] for part in said.strip().split("\t")[1:]}


@pytest.fixture(scope="module")
def student() -> nn.Module:
    torch.manual_seed(0)
    return qtrain.quantize(Net(), images())


def test_a_file_alone_is_compared_on_images_without_labels(student: nn.Module, tmp_path: Path) -> None:
    verdict = qtrain.export(student, tmp_path / "deep" / "net.onnx", images(), batch=4, compared=7)
    assert verdict.passed and verdict.images == 4 and verdict.top1 == {}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["net.onnx"]


@pytest.mark.parametrize("name", ["net.onnx", "folder"])
def test_packed_weights_of_four_bits_take_half_a_byte_each(name: str, tmp_path: Path) -> None:
    four = qtrain.quantize(Net(), images(), weight_bits=4)
    verdict = qtrain.export(four, tmp_path / name, images(), builder=Net, weights="packed")
    assert verdict.passed
    model = onnx.load(tmp_path / name / "model.onnx" if name == "folder" else tmp_path / name)
    middle = next(t for t in model.graph.initializer if t.name == "middle.weight.codes")
    assert middle.data_type == onnx.TensorProto.INT4
    assert len(middle.raw_data) == four.get_submodule("middle").weight.numel() / 2


def test_a_changed_file_does_not_pass_and_the_log_says_why(
    student: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "net.onnx"
    assert qtrain.export(student, file, images()).passed
    model = onnx.load(file)
    tensor = next(t for t in model.graph.initializer if t.name == "middle.weight.codes")
    codes = numpy_helper.to_array(tensor).copy()
    codes.reshape(-1)[0] -= 1
    tensor.CopyFrom(numpy_helper.from_array(codes, tensor.name))
    onnx.save(model, file)
    with caplog.at_level(logging.ERROR):
        verdict = qtrain.verify(student, file, images())
    assert not verdict.passed
    assert "middle.weight.codes: 1 of its bytes are not the student's" in caplog.text


def test_the_students_mode_and_device_are_left(student: nn.Module, tmp_path: Path) -> None:
    student.train()
    qtrain.export(student, tmp_path / "net.onnx", images())
    assert student.training
    student.eval()


def test_what_is_wrong_is_said_in_one_line(student: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^runtimes: must be among onnxruntime, openvino, got tensorrt"):
        qtrain.export(student, tmp_path / "net.onnx", images(), runtimes=["tensorrt"])
    with pytest.raises(ValueError, match=r"^export: Sequential fails on images \(1, 3, 8, 8\): RuntimeError"):
        qtrain.export(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), tmp_path / "net.onnx", images())
    with pytest.raises(ValueError, match=r"^export: images must be a tensor, or batches of tensors"):
        qtrain.export(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), tmp_path / "net.onnx", [])
    with pytest.raises(ValueError, match=r"^verify: images must be a tensor, or batches of tensors .*, got 'image'"):
        qtrain.export(student, tmp_path / "net.onnx", ["image"])
    with pytest.raises(ValueError, match=r"^weights: must be bytes or packed, got half"):
        qtrain.export(student, tmp_path / "folder", images(), builder=Net, weights="half")
    assert not (tmp_path / "folder").exists()
    with pytest.raises(FileNotFoundError):
        qtrain.verify(student, tmp_path / "absent.onnx", images())
    wide = qtrain.quantize(Net(), torch.rand(2, 3, 8, 12))
    with pytest.raises(ValueError, match=r"square images, gray or in color, got \(3, 8, 12\); give a path that ends"):
        qtrain.export(wide, tmp_path / "folder", torch.rand(2, 3, 8, 12), builder=Net)
    assert qtrain.export(wide, tmp_path / "wide.onnx", torch.rand(2, 3, 8, 12)).passed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            torch.zeros(4, 3, 8, 8, dtype=torch.uint8),
            "images must be floats, normalized as in training, got torch.uint8",
        ),
        (torch.rand(4, 3, 9, 8), r"images must have the shape \(N, 3, 8, 8\), got \(1, 3, 9, 8\)"),
        ([(torch.rand(4, 1, 8, 8), torch.zeros(4))], r"images must have the shape \(N, 3, 8, 8\), got \(4, 1, 8, 8\)"),
    ],
)
def test_images_that_are_not_the_students_are_refused(
    student: nn.Module, given: Any, message: str, tmp_path: Path
) -> None:
    for path in (tmp_path / "net.onnx", tmp_path / "folder"):
        with pytest.raises(ValueError, match=f"^verify: {message}"):
            qtrain.export(student, path, given, builder=Net)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"opset": 99}, r"^opset: torch writes \d+ where 99 is asked for"),
        ({"compared": 0}, "compared must be at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(student: nn.Module, choices: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        qtrain.export(student, tmp_path / "net.onnx", images(), **choices)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_student_of_other_precision_is_exported_in_32_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    student = qtrain.quantize(Net(), images()).to(dtype)
    assert qtrain.export(student, tmp_path / "net.onnx", images()).passed
    assert next(student.parameters()).dtype == dtype


class Several(Net):
    """Its forward gives more than logits."""

    def forward(self, x: torch.Tensor) -> Any:
        return {"logits": super().forward(x), "sum": x.sum(dim=(1, 2, 3))}


def test_a_network_of_several_outputs_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    student = qtrain.quantize(Several(), images())
    for write in (
        lambda: qtrain.export(student, tmp_path / "net.onnx", images()),
        lambda: qtrain.save(student, tmp_path / "student.safetensors"),
    ):
        with pytest.raises(
            ValueError, match=r"Several must give logits \(N, classes\), got a value of type dict; wrap"
        ):
            write()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["README.md", "run.py", "labels.json"])
def test_files_that_no_export_wrote_stay(student: nn.Module, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"has a {name} that no export has written; give a folder of its own"):
        qtrain.export(student, tmp_path, images(), builder=Net)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("bits", [9, 12, 15, 16])
def test_inputs_of_up_to_16_bits_run(bits: int, tmp_path: Path) -> None:
    """Codes of 16 bits are clipped by no runtime, so the values before them are."""
    torch.manual_seed(0)
    given = torch.randn(16, 3, 8, 8)
    student = qtrain.quantize(Net(), given, weight_bits=8, input_bits=bits, ends=None, target="onnxruntime")
    verdict = qtrain.export(student, tmp_path / "net.onnx", 3 * given)
    assert verdict.passed, verdict.faults


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(144, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(x)).flatten(1))  # type: ignore[no-any-return]


def test_hooks_of_quantized_layers_are_in_the_file(tmp_path: Path) -> None:
    """No code of a layer tells of one behind the last, so the logits are compared here."""
    torch.manual_seed(0)
    network, given = Scaled(), torch.rand(8, 3, 8, 8)
    network.head.register_forward_hook(lambda module, inputs, output: output * 2 + 1)
    student = qtrain.quantize(network, given)
    assert qtrain.export(student, tmp_path / "hooked.onnx", given).passed
    session = ort.InferenceSession(tmp_path / "hooked.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": given.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), student(given).detach(), rtol=1e-3, atol=2e-2)


class MeanOfMaps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(x))).mean((2, 3))  # type: ignore[no-any-return]


def test_a_network_that_ends_in_a_mean_over_the_image_passes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = torch.rand(8, 3, 8, 8)
    student = qtrain.quantize(MeanOfMaps(), given)
    verdict = qtrain.export(student, tmp_path / "mean.onnx", [(given, torch.arange(8) % 5)])
    assert verdict.passed, verdict.faults
    assert [output.name for output in onnx.load(tmp_path / "mean.onnx").graph.output] == ["logits"]


def test_a_refused_export_leaves_the_former_one_whole(tmp_path: Path, student: nn.Module) -> None:
    qtrain.export(student, tmp_path, images(), builder=Net)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    refused = qtrain.quantize(Net(), images(), input="apot", input_bits=4)
    with pytest.raises(ValueError, match="not evenly spaced"):
        qtrain.export(refused, tmp_path, images(), builder=Net)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_export_that_breaks_off_in_its_comparison_leaves_no_verdict_of_another(
    tmp_path: Path, student: nn.Module
) -> None:
    qtrain.export(student, tmp_path, images(), builder=Net)
    other = qtrain.quantize(Net(), images(), weight_bits=2)

    def broken() -> Iterator[torch.Tensor]:
        yield images()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qtrain.export(other, tmp_path, broken(), builder=Net)
    assert not (tmp_path / "verify.json").exists() and not (tmp_path / "README.md").exists()


def test_the_program_of_a_folder_decodes_images_as_the_data_sets_do(tmp_path: Path, student: nn.Module) -> None:
    """Alone, without qtrain: turned photographs, 16 bits, transparency, palettes."""
    source = ast.parse((Path(qtrain.__file__).parent / "deployment" / "onnx" / "run.py").read_text())
    (function,) = [node for node in source.body if isinstance(node, ast.FunctionDef) and node.name == "decoded"]
    names: dict[str, Any] = {"np": np, "Image": Image, "ImageOps": ImageOps}
    exec(compile(ast.Module([function], []), "run.py", "exec"), names)
    drawn = np.random.default_rng(0)
    color = Image.fromarray(drawn.integers(0, 256, (6, 9, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "turned.png": (color, {"exif": turned}),
        "clear.png": (Image.fromarray(drawn.integers(0, 256, (6, 9, 4), dtype=np.uint8), "RGBA"), {}),
        "gray16.png": (Image.fromarray(drawn.integers(0, 2**16, (6, 9), dtype=np.uint16)), {}),
        "palette.gif": (color.quantize(16), {"transparency": 3}),
        "cmyk.jpg": (color.convert("CMYK"), {}),
        "bilevel.png": (color.convert("1"), {}),
    }
    for name, (image, options) in files.items():
        image.save(tmp_path / name, **options)
        with Image.open(tmp_path / name) as one, Image.open(tmp_path / name) as other:
            assert np.array_equal(np.asarray(names["decoded"](one)), np.asarray(to_8_bits(other))), name


def test_the_program_runs_a_file_for_several_images_at_a_time(tmp_path: Path, student: nn.Module) -> None:
    qtrain.export(student, tmp_path, images()[:8], builder=Net, batch=8)
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / "black.png")
    program = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "black.png")]
    assert len(subprocess.run(program, capture_output=True, text=True, check=True).stdout.split("\t")) > 2


def test_a_student_that_was_loaded_is_exported_with_what_its_file_says_of_images(
    tmp_path: Path, student: nn.Module
) -> None:
    names, mean, std = ["ant", "bee", "cat", "dog"], [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    qtrain.save(student, tmp_path / "student.safetensors", builder=Net, mean=mean, std=std, classes=names)
    loaded = qtrain.load(tmp_path / "student.safetensors", builders=[Net])
    qtrain.export(loaded, tmp_path / "folder", images(), builder=Net)
    assert json.loads((tmp_path / "folder" / "labels.json").read_text()) == names
    (entry,) = [
        entry.value
        for entry in onnx.load(tmp_path / "folder" / "model.onnx").metadata_props
        if entry.key == "preprocessing"
    ]
    said = json.loads(entry)
    assert (said["mean"], said["std"]) == (mean, std)
    assert qtrain.load(tmp_path / "folder" / "student.safetensors", builders=[Net]).qtrain_images.classes == tuple(
        names
    )


class Forgetful(nn.Module):
    """Its copies are not what it is, as those of ``torch.fx`` networks with hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.factor = nn.Conv2d(3, 4, 3), nn.Linear(144, 5), 2.0

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__({**state, "factor": 1.0})  # type: ignore[no-untyped-call]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.conv(x).flatten(1)) * self.factor
        return logits


def test_a_network_whose_copies_compute_something_else_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.rand(4, 3, 8, 8)
    student: Any = qtrain.quantize(Forgetful(), images)
    student.factor = 2.0
    with pytest.raises(ValueError, match="a copy of the Forgetful computes something else"):
        qtrain.export(student, tmp_path / "x.onnx", images)
    assert not list(tmp_path.iterdir())
    student.factor = 1.0
    assert qtrain.export(student, tmp_path / "x.onnx", images).passed
    student.factor = 2.0
    with pytest.raises(ValueError, match="a copy of the Forgetful computes something else"):
        qtrain.verify(student, tmp_path / "x.onnx", images)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 9, 0]))], "labels from 0 to 9, and the student has 4 classes"),
        (torch.rand(0, 3, 8, 8), "there are none to compare with"),
        (torch.rand(4, 3, 9, 8), "must have the shape"),
    ],
)
def test_images_are_looked_at_before_a_file_is_written(
    given: Any, message: str, student: nn.Module, tmp_path: Path
) -> None:
    for path in (tmp_path / "net.onnx", tmp_path / "folder"):
        with pytest.raises(ValueError, match=message):
            qtrain.export(student, path, given, builder=Net)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
