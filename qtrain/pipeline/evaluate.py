"""Accuracy on the test images: of full-precision weights, or of a finished run's student."""

import time
from dataclasses import replace
from pathlib import Path

import torch

from qtrain.costs.count import count
from qtrain.data.base import VisionData
from qtrain.packed.header import Images
from qtrain.pipeline import run_folder
from qtrain.pipeline.build_model import build_model, example_input, has_weights
from qtrain.pipeline.load_data import load_data
from qtrain.pipeline.memory_format import settle_memory_format_
from qtrain.pipeline.prepare import Prepared
from qtrain.pipeline.results import check_results
from qtrain.pipeline.run_folder import Metrics
from qtrain.pipeline.student_file import allocation_of, check_images, described, load_trained
from qtrain.pipeline.summary import read_summary
from qtrain.settings.run_files import SUMMARY
from qtrain.settings.run_settings import RunSettings
from qtrain.training.evaluation import evaluate
from qtrain.utils.bit_text import to_text
from qtrain.utils.errors import ConfigError


def evaluate_weights(settings: RunSettings) -> Metrics:
    """``fp_top1`` in percent of the full-precision model ``settings.model``; its row goes to the run's folder.

    Raises ``ConfigError`` where the model has no trained weights.
    """
    if not has_weights(settings.model):
        raise ConfigError("model.weights: evaluate needs weights; give a file, or checkpoint=RUN_FOLDER")
    start = time.perf_counter()
    if settings.results:
        check_results(settings.results)
    # Training images are opened only where mean and std have to be computed from them.
    data = load_data(settings, test_only=bool(settings.data.get("mean")), synthesizes=False)
    model = build_model(settings.model, data.info)
    settle_memory_format_(settings, model, data)
    untrained: dict[str, object] = {"distill": "none", "epochs": 0}
    return {"fp_top1": _measured(settings, Prepared(model, {}), data, start, untrained, notes="full precision")}


def evaluate_student(settings: RunSettings, file: Path) -> Metrics:
    """``top1`` in percent of the student in ``file``, on the test images of ``settings.data``.

    What the run beside it has recorded of the training goes into the row. Raises ``ConfigError`` where the images are
    not such as the student takes.
    """
    start = time.perf_counter()
    if settings.results:
        check_results(settings.results)
    header, student = load_trained(settings, file)
    data = load_data(normalized(settings, header.images), synthesizes=False)
    check_images(header.images, data.info, file)
    settle_memory_format_(settings, student, data)
    known: dict[str, object] = {"distill": "none", "epochs": 0}
    if (file.parent / SUMMARY).is_file():
        before = read_summary(file.parent / SUMMARY)
        known = {"distill": before.distill, "epochs": before.epochs, "fp_top1": before.fp_top1}
    known |= {"file_bytes": file.stat().st_size, **described(header)}
    student_of = Prepared(student, allocation_of(header))
    return {"top1": _measured(settings, student_of, data, start, known, notes="trained student")}


def normalized(settings: RunSettings, images: Images) -> RunSettings:
    """``settings`` with the mean and std of the student's training images, whatever the data's own are."""
    if not images.mean:
        return settings
    known = {"mean": list(images.mean), "std": list(images.std)}
    data = replace(settings.data, plain={**settings.data.plain, **known}, options={**settings.data.options, **known})
    return replace(settings, data=data, plain={**settings.plain, "data": dict(data.plain)})


def _measured(
    settings: RunSettings, model: Prepared, data: VisionData, start: float, training: dict[str, object], *, notes: str
) -> float:
    """Top-1 of ``model`` on the test images, printed and written as a row with what is known of its training."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = evaluate(model.student, data.test_dataloader(), device)
    top1 = found.top1
    cost = count(model.student.cpu(), example_input(data.info))
    summary = run_folder.describe(settings, data.info, model.allocation, cost) | training
    summary |= {"top1": top1, "right": to_text(found.right)}
    summary.setdefault("fp_top1", top1)
    summary["wall_s"] = time.perf_counter() - start
    folder = Path(settings.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    run_folder.append_results(settings, folder, summary, device=device, notes=notes)
    weight, input = run_folder.typical_bits(model.allocation)
    what = f"W{weight}A{input}, {notes}" if model.allocation else "full precision"
    accuracy = f"{top1:.2f} % of {data.info.test_size} test images"
    print(f"{summary['model']}, {what}: {accuracy}, {cost.size_bytes / 1e3:.1f} kB, {cost.compression:.1f}x smaller")
    return top1
