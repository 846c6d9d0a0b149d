"""Predictions as lines: CSV or JSON, to a file or to standard output."""

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from qtrain.utils.atomic_write import growing_file
from qtrain.utils.errors import ConfigError

CSV, JSON_LINES = ".csv", ".jsonl"

DIGITS = 6
"""Significant digits of a probability."""


class Prediction(NamedTuple):
    """The likeliest classes of the image at ``path`` with their probabilities, the likeliest first."""

    path: str
    top: tuple[tuple[str | int, float], ...]


def checked_output(name: str | None, *, overwrite: bool) -> Path | None:
    """The path of ``predict.output``, or ``None`` for standard output.

    Raises ``ConfigError`` for another suffix than those of CSV and JSON lines, for a folder that cannot be written to,
    and for a file that is there unless ``overwrite``.
    """
    if name is None:
        return None
    path = Path(name).expanduser()
    if path.suffix.lower() not in (CSV, JSON_LINES):
        raise ConfigError(f"predict.output: must end in {CSV} or {JSON_LINES}, got {name}")
    if path.exists() and not overwrite:
        raise ConfigError(f"predict.output: {path} is there already; give another name, or add overwrite=true")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(path.parent, os.W_OK)
    except OSError:
        writable = False
    if not writable or path.is_dir():
        raise ConfigError(f"predict.output: cannot write {path}; give a file in a folder that you may write to")
    return path


def is_terminal() -> bool:
    """Whether what is written to standard output is seen at once."""
    return sys.stdout.isatty()


@contextmanager
def writing(path: Path | None, *, top_k: int) -> Iterator[Callable[[Prediction], None]]:
    """What writes one prediction, of ``top_k`` classes, as a line of ``path``, or of standard output as CSV.

    Each line is out when it is written. The file has its name when the block ends well, and until then that of
    :func:`qtrain.utils.atomic_write.partial_of`.
    """
    with _standard_output() if path is None else growing_file(path) as file:
        if path is not None and path.suffix.lower() == JSON_LINES:
            yield lambda prediction: _write(file, f"{as_json(prediction)}\n")
            return
        rows = csv.writer(file, lineterminator="\n")
        columns = [f"{what}_{place}" for place in range(1, top_k + 1) for what in ("class", "probability")]
        rows.writerow(["path", *columns])

        def write(prediction: Prediction) -> None:
            rows.writerow(
                [prediction.path, *(cell for name, value in prediction.top for cell in (name, _short(value)))]
            )
            file.flush()

        yield write


def as_json(prediction: Prediction) -> str:
    """``{"path": ..., "top": [{"class": ..., "probability": ...}, ...]}``; a class without a name is a number."""
    top = [{"class": name, "probability": _short(value)} for name, value in prediction.top]
    return json.dumps({"path": prediction.path, "top": top})


def _short(probability: float) -> float:
    return float(f"{probability:.{DIGITS}g}")


def _write(file: IO[str], line: str) -> None:
    file.write(line)


@contextmanager
def _standard_output() -> Iterator[IO[str]]:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a file's name is what bytes it has, valid UTF-8 or not
    try:
        yield sys.stdout
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, ``head`` for one, has enough; Python would complain when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
