"""Whether two commits train the same, bit for bit: the same short runs on both, and all that they leave compared.

    python scripts/golden.py main HEAD                      # what a refactoring must pass
    python scripts/golden.py main . --only quickstart       # the files of this folder, committed or not
    python scripts/golden.py main HEAD --work /tmp/golden   # keeps what was run; the next call repeats none of it
    python scripts/golden.py HEAD HEAD                      # is there anything that is not deterministic?

Each commit is checked out beside the other and run by the interpreter that runs this script. Compared are the tensors
of each student, the rows of each metrics.jsonl, and the numbers of each summary.json and trials.jsonl, without what the
clock says. Exit code 1: something differs, or a run failed on either side.

Where a commit renames something, it goes into ``RENAMED``, so that both sides are asked for the same thing.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as save_tensors

Names = Mapping[str, str]
Kind = Literal["overrides", "metrics", "tensors", "files"]


@dataclass(frozen=True, kw_only=True)
class Renamed:
    """Old -> new of one commit. A side has the new names if it has the path ``since``.

    ``since`` may also be ``path: text``, a file that holds the text. A name is replaced wherever it stands as a whole
    word: ``fit.epochs`` in ``fit.epochs=2``, ``quantize.bits`` in ``quantize.bits.weight=4``.

    ``overrides`` are keys, groups and options of the command line, and there ``epochs`` is no part of ``fit.epochs``.
    ``metrics`` are columns of metrics.jsonl and keys of summary.json and trials.jsonl. ``tensors`` are parts of their
    names, ``files`` parts of paths below the output folder.
    """

    since: str
    overrides: Names = field(default_factory=dict)
    metrics: Names = field(default_factory=dict)
    tensors: Names = field(default_factory=dict)
    files: Names = field(default_factory=dict)


LAYERS = ("conv1", *(f"layer{stage}.0.conv{number}" for stage in (1, 2, 3) for number in (1, 2)), "linear")
"""Of a ResNet-8."""

RENAMED: tuple[Renamed, ...] = (
    Renamed(
        since="qtrain/pipeline",
        overrides={"widths": "bit_widths"},
        metrics={"figures": "metrics", **{f"widths.{layer}": f"layer_bits.{layer}" for layer in LAYERS}},
    ),
    # From here on student.safetensors is packed; what it was before is in student.ckpt.
    Renamed(since="qtrain/pipeline/student_file.py", files={"student.safetensors": "student.ckpt"}),
    Renamed(  # small gray images are no longer treated as large ones in color, unless one says so
        since="conf/data/imagefolder.yaml: crop_scale",
        overrides={
            "data=imagefolder": "data=imagefolder data.crop=random_resized data.crop_pct=0.875 data.flip=true"
            " data.channels=3"
        },
    ),
)
"""In the order of the commits. The runs below are spelled as they were before all of them."""

ADDED = ("file_bytes", "header_bytes")
"""Figures that the earlier side may lack."""

CLOCK = ("time", "images_per_s", "step_ms", "wall_s", "train_s", "overhead_s", "started", "ended")
"""Names that measure time."""

STUDENT, METRICS, SUMMARY, TRIALS = "student.safetensors", "metrics.jsonl", "summary.json", "trials.jsonl"
TIMEOUT_S = 900


@dataclass(frozen=True)
class Run:
    """Commands, one after the other, in one output folder; ``$OUT`` and ``$IMAGES`` stand for folders."""

    name: str
    commands: tuple[str, ...]


FEW = """
    trainer=cpu data.max_train=256 data.max_test=128 full_precision.epochs=2 fit.log_every_steps=1
    fit.health_every_steps=4 seed=0
"""
TINY = f"""
    {FEW} model=cifar_resnet8 model.width=0.5 data.batch_size=32 fit.epochs=2 fit.reestimate_bn=2
    quantize.calibration_batches=2 quantize.weight.init=range quantize.input.init=range optimizer.lr=0.01
"""
TRAINED = f"{TINY} quantize.enabled=false fit.epochs=6 optimizer=adam name=fp"
FROM_TRAINED = "model.weights=$OUT/adhoc/fp/student.safetensors"
TAUGHT = "teacher=cifar_resnet20 teacher.model.width=0.5 objective=soft"
FREE = f"""
    data=synthetic data@data.test=digits data.image_size=8 data.in_channels=1 data.crop_padding=1 data.flip=false
    data.test.mean=[0.3] data.test.std=[0.37] data.test.max_test=128 synthesis=bn_statistics synthesis.batch_size=16
    synthesis.steps=8 synthesis.shift=1 synthesis.flip=false synthesize.images=64 synthesize.workers=1
    {FROM_TRAINED} teacher=self objective=kl name=free
"""
WEIGHTS = """
    affine:4 apot:4 bwn:1 binary_connect:1 bnn:1 bnn_plus:1 dorefa:4 duq:4 inq:4 ir_net:1 kmeans:4 lq_nets:3 lsq:4
    lsq_plus:4 mx:4 ocp_mx:4 power_of_two:4 product:4 prox_quant:4 qil:4 reste:1 stochastic_rounding:4 ttq:2 twn:2
    vsq:4 weighted_entropy:4 wrpn:4 abc_net:3
""".split()
INPUTS = """
    affine:4 apot:4 bnn:1 dorefa:4 duq:4 dynamic:4 lq_nets:3 lsq:4 lsq_plus:4 mx:4 ocp_mx:4 pact:4 power_of_two:4 qil:4
    stochastic_rounding:4 vsq:4 wrpn:4 xnor:1 abc_net:3
""".split()
WRAPPERS = ("blend", "incremental", "oscillation", "outlier", "pruned", "quant_noise")
TERMS = ("attention", "blockwise", "hint", "relational", "similarity", "soft")


def _policies(pairs: Sequence[tuple[str, str]]) -> str:
    """Overrides that give each layer its own quantizers."""
    words = ["quantize.bits.first=null", "quantize.bits.last=null"]
    for number, (layer, (weight, input)) in enumerate(zip(LAYERS, pairs, strict=False)):
        policy = f"quantize.policies.p{number}"
        (of_weight, weight_bits), (of_input, input_bits) = weight.split(":"), input.split(":")
        words += [
            f"+policy@{policy}=policy", f"{policy}.layers=[{layer}]",
            f"+quantizer@{policy}.weight={of_weight}", f"{policy}.weight_bits={weight_bits}",
            f"+quantizer@{policy}.input={of_input}", f"{policy}.input_bits={input_bits}",
        ]  # fmt: skip
    return " ".join(words)


def _methods() -> dict[str, str]:
    """Many ways of training, each a few steps: name -> overrides."""
    pairs = list(zip(WEIGHTS, itertools.cycle(INPUTS), strict=False))
    mixed = {
        f"mixed-{start // len(LAYERS)}": _policies(pairs[start : start + len(LAYERS)])
        for start in range(0, len(pairs), len(LAYERS))
    }
    around = {f"around-{name}": f"+quantizer@quantize.weight_wrapper={name}" for name in WRAPPERS}
    taught = {f"term-{name}": f"teacher=self objective={name}" for name in TERMS}
    gradients = {f"gradient-{name}": f"gradient@quantize.gradient={name}" for name in ("dorefa", "int8")}
    others = {"folded": "quantize.fold=training", "average": "fit.weight_average=0.9 optimizer=adam"}
    prepared = {
        "rounded": "task=calibrate rounding@quantize.rounding=adaround quantize.rounding.iterations=20",
        "equalized": "task=calibrate quantize.fold=before equalize@quantize.equalize=cross_layer",
        "corrected": "task=calibrate bias@quantize.bias=batches",
    }
    return mixed | around | taught | gradients | others | prepared


def _variants(runs: Names) -> str:
    """One override that makes each of ``runs`` a variant of the command."""
    lists = (f"{name}:[{','.join(map(repr, own.split()))}]" for name, own in runs.items())
    return f"variants={{{','.join(lists)}}}"


RUNS = (
    Run("quickstart", (f"+experiment=quickstart {FEW}",)),
    Run("streaming", (
        f"{TINY} data=imagefolder data.root=$IMAGES data.image_size=16 data.workers=1 data.max_train=96 data.mixup=0.2"
        " data.auto_augment=rand-m9-mstd0.5 data.re_prob=0.25",
    )),
    Run("cached-teacher", tuple(f"{TINY} {TAUGHT} teacher_cache=full name={name}" for name in ("first", "replayed"))),
    Run("stages", (
        f"{TINY} {TAUGHT} name=bits +stages.wide=['quantize.bits.weight=8','quantize.bits.input=8','fit.share=0.5']"
        " +stages.falling=['+callback@callbacks.bits=bits','fit.share=0.5','fit.carry_optimizer=true']",
        f"{TINY} stages=profit data.batch_size=8 name=profit",
    )),
    Run("data-free", (
        f"{TRAINED} data.mean=[0.3] data.std=[0.37]",
        f"{TINY} {FREE}",
    )),
    Run("sweep", (
        f"{TINY} task=sweep search@sweep.search=tpe sweep.trials=6 sweep.parallel=1 sweep.val_fraction=0.2"
        " +knob@sweep.space.widths=widths sweep.space.widths.choices=[2,4]"
        " +knob@sweep.space.lr=log_uniform sweep.space.lr={key:optimizer.lr,low:0.001,high:0.02}",
    )),
    Run("two-ranks", (f"{TINY} {TAUGHT} trainer.devices=2",)),
    Run("methods", (TRAINED, f"{TINY} {FROM_TRAINED} fit.epochs=1 {_variants(_methods())}")),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="a commit, or the folder of a checkout")
    parser.add_argument("after", help="likewise")
    parser.add_argument("--only", nargs="+", choices=[run.name for run in RUNS], metavar="NAME", help="only these runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, each on one core (%(default)s)")
    parser.add_argument("--work", type=Path, help="keeps what was run; commits already there are not run again")
    options = parser.parse_args(arguments)
    chosen = [run for run in RUNS if options.only is None or run.name in options.only]
    with ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="golden-")))
        work = work.resolve()
        sides = (
            stack.enter_context(checked_out(options.before, work / "before")),
            stack.enter_context(checked_out(options.after, work / "after")),
        )
        make_images(work / "images")
        pool = ThreadPoolExecutor(options.jobs)
        stack.callback(pool.shutdown, cancel_futures=True)
        left = [[pool.submit(side.leaves, run, work / "images") for side in sides] for run in chosen]
        print(f"{'run':<16} {'tensors':>11} {'rows':>11} {'figures':>11}  first difference", flush=True)
        same = True
        for run, (before, after) in zip(chosen, left, strict=True):
            compared = compare(before.result(), after.result())
            same = same and compared.same
            print(f"{run.name:<16} {compared.counts()}  {compared.first or 'none'}", flush=True)
    return 0 if same else 1


@dataclass(frozen=True)
class Found:
    """What a run left, in the newest spelling: place -> hash of a tensor, row of a file, number."""

    tensors: dict[str, str] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    failure: str = ""


@dataclass(frozen=True)
class Spelling:
    """The names of a checkout that has some of ``RENAMED`` and lacks others."""

    has: tuple[Renamed, ...] = ()
    lacks: tuple[Renamed, ...] = RENAMED

    @classmethod
    def of(cls, checkout: Path, renamed: Sequence[Renamed] = RENAMED) -> Spelling:
        has = tuple(each for each in renamed if _holds(checkout, each.since))
        return cls(has, tuple(each for each in renamed if each not in has))

    def typed(self, overrides: str) -> str:
        """Overrides in the oldest spelling, as this checkout knows them."""
        return _replaced(overrides, "overrides", self.has)

    def own_file(self, name: str) -> str:
        """The name of a file in the oldest spelling, as this checkout writes it."""
        return _replaced(name, "files", self.has)

    def newest(self, kind: Kind, name: str) -> str:
        """A name that this checkout gave, as the newest would give it."""
        return _replaced(name, kind, self.lacks)

    def of_all(self, kind: Kind, name: str) -> str:
        """A name in the oldest spelling, as the newest would give it."""
        return _replaced(name, kind, (*self.has, *self.lacks))


def _holds(checkout: Path, since: str) -> bool:
    path, _, text = since.partition(": ")
    place = checkout / path
    return place.exists() and (not text or text in place.read_text())


def _replaced(text: str, kind: Kind, steps: Sequence[Renamed]) -> str:
    for step in steps:
        names: Names = getattr(step, kind)
        if names:
            words = "|".join(re.escape(old) for old in sorted(names, key=len, reverse=True))
            start = r"(?<![\w.])" if kind == "overrides" else r"(?<!\w)"
            parts = re.split(rf"{start}({words})(?!\w)", text)
            text = "".join(names[part] if place % 2 else part for place, part in enumerate(parts))
    return text


@dataclass(frozen=True)
class Side:
    """One of the two: its code, and the folder that its runs write to."""

    checkout: Path
    folder: Path
    spelling: Spelling

    def leaves(self, run: Run, images: Path) -> Found:
        """What ``run`` leaves; it is not run where it has ended before with the same commands."""
        folder = self.folder / run.name
        places = {"$OUT": str(folder / "out"), "$IMAGES": str(images)}
        commands = [_placed(self.spelling.typed(command), places) for command in run.commands]
        done = folder / "done.json"
        if not (done.is_file() and json.loads(done.read_text()) == commands):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for number, command in enumerate(commands):
                if not self._ends_well(command, folder, folder / f"{number}.log"):
                    return Found(failure=f"{folder.parent.name}: {_last_line(folder / f'{number}.log')}")
            done.write_text(json.dumps(commands))
        return collect(folder / "out", self.spelling)

    def _ends_well(self, overrides: str, folder: Path, log: Path) -> bool:
        output = f"{self.spelling.typed('output')}={folder / 'out'}"
        command = [sys.executable, "-m", "qtrain", *overrides.split(), output]
        with log.open("w") as out:
            process = subprocess.Popen(
                command, cwd=folder, env=environment(self.checkout, folder), stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip
            try:
                return process.wait(TIMEOUT_S) == 0
            except subprocess.TimeoutExpired:
                out.write(f"\nnot ended after {TIMEOUT_S} s\n")
                return False
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)


def _placed(command: str, places: Names) -> str:
    for name, place in places.items():
        command = command.replace(name, place)
    return " ".join(command.split())


def _last_line(log: Path) -> str:
    lines = log.read_text().strip().splitlines()
    return lines[-1] if lines else "no output"


def environment(checkout: Path, folder: Path) -> dict[str, str]:
    """Variables of a run that imports ``checkout`` and keeps its cache in ``folder``."""
    return {
        **os.environ, "PYTHONPATH": str(checkout), "QTRAIN_CACHE": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip


@contextmanager
def checked_out(name: str, folder: Path) -> Iterator[Side]:
    """The commit ``name`` in a worktree of its own, which is removed at the end; or the folder ``name`` as it is."""
    if (Path(name) / "qtrain" / "__init__.py").is_file():
        checkout = Path(name).resolve()
        side = Side(checkout, folder, Spelling.of(checkout))
        shutil.rmtree(folder, ignore_errors=True)  # its files may have changed since
        _check_import(side)
        yield side
        return
    commit = _git("rev-parse", "--verify", f"{name}^{{commit}}")
    with tempfile.TemporaryDirectory(prefix="golden-") as temporary:
        checkout = Path(temporary).resolve() / commit[:12]
        _git("worktree", "add", "--detach", str(checkout), commit)
        try:
            side = Side(checkout, folder.with_name(f"{folder.name}-{commit[:12]}"), Spelling.of(checkout))
            _check_import(side)
            yield side
        finally:
            _git("worktree", "remove", "--force", str(checkout))


def _git(*words: str) -> str:
    command = ["git", "-C", str(Path(__file__).resolve().parent), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"golden: {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


def _check_import(side: Side) -> None:
    """An installed copy must not win over the checkout."""
    command = [sys.executable, "-c", "import qtrain; print(qtrain.__file__)"]
    side.folder.mkdir(parents=True, exist_ok=True)
    found = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, cwd=side.folder,
        env=environment(side.checkout, side.folder),
    ).stdout.strip()  # fmt: skip
    if not Path(found).is_relative_to(side.checkout):
        raise SystemExit(f"golden: {side.checkout} is not what Python imports, but {found}")


def make_images(root: Path) -> None:
    """A folder of pictures of digits, unless it is there."""
    if root.is_dir():
        return
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    partial = root.with_name(f"{root.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for number, (pixels, target) in enumerate(zip(digits.images[:400], digits.target, strict=False)):
        folder = partial / ("val" if number % 4 == 0 else "train") / str(target)
        folder.mkdir(parents=True, exist_ok=True)
        gray = Image.fromarray((pixels * (255 / 16)).astype("uint8"))
        gray.resize((24, 24)).convert("RGB").save(folder / f"{number:04d}.png")
    partial.rename(root)


def collect(folder: Path, spelling: Spelling) -> Found:
    """All that is compared below ``folder``."""
    found = Found()
    wanted = {spelling.of_all("files", name): name for name in (STUDENT, METRICS, SUMMARY, TRIALS)}
    trials = _trial_folders(folder, spelling)
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        place = spelling.newest("files", "/".join(trials.get(part, part) for part in relative.parts))
        kind = wanted.get(place.rpartition("/")[2]) if path.is_file() else None
        if kind == STUDENT and path.name == spelling.own_file(STUDENT):
            for name, value in tensor_hashes(path).items():
                found.tensors[f"{place}: {spelling.newest('tensors', name)}"] = value
        elif kind == METRICS:
            for number, row in enumerate(_json_lines(path), start=1):
                found.rows[f"{place}:{number}"] = _without_clock(row, spelling)
        elif kind in (SUMMARY, TRIALS):
            for number, plain in enumerate([json.loads(path.read_text())] if kind == SUMMARY else _json_lines(path)):
                for name, value in _without_clock(dict(_numbers(plain)), spelling).items():
                    found.figures[f"{place}: {number}.{name}" if kind == TRIALS else f"{place}: {name}"] = value
    return found


def _trial_folders(folder: Path, spelling: Spelling) -> dict[str, str]:
    """Name of a trial's folder, which is a hash of its config -> its number in the sweep."""
    names: dict[str, str] = {}
    key, number = spelling.of_all("metrics", "key"), spelling.of_all("metrics", "id")
    for path in folder.rglob(spelling.own_file(TRIALS)):
        for row in _json_lines(path):
            named = {spelling.newest("metrics", name): value for name, value in row.items()}
            names.setdefault(str(named.get(key)), str(named.get(number)))
    return names


def _without_clock(row: Mapping[str, Any], spelling: Spelling) -> dict[str, Any]:
    clock = {spelling.of_all("metrics", name) for name in (*CLOCK, *ADDED)}
    named = {spelling.newest("metrics", name): value for name, value in row.items()}
    return {name: value for name, value in named.items() if name.rpartition(".")[2] not in clock}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def _numbers(plain: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """All numbers, booleans and nulls in nested JSON, by their place."""
    items = plain.items() if isinstance(plain, dict) else enumerate(plain) if isinstance(plain, list) else None
    if items is not None:
        for key, value in items:
            yield from _numbers(value, f"{place}.{key}" if place else str(key))
    elif not isinstance(plain, str):
        yield place, plain


def tensor_hashes(path: Path) -> dict[str, str]:
    """Name -> sha256 of type, shape and bytes of each tensor in a file of safetensors, or of torch."""
    content = path.read_bytes()
    if path.suffix == ".ckpt":
        state = torch.load(path, weights_only=True)
        content = save_tensors({name: tensor.clone().contiguous() for name, tensor in state.items()})
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    hashes = {}
    for name, tensor in header.items():
        if name != "__metadata__":
            low, high = tensor["data_offsets"]
            head = f"{tensor['dtype']} {tensor['shape']} ".encode()
            hashes[name] = hashlib.sha256(head + content[start + low : start + high]).hexdigest()
    return hashes


@dataclass(frozen=True)
class Compared:
    """How many of how many are equal, and the first that is not."""

    equal: tuple[int, int, int]
    total: tuple[int, int, int]
    first: str

    @property
    def same(self) -> bool:
        return not self.first

    def counts(self) -> str:
        return " ".join(f"{f'{equal}/{total}':>11}" for equal, total in zip(self.equal, self.total, strict=True))


def compare(before: Found, after: Found) -> Compared:
    failure = "; ".join(found.failure for found in (before, after) if found.failure)
    if failure:
        return Compared((0, 0, 0), (0, 0, 0), f"failed: {failure}")
    pairs: list[tuple[Mapping[str, Any], Mapping[str, Any]]]
    pairs = [(before.tensors, after.tensors), (before.rows, after.rows), (before.figures, after.figures)]
    differing = [_differing(*pair) for pair in pairs]
    total = [len({**one, **other}) for one, other in pairs]
    equal = [whole - len(places) for whole, places in zip(total, differing, strict=True)]
    first = "" if before.tensors and before.rows else "nothing to compare: there is no student, or there are no rows"
    for place in (1, 2, 0):  # rows say most: they come in the order of training
        if differing[place]:
            first = _told(*pairs[place], differing[place][0])
            break
    return Compared((equal[0], equal[1], equal[2]), (total[0], total[1], total[2]), first)


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Places of what differs or is on one side only, in the order of ``before``."""
    places = [place for place in before if place not in after or before[place] != after[place]]
    return places + [place for place in after if place not in before]


def _told(before: Mapping[str, Any], after: Mapping[str, Any], place: str) -> str:
    if place not in before or place not in after:
        return f"{place}: only {'before' if place in before else 'after'}"
    one, other = before[place], after[place]
    if isinstance(one, dict) and isinstance(other, dict):
        name = _differing(one, other)[0]
        return f"{place}: {_told(one, other, name)}"
    return f"{place}: {one!s:.20} before, {other!s:.20} after"


if __name__ == "__main__":
    sys.exit(main())
