"""The part of a LightningModule that callbacks work on.

A training module also has an objective, which may have parameters. Averaging, bits and diagnoses concern only the
student.
"""

import pytorch_lightning as pl
from torch import nn


def student_of(pl_module: pl.LightningModule) -> nn.Module:
    """``pl_module.student`` where there is one, otherwise the module itself."""
    student = getattr(pl_module, "student", pl_module)
    return student if isinstance(student, nn.Module) else pl_module
