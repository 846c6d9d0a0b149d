"""The task that says what images show, by a student from its file."""

from qtrain.pipeline.predict import predict
from qtrain.settings.run_settings import RunSettings
from qtrain.utils.errors import IncompleteError


def run(settings: RunSettings) -> dict[str, int]:
    """Predict ``settings.images`` by the student in ``settings.checkpoint``; returns how many were ``predicted``.

    Raises ``IncompleteError``, and so ends with exit code 1, where images were skipped since they cannot be decoded.
    """
    found = predict(settings)
    written = f"; predictions: {settings.predict.output}" if settings.predict.output else ""
    if found["skipped"]:
        total = sum(found.values())
        raise IncompleteError(f"skipped {found['skipped']} of {total} images, which cannot be decoded{written}")
    if settings.predict.output:
        print(f"{found['predicted']} images{written}")
    return found
