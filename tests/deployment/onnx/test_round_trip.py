"""Every quantizer and granularity of the config through the export: it passes the gate, or is refused with its reason.

The tables say which of these it is, so that a quantizer that gains a form, or loses one, is noticed.
"""

import pytest
import torch
from torch import nn

from qtrain.convert.calibrate import calibrate
from qtrain.deployment.onnx.lowering import lower
from qtrain.deployment.parity.verify import verify
from qtrain.pipeline.conversion import convert
from qtrain.settings.conf_dir import conf_dir
from qtrain.settings.run_settings import RunSettings
from qtrain.utils.errors import ConfigError
from tests.deployment.onnx.networks import network
from tests.packed.students import settings_of, settings_with

SIZE = (3, 8, 8)
QUANTIZERS = sorted(path.stem for path in (conf_dir() / "quantizer").glob("*.yaml"))
GRANULARITIES = sorted(path.stem for path in (conf_dir() / "granularity").glob("*.yaml"))

VALUES = {
    "abc_net", "kmeans", "lq_nets", "mx", "ocp_mx", "outlier", "product", "pruned", "ttq", "vsq", "weighted_entropy",
}  # fmt: skip
"""Weights that the file has in floating point; those of all other quantizers are integers."""

REFUSED = {
    "abc_net": "are not evenly spaced",
    "apot": "are not evenly spaced",
    "dynamic": "takes its scale from each input",
    "lq_nets": "are not evenly spaced",
    "mx": "are not evenly spaced",
    "ocp_mx": "are not evenly spaced",
    "outlier": "are not evenly spaced",
    "power_of_two": "are not evenly spaced",
    "qil": "rounds by another rule",
    "vsq": "are not evenly spaced",
    "weighted_log": "are not evenly spaced",
}
"""Quantizers of inputs without a form in ONNX, and why."""

FLOATING = {"lsq_plus"}
"""Quantizers of inputs whose codes the file has, but whose layers it computes in floating point."""

GRANULARITIES_OF_VALUES = {"block", "token"}
"""Granularities of weights with several scales for an output, whose weights the file has in floating point."""

FAST = {"affine", "lsq", "dorefa", "bwn", "apot", "kmeans", "bnn", "dynamic"}
"""The others need ``make test-slow``."""


def images() -> torch.Tensor:
    return torch.rand(16, *SIZE, generator=torch.Generator().manual_seed(0))


def student(settings: RunSettings, model: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = network("depthwise") if model is None else model
    model.eval()
    calibrate(model, [images()], convert(settings, model, images()[:1]).plans)
    return model.eval()


def passes(made: nn.Module) -> None:
    verdict = verify(made, [images()], SIZE)
    assert verdict.passed, verdict.faults
    assert all(layer.differing == layer.ties for layer in verdict.tiers[1].layers.values())


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in QUANTIZERS])
def test_weights_pass_the_gate_as_integers_or_as_values(name: str) -> None:
    settings = settings_with(name, "weight")
    if settings is None:  # made for inputs only
        assert name not in VALUES
        return
    made = student(settings)
    notes = lower(made).notes
    assert bool(notes) == (name in VALUES), notes
    passes(made)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in QUANTIZERS])
def test_inputs_pass_the_gate_or_are_refused_with_layer_reason_and_remedy(name: str) -> None:
    settings = settings_with(name, "input")
    if settings is None:  # made for weights only
        assert name not in REFUSED
        return
    made = student(settings)
    if name in REFUSED:
        with pytest.raises(ValueError, match=rf"^stem: its input has no form in ONNX: .*{REFUSED[name]}.*; quantize"):
            verify(made, [images()], SIZE)
        return
    assert bool(lower(made).notes) == (name in FLOATING)
    passes(made)


def plain() -> nn.Module:
    """A network whose layers have a number of outputs that groups of four divide."""
    conv = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def with_granularity(place: str, quantizer: str, name: str) -> RunSettings:
    size = ["quantize.weight.granularity.size=1"] if (place, name) == ("weight", "block") else []
    chosen = [f"quantizer@quantize.{place}={quantizer}", f"granularity@quantize.{place}.granularity={name}"]
    return settings_of(*chosen, *size)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "group" else pytest.mark.slow) for n in GRANULARITIES]
)
def test_granularities_of_weights_pass_the_gate_as_integers_or_as_values(name: str) -> None:
    made = student(with_granularity("weight", "affine", name), plain())
    assert bool(lower(made).notes) == (name in GRANULARITIES_OF_VALUES)
    passes(made)


@pytest.mark.parametrize("name", GRANULARITIES)
def test_granularities_of_inputs_pass_the_gate_or_are_refused(name: str) -> None:
    if name in ("auto", "tensor"):
        made = student(with_granularity("input", "affine", name), plain())
        assert not lower(made).notes
        passes(made)
        return
    with pytest.raises(ConfigError, match=f"'0': Per{name.capitalize()}: axis .* is outside a tensor of shape"):
        student(with_granularity("input", "affine", name), plain())
    if name in ("sample", "token"):
        made = student(with_granularity("input", "dynamic", name), plain())
        with pytest.raises(ValueError, match=r"^0: its input has no form in ONNX: Dynamic takes its scale from each"):
            verify(made, [images()], SIZE)
