"""Each variant of each shipped experiment can be converted, whichever quantizers and widths it names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qtrain.config.compose import compose
from qtrain.pipeline.conversion import convert

EXPERIMENTS = Path(__file__).parents[2] / "conf" / "experiment"
NAMES = sorted(str(path.relative_to(EXPERIMENTS).with_suffix("")) for path in EXPERIMENTS.rglob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_variant_of_an_experiment_converts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("QTRAIN_CIFAR10", "QTRAIN_RESNET20", "QTRAIN_RESNET56"):
        monkeypatch.delenv(variable, raising=False)
    base = compose([f"+experiment={name}"])
    converted = 0
    for variant in base.variants or [None]:
        own = [] if variant is None else base.variants[variant]
        settings = compose([f"+experiment={name}", *own, "variants=null", "select=null"])
        if not settings.quantize.enabled or not settings.model.name.startswith("cifar"):
            continue
        torch.manual_seed(0)
        model = settings.model.build()(num_classes=10, in_channels=3, image_size=32).eval()
        converted += bool(convert(settings, model, torch.rand(1, 3, 32, 32)).allocation)
    if name.startswith("cifar10/"):
        assert converted, "no variant was looked at"
