"""One rule for options that are numbers, and one wording of what is wrong with them."""

import math


def check_range(owner: str, interval: str, /, *, hint: str = "", **options: float | None) -> None:
    """Raise ``ValueError`` for an option outside of ``interval``, such as ``[0, 1)`` or ``[1, inf)``; ``None`` passes.

    ``owner`` begins the message, ``hint`` ends it.

    >>> check_range("Hard", "[0, 1)", label_smoothing=1.0)
    Traceback (most recent call last):
    ValueError: Hard: label_smoothing must be in [0, 1), got 1.0
    """
    low, high = map(float, interval[1:-1].split(","))
    for name, value in options.items():
        if value is None:
            continue
        enough = value >= low if interval[0] == "[" else value > low
        little = math.isinf(high) or (value <= high if interval[-1] == "]" else value < high)
        if not (enough and little):
            bound = f"at least {low:g}" if interval[0] == "[" else f"above {low:g}"
            rule = bound if math.isinf(high) else f"in {interval}"
            raise ValueError(f"{owner}: {name} must be {rule}, got {value}{hint and f'; {hint}'}")
