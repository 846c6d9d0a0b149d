"""A student of somebody's own package loads in a process that has nothing but what networks are made of."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qtrain.convert.calibrate import calibrate
from qtrain.packed.header import Network
from qtrain.packed.load import load_student
from qtrain.packed.save import save_student
from qtrain.pipeline.conversion import convert
from qtrain.utils.importing import import_object
from tests.packed.students import EVERYWHERE, IMAGES, logits_of, settings_of

PACKAGE = '''
from dataclasses import dataclass
import torch
from torch import nn
from qtrain.quantizers.base import Quantizer, float_parts
from qtrain.spec import PerTensor
from qtrain.storage.base import FloatPart, IntegerPart, QTensor


class Net(nn.Module):
    def __init__(self, *, width: int = 6) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, width, 3, bias=False), nn.Linear(width, 4)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean(dim=(2, 3)))


def build(**options):
    return Net(**options)


@dataclass(frozen=True, kw_only=True)
class Halves(QTensor):
    """Codes that are halves of a step."""

    scale: torch.Tensor

    def dequantize(self):
        return (self.codes * (self.scale / 2)).to(self.dtype)

    def parts(self):
        return {"codes": IntegerPart(self.codes, self.bits, self.low), "scale": FloatPart(self.scale)}

    @property
    def operand_bits(self):
        return self.bits


class HalfSteps(Quantizer):
    def __init__(self, *, spec, power: int = 0) -> None:
        super().__init__(spec=spec, granularity=PerTensor())
        self.power = power
        self.register_buffer("scale", torch.ones(()))

    def fake_quantize(self, x):
        return self.quantize(x).dequantize()

    def quantize(self, x):
        codes = (x.detach() / (self.scale / 2)).round().clamp(self.code_low, self.code_high).to(torch.int32)
        low, high = int(self.code_low), int(self.code_high)
        return Halves(codes=codes, bits=int(self.bits), low=low, high=high, dtype=x.dtype, scale=self.scale.clone())

    def calibrate_(self, observed):
        self.choose_sign_(observed)
        self.scale.copy_(2.0 ** self.power * 2 * observed.high.abs().max() / self.code_high)
        self.initialized.fill_(True)

    def stored_state(self):
        return float_parts(scale=self.scale)
'''

CHILD = """
import importlib.machinery, importlib.metadata as metadata, json, re, sys

def needed(name, found):
    name = re.sub(r"[-_.]+", "-", name).lower()
    if name not in found:
        found.add(name)
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            return found
        for line in requires:
            if "extra ==" not in line:
                needed(re.match(r"[\\w.-]+", line).group(), found)
    return found

allowed = set()
for name in ("torch", "torchvision", "timm", "safetensors", "numpy"):
    needed(name, allowed)
absent = {
    module
    for module, distributions in metadata.packages_distributions().items()
    if not any(re.sub(r"[-_.]+", "-", name).lower() in allowed for name in distributions)
} - {"qtrain"}

class Only(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in absent else super().find_spec(name, path, target)

BLOCKED = {
    "hydra", "omegaconf", "pytorch_lightning", "ray", "optuna", "wandb", "datasets", "pyarrow", "sklearn", "matplotlib",
    "altair",
}
absent |= BLOCKED
sys.meta_path[:] = [Only if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]

import torch
import qtrain
from safetensors.torch import load_file

def imported(names):
    return sorted(set(names) & {name.split(".")[0] for name in sys.modules})

def said(builders):
    try:
        student = qtrain.load(sys.argv[1], builders=builders)
    except ValueError as error:
        return str(error)
    saved = load_file(sys.argv[2])
    with torch.no_grad():
        return torch.equal(student(saved["images"]), saved["logits"])

answers = [{"said": said(builders), "own": imported(["ownpackage"])} for builders in json.loads(sys.argv[3])]
print(json.dumps({"answers": answers, "imported": imported(absent)}))
"""

LINES = {
    (): "ownpackage.build is code of your own",
    ("ownpackag",): "ownpackage.build is code of your own",
    ("ownpackage.build",): "ownpackage.parts.Halves is code of your own",
}
"""What was admitted -> the line that says that it is not enough."""

ENOUGH = (("ownpackage",), ("ownpackage.build", "ownpackage.parts"))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder outside of the checkout with the package ``ownpackage``."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "ownpackage").mkdir()
    (folder / "ownpackage" / "__init__.py").write_text("from ownpackage.parts import build\n")
    (folder / "ownpackage" / "parts.py").write_text(PACKAGE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "ownpackage"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def student_file(package: Path) -> Path:
    """A student of that package's network and quantizer, and beside it its logits as ``logits.safetensors``."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    quantizer = import_object("ownpackage.parts.HalfSteps", admitted=["ownpackage"])
    model = import_object("ownpackage.build", admitted=["ownpackage"])(width=5)
    settings = settings_of(*EVERYWHERE)
    made = {"target": quantizer, "options": {"power": 1}, "partial": True}
    component = replace(settings.quantize.weight, **made)
    settings = replace(settings, quantize=replace(settings.quantize, weight=component, input=component))
    images = torch.rand(4, *IMAGES.size)
    calibrate(model, [images], convert(settings, model, images[:1]).plans)
    model.eval()
    path = package / "student.safetensors"
    network = Network("ownpackage.build", {"width": 5})
    save_student(model, path, network=network, images=IMAGES, builders=["ownpackage"])
    save_file({"images": images, "logits": logits_of(model, images)}, package / "logits.safetensors")
    return path


@pytest.fixture(scope="module")
def elsewhere(student_file: Path, repo: Path) -> Any:
    """What a fresh process says that has only torch, timm, safetensors, NumPy and what these need."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            CHILD,
            student_file,
            student_file.parent / "logits.safetensors",
            json.dumps([*LINES, *ENOUGH]),
        ],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{repo}:{student_file.parent}", "OMP_NUM_THREADS": "1", "PATH": ""},
        cwd=student_file.parent,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_process_without_training_libraries_gives_the_same_logits(elsewhere: Any) -> None:
    assert [answer["said"] for answer in elsewhere["answers"][len(LINES) :]] == [True, True]
    assert elsewhere["imported"] == []


@pytest.mark.parametrize("place", range(len(LINES)), ids=[" ".join(admitted) or "nothing" for admitted in LINES])
def test_code_that_was_not_admitted_is_one_line_and_not_imported(place: int, elsewhere: Any) -> None:
    admitted, line = list(LINES.items())[place]
    answer = elsewhere["answers"][place]
    assert line in answer["said"] and "admit it by its name" in answer["said"]
    assert "\n" not in answer["said"]
    assert answer["own"] == (["ownpackage"] if "ownpackage.build" in admitted else [])


def test_classes_and_functions_themselves_admit_what_they_are(student_file: Path) -> None:
    import ownpackage.parts as parts  # type: ignore[import-not-found]

    load_student(student_file, builders=[parts.build, parts.HalfSteps, parts.Halves])
    with pytest.raises(ValueError, match=r"ownpackage.parts.Halves is code of your own, which is not run unasked"):
        load_student(student_file, builders=[parts.build, parts.HalfSteps])
