"""N ranks train what one rank trains: every quantizer, gradients in few bits, teachers, schedules, stages.

The fits have 64 bits, in which the only thing that ranks change, the order of sums, does not move a code: losses then
agree to rounding errors, and students to those of their last conversion to 32 bits. A method that computed something
from its own slice would be off by far more, from the first step on.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qtrain.config.compose import compose
from qtrain.pipeline.build_model import build_model
from qtrain.pipeline.load_data import load_data
from qtrain.settings.conf_dir import conf_dir
from tests.distributed.ranks import distance, losses_of, start, student_of, train_on
from tests.helpers.widths import INPUTS, WEIGHTS, WRAPPERS

SMALL = [
    "data=digits", "data.batch_size=48", "data.max_train=192", "data.max_test=60", "model=cifar_resnet8",
    "quantize.calibration_batches=1", "fit.epochs=1", "fit.log_every_steps=1", "fit.health_every_steps=0",
    "fit.reestimate_bn=0", "fit.final_test=false",
]  # fmt: skip
EXACT = [*SMALL, "fit.precision=64-true"]

AFFINE = ["quantizer@quantize.weight=affine", "quantizer@quantize.input=affine"]
ENDS_TOO = ["quantize.bits.first=null", "quantize.bits.last=null"]


LAYERS = [
    "conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2", "layer3.0.conv1", "layer3.0.conv2",
    "linear",
]  # fmt: skip


def _mixed() -> dict[str, dict[str, tuple[str, str]]]:
    """Run -> layer -> its quantizer of weights and of inputs: another pair in each layer, so that few runs try all."""
    pairs = list(zip(WEIGHTS, itertools.cycle(INPUTS), strict=False))
    return {
        f"mixed-{place // len(LAYERS)}": dict(zip(LAYERS, pairs[place : place + len(LAYERS)], strict=False))
        for place in range(0, len(pairs), len(LAYERS))
    }


MIXED = _mixed()


def _policies(pairs: dict[str, tuple[str, str]]) -> list[str]:
    """Overrides that give each layer its pair."""
    found = list(ENDS_TOO)
    for number, (layer, (weight, input)) in enumerate(pairs.items()):
        policy = f"quantize.policies.p{number}"
        found += [
            f"+policy@{policy}=policy", f"{policy}.layers=[{layer}]",
            f"+quantizer@{policy}.weight={weight}", f"{policy}.weight_bits={WEIGHTS[weight]}",
            f"+quantizer@{policy}.input={input}", f"{policy}.input_bits={INPUTS[input]}",
        ]  # fmt: skip
    return found


RUNS: dict[str, list[str]] = {
    **{name: _policies(pairs) for name, pairs in MIXED.items()},
    **{f"around-{name}": [f"+quantizer@quantize.weight_wrapper={name}"] for name in WRAPPERS},
    "gradient-dorefa": ["gradient@quantize.gradient=dorefa"],
    "gradient-int8": ["gradient@quantize.gradient=int8"],
    "soft": ["teacher=self", "objective=soft"],
    "hint": ["teacher=self", "objective=hint"],
    "similarity": ["teacher=self", "objective=similarity"],
    "relational": ["teacher=self", "objective=relational"],
    "blockwise-balanced": ["teacher=self", "objective=blockwise", "+callback@callbacks.balance=balance"],
    "soft-sharded": ["teacher=self", "objective=soft", "teacher.shard=true", "teacher_cache=full"],
    "hint-sharded": ["teacher=self", "objective=hint", "teacher.shard=true"],
    "folded": ["quantize.fold=training"],
    "stages": ["stages=progressive"],
    "bits-watched": [
        "+callback@callbacks.bits=bits",
        "callbacks.bits.weight.milestones=[0.1,0.3,0.6]",
        "callbacks.bits.input.milestones=[0.1,0.3,0.6]",
        "+callback@callbacks.instability=instability",
        "callbacks.instability.every_n_steps=2",
    ],
    "target": ["target=onnxruntime", "+callback@callbacks.bits=bits"],
    "average": ["fit.weight_average=0.9"],
    "accumulated": ["trainer.accumulate_grad_batches=2", "fit.epochs=2"],
}
SINGLE = {
    f"single-{name}": [*own, "fit.precision=32-true", "fit.epochs=4"]
    for name, own in {"affine": AFFINE, "soft": RUNS["soft"], "average": RUNS["average"]}.items()
}
"""Runs in 32 bits, of sixteen steps."""
SHARDED = {
    f"sharded-{name}": [*RUNS[name], "fit.shard=true"]
    for name in (
        "mixed-0",
        "around-quant_noise",
        "around-incremental",
        "hint",
        "stages",
        "target",
        "accumulated",
        "bits-watched",
    )
}
"""Runs whose student is spread over two ranks, in all that looks at weights or moves them."""
LONG = {"long": ["fit.epochs=8", "fit.checkpoint_every_steps=1"]}
"""A run of 32 steps, to be killed."""
ON_THREE = {name: RUNS[name] for name in (*MIXED, "soft", "soft-sharded")}
"""Also tried on three ranks."""


def test_every_quantizer_is_among_the_runs() -> None:
    known = {path.stem for path in (conf_dir() / "quantizer").glob("*.yaml")}
    assert known == {*WEIGHTS, *INPUTS, *WRAPPERS}
    pairs = [pair for own in MIXED.values() for pair in own.values()]
    assert ({weight for weight, _ in pairs}, {input for _, input in pairs}) == ({*WEIGHTS}, {*INPUTS})


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of weights, so that nothing is trained first."""
    cfg = compose(SMALL)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(cfg.model, load_data(cfg).info)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(model.state_dict(), path)
    return f"model.weights={path}"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, weights: str) -> dict[int, Path]:
    """All runs on one, two and three ranks, trained once for all workers of a parallel session."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "ranks"
    folder.mkdir(exist_ok=True)
    wanted = {1: RUNS | SINGLE | LONG, 2: RUNS | SINGLE | SHARDED, 3: ON_THREE}
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first worker that comes trains, the others wait
        for ranks, runs in wanted.items():
            if not (folder / f"done{ranks}").exists():
                train_on(ranks, runs, folder / str(ranks), shared=[*EXACT, weights])
                (folder / f"done{ranks}").touch()
    return {ranks: folder / str(ranks) / "adhoc" for ranks in wanted}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks"), [*((name, 2) for name in RUNS), *((name, 3) for name in ON_THREE)])
def test_ranks_train_what_one_rank_trains(trained: dict[int, Path], name: str, ranks: int) -> None:
    one, several = trained[1] / name, trained[ranks] / name
    expected = student_of(one)
    losses = losses_of(one), losses_of(several)
    assert len(losses[0]) == len(losses[1]) >= 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    off = {tensor: error for tensor, error in distance(expected, student_of(several)).items() if error > 1e-4}
    assert off == {}, MIXED.get(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_student_trains_what_a_whole_one_does(trained: dict[int, Path], name: str) -> None:
    one, several = trained[1] / name.removeprefix("sharded-"), trained[2] / name
    assert losses_of(several) == pytest.approx(losses_of(one), rel=1e-5)
    off = {tensor: e for tensor, e in distance(student_of(one), student_of(several)).items() if e > 1e-4}
    assert off == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", SINGLE)
def test_in_32_bits_ranks_drift_apart_by_rounding_alone(trained: dict[int, Path], name: str) -> None:
    """The first loss to 1e-6; then codes flip that lay at a tie, and sixteen steps stay within a tenth."""
    losses = losses_of(trained[1] / name), losses_of(trained[2] / name)
    assert len(losses[0]) == len(losses[1]) == 16
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-6)
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [((2, False), (1, False)), ((2, True), (1, False)), ((1, False), (2, True))],
    ids=["two to one", "two that share to one", "one to two that share"],
)
def test_a_run_goes_on_with_other_ranks(
    tmp_path: Path, trained: dict[int, Path], weights: str, before: tuple[int, bool], after: tuple[int, bool]
) -> None:
    """Killed on some ranks at some step, resumed on others; as if nothing had happened, to rounding errors."""
    undisturbed = trained[1] / "long"
    shared = [*EXACT, weights, *LONG["long"]]
    ranks, shard = before
    processes = start(ranks, {"run": [f"fit.shard={shard}"]}, tmp_path, shared=shared)
    metrics = tmp_path / "adhoc" / "run" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= 5):
        assert all(process.poll() is None for process in processes), (tmp_path / "rank0.log").read_text()[-2000:]
        time.sleep(0.01)
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
    assert not (tmp_path / "adhoc" / "run" / "summary.json").exists(), "it was to be killed before its end"
    ranks, shard = after
    run = train_on(ranks, {"run": [f"fit.shard={shard}"]}, tmp_path, shared=shared) / "run"
    assert "Restored all states from the checkpoint" in (tmp_path / "rank0.log").read_text()
    assert losses_of(run) == pytest.approx(losses_of(undisturbed), rel=1e-5)
    off = {name: error for name, error in distance(student_of(undisturbed), student_of(run)).items() if error > 1e-4}
    assert off == {}
