"""Tensors with several owners: found by memory, whatever module or parameter they are reached through."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qtrain.utils.sharing import completed, distinct, shared_tensors, why_shared


def test_shared_tensors_names_parameters_buffers_and_views() -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abcde"})
    model.b.weight = model.a.weight  # one parameter
    model.c.weight = nn.Parameter(model.a.weight.data[1:])  # another one over a part of its memory
    model.e.bias = model.d.bias
    model.d.register_buffer("seen", model.e.weight.data)
    model["again"] = model.a  # a module with two names is one owner
    assert shared_tensors(model) == {
        "a.weight": ("b.weight", "c.weight"),
        "b.weight": ("a.weight", "c.weight"),
        "c.weight": ("a.weight", "b.weight"),
        "d.bias": ("e.bias",),
        "e.bias": ("d.bias",),
        "d.seen": ("e.weight",),
        "e.weight": ("d.seen",),
    }


def test_parts_of_one_memory_that_do_not_overlap_are_not_shared() -> None:
    flat = torch.randn(24)
    model = nn.ModuleDict({name: nn.Linear(3, 4, bias=False) for name in "ab"})
    model.a.weight = nn.Parameter(flat[:12].view(4, 3))
    model.b.weight = nn.Parameter(flat[12:].view(4, 3))
    assert shared_tensors(model) == {}
    assert list(distinct(model.state_dict())) == ["a.weight", "b.weight"]


def test_parts_at_both_ends_of_a_memory_are_shared_with_the_whole() -> None:
    """Sorted by where they begin, the part in the middle ends before the whole does."""
    flat = torch.randn(24)
    model = nn.ParameterDict({"whole": flat, "middle": flat[4:8], "end": flat[20:]})
    assert shared_tensors(model) == {"whole": ("middle", "end"), "middle": ("whole", "end"), "end": ("whole", "middle")}


def test_tensors_without_memory_are_not_shared() -> None:
    model = nn.ModuleDict({name: nn.Linear(3, 4, device="meta") for name in "ab"})
    model["empty"], model["none"] = (nn.Linear(0, 4, bias=False) for _ in range(2))
    assert shared_tensors(model) == {}
    assert len(distinct(model.state_dict(keep_vars=True))) == 6


def test_why_shared_names_the_first_shared_part() -> None:
    shared = {"a.bias": ("b.bias",), "b.bias": ("a.bias",)}
    assert why_shared(shared, "a", "weight", "bias") == "its bias is also b.bias, which would change with it"
    assert why_shared(shared, "a", "weight") is None


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_completed_restores_what_distinct_took_out(which: list[int]) -> None:
    tensors = [torch.randn(2) for _ in range(4)]
    own = {f"layer{place}": tensors[number] for place, number in enumerate(which)}
    once = distinct(own)
    assert len(once) == len(set(which))
    again = completed(once, own)
    assert again.keys() == own.keys()
    assert all(again[name] is own[name] for name in own)


def test_completed_keeps_what_a_file_says_and_adds_nothing_else() -> None:
    shared, single = torch.zeros(2), torch.zeros(2)
    own = {"a": shared, "b": shared, "c": single}
    told = {"a": torch.ones(2), "b": torch.full((2,), 2.0), "foreign": torch.ones(1)}
    assert completed(told, own) == told
