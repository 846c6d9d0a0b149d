"""Result rows as data: one CSV header for all, and where each number came from.

Every number in a table was written here by the run that measured it, with the commit, the configuration's hash and the
hardware; nobody types one. Several runs may append to one file at the same time.
"""

import csv
import io
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from filelock import FileLock

import qtrain
from qtrain.utils.atomic_write import write_text
from qtrain.utils.errors import one_line

HEADER = (
    "date,commit,config_hash,experiment,task,dataset,model,quantizer,w_bits,a_bits,distill,seed,epochs,top1,fp_top1,"
    "size_bytes,effective_bits,bops,step_ms,wall_s,hardware,torch,notes"
).split(",")
"""Columns of every results file, in this order; a file may have further columns after them."""


def append_row(path: Path | str, row: Mapping[str, object]) -> None:
    """Add ``row`` (column -> value) to the CSV at ``path``, which is created where absent.

    Columns that the row lacks stay empty; columns that the file lacks are added after the others, empty for the rows
    before. The file is replaced as a whole under a lock (on the hidden file ``.NAME.lock`` beside it, which stays), so
    that a crash or a second run never leaves half a row.
    Raises ``ValueError`` where the file's header does not start with :data:`HEADER`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        columns, rows = _parse(path)
        columns += [name for name in row if name not in columns]
        rows.append({name: _text(value) for name, value in row.items()})
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(path, text.getvalue())


def check_results(path: Path | str) -> None:
    """Raise ``ValueError`` where no row can be appended to the CSV at ``path``."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"results: {path} is a folder; give a CSV file")
    try:
        _parse(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f".{path.name}.lock").open("a"):
            pass
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"results: cannot write to {path} ({one_line(error)}); give another file") from error


def read_results(path: Path | str) -> list[dict[str, str]]:
    """All rows of the CSV at ``path`` as text, column -> value. Raises ``ValueError`` for a foreign header."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"results: no file {path}; a run writes it with results={path}")
    return _parse(path)[1]


def provenance(device: torch.device | str = "cpu", *, devices: int = 1) -> dict[str, str]:
    """Where and when a number was made: the columns date, commit, hardware and torch, then timm, lightning and python.

    ``device`` is what the run computed on, ``devices`` how many of them.
    """
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "hardware": hardware(device, devices=devices),
        "torch": torch.__version__,
        "timm": _version("timm"),
        "lightning": _version("pytorch-lightning"),
        "python": platform.python_version(),
    }


def commit(package: Path | None = None) -> str:
    """The checkout's commit, ``+dirty`` where its code or configuration differs; the version for an installed wheel."""
    root = (package or Path(qtrain.__file__).resolve().parent).parent
    if not (root / ".git").exists():
        return f"v{qtrain.__version__}"
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", "qtrain", "conf")
    except (OSError, subprocess.SubprocessError):
        return f"v{qtrain.__version__}"
    return f"{head}+dirty" if changed else head


def hardware(device: torch.device | str = "cpu", *, devices: int = 1) -> str:
    """The processor that computes, with the number of cores or of GPUs."""
    device = torch.device(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return name if devices == 1 else f"{name} x{devices}"
    return f"{_processor()} x{cpu_cores()} cores" if device.type == "cpu" else device.type


def cpu_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(root: Path, *arguments: str) -> str:
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10, env=environment
    )
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _parse(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows; a file that is absent or empty has the header and no rows."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if not text.strip():
        return list(HEADER), []
    reader = csv.DictReader(io.StringIO(text))
    columns = list(reader.fieldnames or [])
    if columns[: len(HEADER)] != HEADER:
        raise ValueError(
            f"results: {path} does not start with the columns {','.join(HEADER[:3])},...; "
            "give another file, or remove this one"
        )
    return columns, list(reader)
