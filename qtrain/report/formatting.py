"""Metrics, knobs and bits of a trial in words, the same in the terminal, in pictures and on the page."""

from collections.abc import Iterable

from qtrain.report.table import size_text
from qtrain.spec import FULL_PRECISION
from qtrain.sweep.domains import KnobValue, KnobValues
from qtrain.sweep.sweep_results import grouped
from qtrain.sweep.trial import Trial

LABELS = {
    "top1": "val top-1 %",
    "best_top1": "best val top-1 %",
    "test_top1": "test top-1 %",
    "fp_top1": "full precision %",
    "size_bytes": "size",
    "bops": "GBOPs",
    "effective_bits": "bits/weight",
}
"""Metric of a trial -> what it is called where there is little room; any other is called by its own name."""

LONGEST, KNOBS_WIDTH = 28, 60
"""Characters of one knob's value, and of all knobs of a trial, in a row or line; more are cut."""


def metric_label(name: str) -> str:
    return LABELS.get(name, name)


def metric_text(name: str, value: float) -> str:
    """``value`` of the metric ``name``, with as many digits as can matter.

    >>> metric_text("top1", 91.2567), metric_text("size_bytes", 68512), metric_text("bops", 8.14e8)
    ('91.26', '68.5 kB', '0.814')
    """
    if name.endswith("top1"):
        return f"{value:.2f}"
    if name == "size_bytes":
        return size_text(value)
    if name == "bops":
        return f"{value / 1e9:.3g}"
    return f"{value:.2f}" if name == "effective_bits" else f"{value:.4g}"


def metric_said(name: str, value: float) -> str:
    """Name, value and unit, to stand in a sentence.

    >>> metric_said("top1", 91.2567), metric_said("size_bytes", 68512), metric_said("bops", 8.14e8)
    ('val top-1 91.26 %', 'size 68.5 kB', '0.814 GBOPs')
    """
    label, text = metric_label(name), metric_text(name, value)
    if label.endswith(" %"):
        return f"{label.removesuffix(' %')} {text} %"
    return f"{text} {label}" if name in ("bops", "effective_bits") else f"{label} {text}"


def knob_label(name: str, names: Iterable[str]) -> str:
    """The last part of a dotted ``name``, or all of it where another of ``names`` ends the same.

    >>> knob_label("optimizer.lr", ["optimizer.lr", "fit.epochs"]), knob_label("a.lr", ["a.lr", "b.lr"])
    ('lr', 'a.lr')
    """
    last = name.rpartition(".")[2]
    return last if [other.rpartition(".")[2] for other in names].count(last) == 1 else name


def knobs_text(knobs: KnobValues, space: Iterable[str], *, width: int | None = KNOBS_WIDTH) -> str:
    """``lr=0.001 soft=0.7``, cut at ``width`` characters; ``None``: whole, for rows that are data."""
    known, whole = grouped(knobs, space), width is None
    text = " ".join(f"{knob_label(name, known)}={knob_text(value, whole=whole)}" for name, value in known.items())
    return text if width is None or len(text) <= width else text[: width - 1] + "…"


def knob_text(value: KnobValue, *, whole: bool = False) -> str:
    """What the search chose, with fractions of four digits and cut where it is long; nothing is lost if ``whole``.

    >>> knob_text(0.00031622), knob_text(20240101), knob_text([4, 3]), knob_text(None)
    ('0.0003162', '20240101', '4 3', 'none')
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value) if whole else f"{value:.4g}"
    parts = [knob_text(part, whole=whole) for part in value] if isinstance(value, list | tuple) else [str(value)]
    text = " ".join(parts)
    return text if whole or len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def mean_bits(trial: Trial) -> tuple[float, float] | None:
    """The means of the weight bits and of the input bits of layers; ``None`` where nothing is known of them.

    Those at the ends, which read the image or give the logits, are left out: they mostly keep 8 bits, whatever the
    search does.
    """
    inner = _inner(trial)
    if not inner:
        return None
    return sum(pair[0] for pair in inner) / len(inner), sum(pair[1] for pair in inner) / len(inner)


def uniform_bits(trial: Trial) -> tuple[int, int] | None:
    """Weight and input bits where all layers but those at the ends have the same; ``None`` elsewhere."""
    inner = _inner(trial)
    if not inner or any(pair != inner[0] for pair in inner):
        return None
    return inner[0][0], inner[0][1]


def bits_text(trial: Trial) -> str:
    """``W4A4`` where layers agree, else means, ``W2.9A3.4``; without those at the ends; empty if unknown."""
    if (same := uniform_bits(trial)) is not None:
        return "full precision" if same == (FULL_PRECISION, FULL_PRECISION) else f"W{same[0]}A{same[1]}"
    means = mean_bits(trial)
    return "" if means is None else f"W{means[0]:.1f}A{means[1]:.1f}"


def _inner(trial: Trial) -> list[list[int]]:
    names = list(trial.layer_bits)
    ends = trial.ends or [*names[:1], *names[-1:]]
    return [trial.layer_bits[name] for name in names if name not in ends] or list(trial.layer_bits.values())
