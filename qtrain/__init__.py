"""qtrain: distributed, distillation-assisted quantization-aware training.

    student = qtrain.quantize(model, images, weight_bits=4, input_bits=4)
    qtrain.distill(student, train_loader, teacher=model, val_loader=val_loader, epochs=3)
    qtrain.save(student, "student.safetensors")
    model = qtrain.load("student.safetensors")
    qtrain.export(student, "shipped", val_loader)

Importing it is cheap: each name below is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtrain.api.deploy import export as export
    from qtrain.api.deploy import verify as verify
    from qtrain.api.distill import begin_step_ as begin_step_
    from qtrain.api.distill import distill as distill
    from qtrain.api.distill import project_ as project_
    from qtrain.api.files import cost as cost
    from qtrain.api.files import save as save
    from qtrain.api.many_bits import set_bits as set_bits
    from qtrain.api.quantize import describe as describe
    from qtrain.api.quantize import quantize as quantize
    from qtrain.convert.plan import Policy as Policy
    from qtrain.packed.load import load_student as load
    from qtrain.spec import LayerBits as LayerBits

__version__ = "0.1.0"

_OFFERED = {
    "quantize": ("qtrain.api.quantize", "quantize"),
    "describe": ("qtrain.api.quantize", "describe"),
    "cost": ("qtrain.api.files", "cost"),
    "distill": ("qtrain.api.distill", "distill"),
    "begin_step_": ("qtrain.api.distill", "begin_step_"),
    "project_": ("qtrain.api.distill", "project_"),
    "set_bits": ("qtrain.api.many_bits", "set_bits"),
    "save": ("qtrain.api.files", "save"),
    "export": ("qtrain.api.deploy", "export"),
    "verify": ("qtrain.api.deploy", "verify"),
    "load": ("qtrain.packed.load", "load_student"),
    "LayerBits": ("qtrain.spec", "LayerBits"),
    "Policy": ("qtrain.convert.plan", "Policy"),
}
"""Name -> the module that defines it, and its name there."""

__all__ = [
    "LayerBits",
    "Policy",
    "__version__",
    "begin_step_",
    "cost",
    "describe",
    "distill",
    "export",
    "load",
    "project_",
    "quantize",
    "save",
    "set_bits",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _OFFERED:
        raise AttributeError(f"module 'qtrain' has no attribute {name!r}")
    module, own = _OFFERED[name]
    try:
        return getattr(importlib.import_module(module), own)
    except ModuleNotFoundError as error:
        if module != "qtrain.api.deploy" or (error.name or "").startswith("qtrain"):
            raise
        raise ImportError(f"qtrain.{name}: {error.name} is not installed; pip install 'qtrain[export]'") from error


def __dir__() -> list[str]:
    return sorted({*globals(), *_OFFERED})
