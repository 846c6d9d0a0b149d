"""What to suggest in an error message about a word that is not known."""

import difflib
from collections.abc import Iterable

NAMES_LISTED = 8


def did_you_mean(word: str, words: Iterable[str], *, most: int = 1) -> str:
    """``"; did you mean 'x' or 'y'?"`` with the ``most`` nearest of ``words``, or ``""`` if none is near."""
    near = difflib.get_close_matches(word, list(words), n=most, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def did_you_mean_path(word: str, paths: Iterable[str], *, most: int = 3) -> str:
    """As :func:`did_you_mean`, for names such as ``cifar10/resnet20_w4a4``, whose folder may be left out or wrong."""
    known = list(paths)
    leaves: dict[str, list[str]] = {}
    for path in known:
        leaves.setdefault(path.rpartition("/")[2], []).append(path)
    near = difflib.get_close_matches(word, known, n=most, cutoff=0.6)
    for leaf in difflib.get_close_matches(word.rpartition("/")[2], leaves, n=most, cutoff=0.6):
        near += [path for path in leaves[leaf] if path not in near]
    return f"; did you mean {' or '.join(map(repr, near[:most]))}?" if near else ""


def close_matches(word: str, words: Iterable[str], *, most: int = 3) -> str:
    """As :func:`did_you_mean`; if none is near, the first :data:`NAMES_LISTED` of ``words``: ``"; there are x, y"``."""
    known = list(words)
    more = f" and {len(known) - NAMES_LISTED} more" if len(known) > NAMES_LISTED else ""
    return did_you_mean(word, known, most=most) or f"; there are {', '.join(known[:NAMES_LISTED]) or 'none'}{more}"
