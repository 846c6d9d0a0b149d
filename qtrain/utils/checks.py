"""One rule for options that are numbers, one for folders, and one wording of what is wrong with them."""

import contextlib
import math
import uuid
from pathlib import Path

from qtrain.utils.errors import ConfigError


def check_range(owner: str, interval: str, /, *, hint: str = "", **options: float | None) -> None:
    """Raise ``ValueError`` for an option outside of ``interval``, such as ``[0, 1)`` or ``[1, inf)``; ``None`` passes.

    ``owner`` begins the message, ``hint`` ends it.

    >>> check_range("Hard", "[0, 1)", label_smoothing=1.0)
    Traceback (most recent call last):
    ValueError: Hard: label_smoothing must be in [0, 1), got 1.0
    """
    for name, value in options.items():
        if value is not None and (rule := broken_rule(interval, value)):
            raise ValueError(f"{owner}: {name} must be {rule}, got {value}{hint and f'; {hint}'}")


def broken_rule(interval: str, value: float) -> str:
    """The rule that ``value`` breaks, ``at least 1`` for instance; empty where it lies in ``interval``.

    >>> broken_rule("[1, inf)", 0), broken_rule("(0, 1]", 2.0), broken_rule("[0, inf)", math.nan)
    ('at least 1', 'in (0, 1]', 'at least 0')
    """
    low, high = map(float, interval[1:-1].split(","))
    enough = value >= low if interval[0] == "[" else value > low
    little = math.isinf(high) or (value <= high if interval[-1] == "]" else value < high)
    if enough and little:
        return ""
    bound = f"at least {low:g}" if interval[0] == "[" else f"above {low:g}"
    return bound if math.isinf(high) else f"in {interval}"


def finite_number(value: object) -> float:
    """``value`` as it stands in a file that somebody may have written. Raises ``ValueError`` for no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"must be a finite number, got {value!r}")
    return float(value)


def check_writable(folder: Path, key: str) -> None:
    """Raise ``ConfigError`` for the config's ``key`` where nothing can be written in ``folder``, which is made."""
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(1024**2))
    except OSError as error:
        raise ConfigError(f"{key}: cannot write to {folder} ({error.strerror or error}); give another path") from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
