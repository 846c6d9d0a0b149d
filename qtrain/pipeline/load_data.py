"""The data of a run, real or synthetic."""

import copy

from qtrain.data.base import VisionData
from qtrain.data.synthetic import SyntheticImages
from qtrain.pipeline.run_cache import cached
from qtrain.pipeline.synthetic_images import synthesize_images
from qtrain.settings.run_settings import RunSettings
from qtrain.utils.errors import as_config_error


def load_data(settings: RunSettings, *, test_only: bool = False, synthesizes: bool = True) -> VisionData:
    """The config's data module, read and split, with the run's seed; with ``test_only`` no training image is opened.

    Synthetic images that it does not name are made first, by the config's own model, and kept. Where they do not
    matter, without ``synthesizes``, they are neither made nor opened.
    """
    how = {"test_only": test_only, "synthesizes": synthesizes}
    # A shallow copy has a trainer and a first epoch of its own, and the images of the one that is kept.
    return cached("data", {**depends_on(settings), **how}, lambda: _load(settings, **how), copy.copy)


def depends_on(settings: RunSettings) -> dict[str, object]:
    """All that the run's images are a function of, as plain data."""
    sections = ("data", "synthesis", "synthesize", "model", "full_precision")
    return {"seed": settings.seed, **{name: own for name in sections if (own := settings.plain.get(name))}}


def recipe_of(settings: RunSettings) -> dict[str, object]:
    """The section ``quantize`` without the bits, as plain data: what is the same for students of any bits."""
    return {key: value for key, value in settings.plain["quantize"].items() if key != "bits"}


def _load(settings: RunSettings, *, test_only: bool, synthesizes: bool) -> VisionData:
    data: VisionData = settings.data.build(seed=settings.seed)
    if test_only or (isinstance(data, SyntheticImages) and not synthesizes):
        data.test_only()
    elif isinstance(data, SyntheticImages) and data.folder is None:
        data.folder = str(synthesize_images(settings).folder)
    with as_config_error("data"):
        data.setup()
    return data
