"""The floors of the house: imports point downward only, and heavy packages stay behind their walls."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "qtrain"

FLOORS: dict[str, int] = {
    "spec": 0, "settings": 0, "functional": 0, "storage": 0, "utils": 0,
    "quantizers": 1, "observers": 1, "schedules": 1,
    "nn": 2, "models": 2,
    "convert": 3, "distillation": 3, "synthesis": 3, "costs": 3, "data": 3,
    "allocate": 4, "deployment": 4, "packed": 4, "ptq": 4, "sensitivity": 4,
    "pieces": 5, "tracking": 5,
    "training": 6,
    "pipeline": 7,
    "sweep": 8,
    "report": 9,
    "config": 10,
    "api": 11, "tasks": 11,
    "command_help": 12, "run_task": 12,
    "cli": 13, "__main__": 14,
}  # fmt: skip
"""Room -> floor. docs/architecture.md explains them."""

GROUND = ("spec", "utils")
"""Rooms that the others of floor 0 stand on as well."""

WALLS: dict[str, tuple[str, ...]] = {
    "timm": ("models/",),
    "datasets": ("data/",),
    "pyarrow": ("data/",),
    "wandb": ("tracking/", "utils/compat.py"),  # compat.py: types, and private parts inside a function
    "wandb_workspaces": ("tracking/",),
    "optuna": ("sweep/",),
    "ray": ("sweep/",),
    "omegaconf": ("config/", "cli.py"),
    "hydra": ("config/", "cli.py", "utils/compat.py"),
    "onnx": ("deployment/",),
    "onnx_ir": ("deployment/",),
    "onnxscript": ("deployment/",),
    "onnxruntime": ("deployment/",),
    "openvino": ("deployment/",),
    "gymnasium": ("allocate/",),
    "stable_baselines3": ("allocate/",),
}
"""Third-party package -> files that may import it."""

FILES = sorted(PACKAGE.rglob("*.py"))


def imports(source: str, module: str) -> Iterator[str]:
    """Absolute names of all that ``source``, the text of ``module``, imports, wherever in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(module.split(".")[: -node.level]) + "." if node.level else ""
            base = f"{package}{node.module or ''}".rstrip(".")
            # `from qtrain import spec` imports a module, `from qtrain.spec import Batch` a name: both are reported.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room(module: str) -> str | None:
    """``qtrain.nn.conv`` is in the room ``nn``; the package's own ``__init__`` is in none."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else None


def broken_floors(source: str, module: str) -> list[str]:
    here = room(module)
    broken = []
    for name in imports(source, module):
        there = room(name) if name.split(".")[0] == "qtrain" else None
        if here is None or there is None or here == there:
            continue
        if FLOORS[there] >= FLOORS[here] and there not in GROUND:
            broken.append(f"{module} (floor {FLOORS[here]}) imports {name} (floor {FLOORS[there]})")
    return broken


def broken_walls(source: str, module: str, path: str) -> list[str]:
    return [
        f"{path} imports {name}; only {', '.join(WALLS[package])} may"
        for name in imports(source, module)
        if (package := name.split(".")[0]) in WALLS and not path.startswith(WALLS[package])
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_downward(file: Path) -> None:
    path = file.relative_to(PACKAGE)
    module = ".".join(("qtrain", *path.with_suffix("").parts))
    source = file.read_text(encoding="utf-8")
    if path.parts != ("__init__.py",):
        assert room(module), f"{path} is in no room: give it a floor in FLOORS, and in docs/architecture.md"
    assert broken_floors(source, module) == []
    assert broken_walls(source, module, path.as_posix()) == []


@pytest.mark.parametrize(
    ("source", "module", "broken"),
    [
        ("from qtrain.nn.conv import QuantConv", "qtrain.quantizers.uniform.lsq", True),
        ("import qtrain.models.factory", "qtrain.nn.conv", True),
        ("def f():\n    from qtrain import tasks", "qtrain.training.module", True),
        ("from ..models import factory", "qtrain.nn.conv", True),
        ("from .linear import QuantLinear", "qtrain.nn.conv", False),
        ("from qtrain.spec import QuantSpec", "qtrain.functional.affine", False),
        ("from qtrain.functional import ste", "qtrain.spec", True),
    ],
)
def test_the_walk_sees_a_broken_floor(source: str, module: str, broken: bool) -> None:
    assert bool(broken_floors(source, module)) is broken


def test_the_walk_sees_a_broken_wall() -> None:
    assert broken_walls("import timm.layers", "qtrain.nn.conv", "nn/conv.py")
    assert not broken_walls("import timm.layers", "qtrain.models.layer_kinds", "models/layer_kinds.py")


@pytest.mark.parametrize("module", ["qtrain", "qtrain.cli", "qtrain.config.compose"])
def test_import_is_light(module: str) -> None:
    heavy = ("torch", "torchvision", "pytorch_lightning", "timm", "wandb", "datasets", "sklearn", "matplotlib")
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_training_needs_none_of_the_packages_of_an_export() -> None:
    """The lint and the rounding of biases belong to every run with a target, and a plain installation has no onnx."""
    blocked = ("onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import qtrain.pipeline.train"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
