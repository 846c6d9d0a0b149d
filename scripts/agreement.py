"""On how many images the forms of a student predict one class: full precision, simulation, integers and both runtimes.

    python scripts/agreement.py outputs/imagenet/efficientnet_lite0/w8a8

Each argument is the folder of a run. All its test images are predicted, in one process, by the network in full
precision, the student, the integer reference of its export, and the export in ONNX Runtime and OpenVINO.
``results/agreement.csv`` gets a row for each run: the accuracy of each form, for each pair the images on which they
disagree, and the seconds of processor time that each form took. ``--forms`` leaves some out. With ``--causes`` those to
which integers or a runtime give another class than the student are compared layer by layer, and the causes printed.

Images that calibrated the student or taught it to round are also among the test images of
``scripts/efficientnet_lite0.py``; columns that begin with ``unseen_`` are of the others alone.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from qtrain.config.compose import compose
from qtrain.deployment.integer.reference import IntegerReference
from qtrain.deployment.onnx.write import IMAGES, LOGITS, export
from qtrain.deployment.parity.runtimes import RUNTIMES
from qtrain.deployment.parity.verify import verify
from qtrain.pipeline.build_model import build_model
from qtrain.pipeline.evaluate import normalized
from qtrain.pipeline.export_folder import BATCH
from qtrain.pipeline.export_run import shipped
from qtrain.pipeline.load_data import load_data
from qtrain.pipeline.pretrain import full_precision_weights
from qtrain.pipeline.results import append_row, check_results, provenance
from qtrain.pipeline.run_folder import typical_bits
from qtrain.pipeline.student_file import allocation_of, described, student_at
from qtrain.settings.run_settings import RunSettings
from qtrain.tasks.evaluate import of_its_run
from qtrain.utils.errors import ConfigError

RESULTS = Path("results/agreement.csv")
FULL_PRECISION, STUDENT, REFERENCE = "fp", "student", "reference"
FORMS = (FULL_PRECISION, STUDENT, REFERENCE, *RUNTIMES)
COMPARED = 4
"""Images that are compared layer by layer at a time: all codes of all layers are in memory."""


def columns(classes: Mapping[str, Tensor], labels: Tensor) -> dict[str, object]:
    """Of the ``classes`` (N,) that each form predicts: accuracies in percent, images on which two forms disagree."""
    row: dict[str, object] = {
        f"{name}_top1": 100 * float((found == labels).double().mean()) for name, found in classes.items()
    }
    pairs = combinations(classes.items(), 2)
    return row | {f"{one}_{other}": int((left != right).sum()) for (one, left), (other, right) in pairs}


@torch.no_grad()
def measured(settings: RunSettings, wanted: Sequence[str], *, causes: bool) -> dict[str, object]:
    """The row of the student of ``settings.checkpoint`` in the ``wanted`` forms, its own, and full precision.

    With ``causes`` those of other predictions than the student's are printed.
    """
    what = shipped(settings)
    header, student = what.header, what.student.eval()
    data = load_data(normalized(settings, header.images), synthesizes=False)
    weights = full_precision_weights(settings.model, settings, data)
    network = build_model(settings.model, data.info, weights=weights).eval()
    made = export(student, header.images.size, opset=settings.export.opset)
    reference, file = IntegerReference(made.exact), made.to_bytes()
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        FULL_PRECISION: network,
        STUDENT: student,
        REFERENCE: lambda images: reference.run({IMAGES: images})[LOGITS],
    }
    for name, runtime in RUNTIMES.items():
        run = runtime(file)
        forms[name] = lambda images, run=run: run({IMAGES: images})[LOGITS]  # type: ignore[misc]
    forms = {name: form for name, form in forms.items() if name in {FULL_PRECISION, STUDENT, *wanted}}
    taught = data.calibration_batches(settings.quantize.calibration_batches)
    seen = {image.numpy().tobytes() for batch in taught for image in batch.image.float().cpu()}
    classes: dict[str, list[Tensor]] = {name: [] for name in forms}
    seconds = dict.fromkeys(forms, 0.0)
    labels, unseen, differing = [], [], []
    for batch in data.test_dataloader():
        images = batch.image.float().cpu().contiguous()
        labels.append(batch.target.cpu())
        unseen += [image.numpy().tobytes() not in seen for image in images]
        for name, form in forms.items():
            start = time.process_time()
            classes[name].append(torch.cat([form(some).argmax(dim=1) for some in images.split(BATCH)]))
            seconds[name] += time.process_time() - start
        expected = classes[STUDENT][-1]
        others = torch.stack([found[-1] != expected for name, found in classes.items() if name != FULL_PRECISION])
        differing += list(images[others.any(dim=0)]) if causes else []
    if differing:
        some = torch.stack(differing).split(COMPARED)
        for tier in verify(student, some, header.images.size, file, runtimes=None).tiers:
            told = Counter(f"{one.cause}{'' if one.explained else ' (not explained)'}" for one in tier.disagreeing)
            for cause, number in told.most_common():
                print(f"{tier.name}: {number} images: {cause}")
    together, truth, apart = (
        {n: torch.cat(found) for n, found in classes.items()},
        torch.cat(labels),
        torch.tensor(unseen),
    )
    weight, inputs = typical_bits(allocation_of(header))
    row: dict[str, object] = {
        "experiment": header.origin.get("experiment", ""), "name": what.file.parent.name, "task": "agreement",
        "dataset": settings.data.plain["name"], **described(header), "w_bits": weight, "a_bits": inputs,
        "seed": header.origin.get("seed", ""), "target": header.origin.get("target", ""), "test_images": len(truth),
    }  # fmt: skip
    row |= columns(together, truth) | {f"{name}_cpu_s": value for name, value in seconds.items()}
    row["unseen_images"] = int(apart.sum())
    if 0 < int(apart.sum()) < len(apart):
        kept = columns({name: found[apart] for name, found in together.items()}, truth[apart])
        row |= {f"unseen_{name}": value for name, value in kept.items()}
    return row | {"top1": row[f"{STUDENT}_top1"]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="(%(default)s)")
    parser.add_argument("--causes", action="store_true", help="print why predictions are others than the student's")
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV file, a row for each run (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        check_results(options.results)
        for run in options.runs:
            settings = compose(["task=export", f"checkpoint={run}"])
            found = measured(of_its_run(settings, student_at(run)), options.forms, causes=options.causes)
            append_row(options.results, provenance() | found)
            print(run, *(f"{key}={value}" for key, value in found.items() if value != ""), flush=True)
    except (ConfigError, ValueError) as error:
        print(f"agreement: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
