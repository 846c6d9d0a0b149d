"""Dataclasses from what JSON holds: right values become themselves, wrong ones a line that says where."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest

from qtrain.utils.plain import from_plain


@dataclass(frozen=True)
class Inner:
    size: tuple[int, ...]
    name: str = ""


@dataclass(frozen=True)
class Outer:
    flag: bool
    share: float
    inner: Inner
    layers: dict[str, Inner | None] = field(default_factory=dict)
    metrics: dict[str, float | int | None] = field(default_factory=dict)
    anything: Any = None


OUTER = Outer(True, 0.5, Inner((1, 2), "a"), {"x": Inner(()), "y": None}, {"top1": 91.5, "n": 3}, {"free": [1, {}]})
PLAIN = json.loads(json.dumps(asdict(OUTER)))


def test_what_json_made_of_a_dataclass_becomes_it_again() -> None:
    assert from_plain(Outer, PLAIN, "it") == OUTER
    assert from_plain(Outer, {"flag": False, "share": 1, "inner": {"size": []}}, "it") == Outer(False, 1.0, Inner(()))


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"flag": 1}, "it.flag is int, not bool"),
        ({"share": "0.5"}, "it.share is str, not float"),
        ({"share": float("nan")}, "it.share is nan, not a finite number"),
        ({"share": True}, "it.share is bool, not float"),
        ({"inner": None}, "it.inner is NoneType, not the fields of Inner"),
        ({"inner": {}}, "it.inner lacks size"),
        ({"inner": {"size": [1], "more": 2, "other": 3}}, "it.inner has 'more', 'other', which is not known"),
        ({"inner": {"size": [1, True]}}, r"it.inner.size[1] is bool, not int"),
        ({"inner": {"size": "12"}}, "it.inner.size is str, not tuple[int, ...]"),
        ({"layers": {"a\nb": {"size": 1}}}, r"it.layers['a\nb'].size is int, not tuple[int, ...]"),
        ({"layers": []}, "it.layers is list, not dict[str, "),
        ({"metrics": {"top1": "high"}}, "it.metrics['top1'] is str, not float"),
    ],
)
def test_a_wrong_value_is_named_with_its_place_in_one_line(wrong: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError) as caught:
        from_plain(Outer, {**PLAIN, **wrong}, "it")
    assert str(caught.value).startswith(line)
    assert str(caught.value).isprintable()


def test_what_holds_no_fields_is_named() -> None:
    with pytest.raises(ValueError, match=r"it is list, not the fields of Outer"):
        from_plain(Outer, [PLAIN], "it")
