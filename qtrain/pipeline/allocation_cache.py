"""What searches over bits have found before, on disk under a key of all that it depends on.

The key has the weights and the images in it, so that no file name has to be trusted. One process makes a file and all
others read it: ranks of a job, which must agree, and jobs that start together.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from qtrain.pipeline.load_data import recipe_of
from qtrain.pipeline.run_lock import only_run_in
from qtrain.settings.run_identity import hash_of
from qtrain.settings.run_settings import RunSettings
from qtrain.spec import Batch, Choice, Scores
from qtrain.training.ranks import first_rank_first
from qtrain.utils.atomic_write import atomic_write
from qtrain.utils.checks import check_writable, finite_number
from qtrain.utils.digest import file_digest
from qtrain.utils.errors import ConfigError, first_line

log = logging.getLogger(__name__)

T = TypeVar("T")

DAMAGED_FILE_ERRORS = (ValueError, KeyError, IndexError, TypeError, AttributeError)
"""What may be raised by reading a file that is damaged, or that somebody else has written."""

PATH_MAX = 4096
"""A longer text cannot be the name of a file, and some systems refuse to look."""


def kept_file(
    settings: RunSettings, model: nn.Module, batches: Sequence[Batch], *, kind: str, **further: object
) -> Path:
    """Where what a search has found is kept: under a key of the weights, the images, the recipe and ``further``."""
    digest = sha256()
    tensors = [*model.state_dict().values(), *(part for batch in batches for part in batch[:2])]
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    allocate = {key: value for key, value in settings.plain["allocate"].items() if key not in ("folder", "score")}
    what = {
        "tensors": digest.hexdigest(),
        "names": list(model.state_dict()),
        "recipe": recipe_of(settings),
        "target": None if settings.target is None else settings.target.plain,
        "seed": settings.seed,
        **({"allocate": {**allocate, "score": settings.allocate.score.plain}} if kind == "allocation" else {}),
        **({"widths": [allocate["weight"], allocate["input"], allocate["pinned"]]} if kind == "scores" else {}),
        **further,
    }
    if files := _contents(settings.plain["allocate"] if kind == "allocation" else settings.allocate.score.plain):
        what["files"] = files
    return Path(settings.allocate.folder).expanduser() / hash_of(what, ignore=()) / f"{kind}.json"


def _contents(node: Any) -> list[str]:
    """Digests of the files that ``node`` names, a score's bits or measured latencies: a name says nothing of them."""
    if isinstance(node, Mapping):
        return [digest for key in sorted(node) if key != "folder" for digest in _contents(node[key])]
    if isinstance(node, list):
        return [digest for item in node for digest in _contents(item)]
    named = isinstance(node, str) and 0 < len(node) < PATH_MAX and Path(node).expanduser().is_file()
    return [file_digest(Path(node).expanduser())] if named else []


def cached_json(file: Path, make: Callable[[], Any], read: Callable[[Any], T]) -> T:
    """What ``make`` returned when it was asked first, plain data that ``read`` understands.

    One process makes it and all others read it. Raises ``ConfigError`` for a file that ``read`` does not understand.
    """
    first_rank_first(file.is_file, what=f"{file.stem} in {file.parent}")
    if not file.is_file():
        check_writable(file.parent, "allocate.folder")
        with only_run_in(file.parent, wait_until=file.is_file):
            if not file.is_file():
                made = make()
                with atomic_write(file) as path:
                    path.write_text(json.dumps(made), encoding="utf-8")
    else:
        log.info("%s: found %s", file.stem, file)
    try:
        return read(json.loads(file.read_text(encoding="utf-8")))
    except DAMAGED_FILE_ERRORS as error:
        raise ConfigError(
            f"allocate.folder: {file} is damaged ({first_line(error)}); remove it, and what was in it is found anew"
        ) from error


def plain_scores(scores: Scores) -> dict[str, Any]:
    """``scores`` as JSON has them."""
    pairs = [[*left, *right, value] for (left, right), value in scores.pairs.items()]
    return {"weight": scores.weight, "input": scores.input, "pairs": pairs}


def scores_of(plain: Mapping[str, Any]) -> Scores:
    """The inverse of :func:`plain_scores`, as it comes from a file.

    Raises one of :data:`DAMAGED_FILE_ERRORS` for anything else, and for a score that is no finite number.
    """
    weight, input = (
        {layer: {int(bits): finite_number(value) for bits, value in of.items()} for layer, of in plain[role].items()}
        for role in ("weight", "input")
    )
    pairs = {(Choice(*entry[:3]), Choice(*entry[3:6])): finite_number(entry[6]) for entry in plain["pairs"]}
    return Scores(weight, input, pairs)
