"""What pages have in common: templates, and cells of tables that can be sorted."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from qtrain.pipeline.results import commit
from qtrain.report.chart import LOOK, TEMPLATES, in_utf8, library


@dataclass(frozen=True)
class Cell:
    """One cell of the sortable table: what is shown, and the number or text that it is sorted by."""

    text: str
    order: float | str


def word(value: object) -> Cell:
    """``value`` as it is, empty for ``None``."""
    text = "" if value is None else str(value)
    return Cell(text, text)


def number(value: object, show: Callable[[float], str]) -> Cell:
    """A metric, or an empty cell that sorts below all metrics where it is unknown."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return Cell("" if value is None else str(value), -math.inf)
    return Cell(show(float(value)), float(value))


def render(template: str, *, charts: Mapping[str, object], **values: object) -> str:
    """The page that ``template`` makes of ``values`` and of ``charts``, specs by name; the page holds all it needs."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    written = f"{datetime.now(UTC):%Y-%m-%d %H:%M UTC} by qtrain {commit()}"
    page = environment.get_template(template).render(
        **values, charts=charts, library=library(), config=LOOK, written=written
    )
    return in_utf8(page)
