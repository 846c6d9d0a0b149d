"""N ranks train what one rank trains: every quantizer, gradients in few bits, teachers, schedules, stages.

The fits have 64 bits, in which the only thing that ranks change, the order of sums, does not move a code: losses then
agree to rounding errors, and students to those of their last conversion to 32 bits. A method that computed something
from its own slice would be off by far more, from the first step on.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qtrain.tasks.build import build_model
from qtrain.tasks.config import compose
from qtrain.tasks.load import load_data
from tests.distributed.ranks import distance, losses_of, start, student_of, train_on

SMALL = [
    "data=digits", "data.batch_size=48", "data.max_train=192", "data.max_test=60", "model=cifar_resnet8",
    "quantize.calibration_batches=1", "fit.epochs=1", "fit.log_every_steps=1", "fit.health_every_steps=0",
    "fit.reestimate_bn=0", "fit.final_test=false",
]  # fmt: skip
EXACT = [*SMALL, "fit.precision=64-true"]

WEIGHTS = {
    "affine": 4, "apot": 4, "bwn": 1, "binary_connect": 1, "bnn": 1, "bnn_plus": 1, "dorefa": 4, "duq": 4, "inq": 4,
    "ir_net": 1, "kmeans": 4, "lq_nets": 3, "lsq": 4, "lsq_plus": 4, "mx": 4, "ocp_mx": 4, "power_of_two": 4,
    "product": 4, "prox_quant": 4, "qil": 4, "reste": 1, "stochastic_rounding": 4, "ttq": 2, "twn": 2, "vsq": 4,
    "weighted_entropy": 4, "wrpn": 4, "abc_net": 3,
}  # fmt: skip
"""Weight quantizer -> a width that it has."""
INPUTS = {
    "affine": 4, "apot": 4, "bnn": 1, "dorefa": 4, "duq": 4, "dynamic": 4, "lq_nets": 3, "lsq": 4, "lsq_plus": 4,
    "mx": 4, "ocp_mx": 4, "pact": 4, "power_of_two": 4, "qil": 4, "stochastic_rounding": 4, "vsq": 4, "wrpn": 4,
    "xnor": 1, "abc_net": 3,
}  # fmt: skip
WRAPPERS = ("blend", "incremental", "oscillation", "outlier", "pruned", "quant_noise")


def _with(side: str, name: str, bits: int) -> list[str]:
    low = [f"quantize.bits.{side}={bits}", "quantize.bits.first=null", "quantize.bits.last=null"]
    return [f"quantizer@quantize.{side}={name}", *low]


RUNS: dict[str, list[str]] = {
    **{f"weight-{name}": _with("weight", name, bits) for name, bits in WEIGHTS.items()},
    **{f"input-{name}": _with("input", name, bits) for name, bits in INPUTS.items()},
    **{f"around-{name}": [f"+quantizer@quantize.weight_wrapper={name}"] for name in WRAPPERS},
    "gradient-dorefa": ["gradient@quantize.gradient=dorefa"],
    "gradient-int8": ["gradient@quantize.gradient=int8"],
    "soft": ["teacher=self", "objective=soft"],
    "hint": ["teacher=self", "objective=hint"],
    "folded": ["quantize.fold=training"],
    "stages": ["stages=progressive"],
    "average": ["fit.weight_average=0.9"],
    "accumulated": ["trainer.accumulate_grad_batches=2", "fit.epochs=2"],
}
THREE = ("input-dynamic", "input-stochastic_rounding", "weight-lsq", "soft")
"""Also tried on three ranks."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of weights, so that nothing is trained first."""
    torch.manual_seed(0)
    cfg = compose(SMALL)
    model = build_model(cfg.model, load_data(cfg).info)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(model.state_dict(), path)
    return f"model.weights={path}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, weights: str) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("ranks")
    shared = [*EXACT, weights]
    three = {name: RUNS[name] for name in THREE}
    return {
        1: train_on(1, RUNS, folder / "one", shared=shared),
        2: train_on(2, RUNS, folder / "two", shared=shared),
        3: train_on(3, three, folder / "three", shared=shared),
    }


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks"), [*((name, 2) for name in RUNS), *((name, 3) for name in THREE)])
def test_ranks_train_what_one_rank_trains(trained: dict[int, Path], name: str, ranks: int) -> None:
    one, several = trained[1] / name, trained[ranks] / name
    expected = student_of(one)
    losses = losses_of(one), losses_of(several)
    assert len(losses[0]) == len(losses[1]) >= 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    off = {tensor: error for tensor, error in distance(expected, student_of(several)).items() if error > 1e-4}
    assert off == {}


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path, weights: str, before: int, after: int) -> None:
    """Killed on ``before`` ranks at some step, resumed on ``after``; as if nothing had happened, to rounding errors."""
    shared = [*EXACT, weights, "fit.epochs=8", "fit.checkpoint_every_steps=1"]
    undisturbed = train_on(1, {"run": []}, tmp_path / "undisturbed", shared=shared) / "run"
    folder = tmp_path / "killed"
    processes = start(before, {"run": []}, folder, shared=shared)
    metrics = folder / "adhoc" / "run" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= 5):
        assert all(process.poll() is None for process in processes), (folder / "rank0.log").read_text()[-2000:]
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
    assert not (folder / "adhoc" / "run" / "summary.json").exists(), "it was to be killed before its end"
    run = train_on(after, {"run": []}, folder, shared=shared) / "run"
    assert "resuming from" in (folder / "rank0.log").read_text()
    assert losses_of(run) == pytest.approx(losses_of(undisturbed), rel=1e-5)
    off = {name: error for name, error in distance(student_of(undisturbed), student_of(run)).items() if error > 1e-4}
    assert off == {}
