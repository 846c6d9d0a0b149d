"""Which part of a LightningModule the callbacks look at.

A training module also holds an objective, perhaps with parameters; averaging, scales and diagnoses are about
the student alone.
"""

from __future__ import annotations

import pytorch_lightning as pl
from torch import nn


def student_of(pl_module: pl.LightningModule) -> nn.Module:
    """``pl_module.student`` where there is one, otherwise the module itself."""
    student = getattr(pl_module, "student", pl_module)
    return student if isinstance(student, nn.Module) else pl_module
