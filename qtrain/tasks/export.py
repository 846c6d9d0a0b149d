"""The task that makes of a student a folder that runs elsewhere, and proves that it computes what was trained."""

from qtrain.deployment.parity.verdict import Verdict
from qtrain.pipeline.export_folder import PROGRAM, Shipped
from qtrain.pipeline.export_run import PICTURES, shipped, write_export
from qtrain.pipeline.student_file import student_at
from qtrain.settings.run_settings import RunSettings
from qtrain.tasks.evaluate import of_its_run
from qtrain.utils.errors import IncompleteError


def run(settings: RunSettings) -> dict[str, float]:
    """Export the student of ``settings.checkpoint`` and compare it; returns the number of layers that ``differ``.

    Raises ``IncompleteError``, and so ends with exit code 1, where the export does not compute what was trained.
    """
    settings = settings if settings.checkpoint is None else of_its_run(settings, student_at(settings.checkpoint))
    what = shipped(settings)
    result = judged(write_export(settings, what), what)
    for picture in sorted((what.folder / PICTURES).glob("*.png"))[:1]:
        print(f"predict a picture: python {what.folder / PROGRAM} {picture}")
    return result


def judged(verdict: Verdict, what: Shipped) -> dict[str, float]:
    """Print one line for each comparison; raises ``IncompleteError`` where one breaks its bound."""
    print(verdict)
    if not verdict.passed:
        raise IncompleteError(f"{what.folder}: the export does not compute what was trained; see verify.json there")
    print(f"{what.folder}: verified on {verdict.images} images")
    return {"differ": sum(bool(one.differing) for tier in verdict.tiers for one in tier.layers.values())}
