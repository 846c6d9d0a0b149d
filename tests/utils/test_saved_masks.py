"""A compiled forward keeps bytes for its backward where it would keep booleans, and the gradients are the same."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import min_cut_rematerialization_partition, nop
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from qtrain.utils.compat import partitioner
from qtrain.utils.compiled import compiler_options
from qtrain.utils.saved_masks import FEWEST, keep_booleans_as_bytes_


def kept(function: Callable[[Tensor], Tensor], x: Tensor, partition: Any) -> tuple[Tensor, list[torch.dtype]]:
    """The result of compiled ``function``, and the types of what its forward keeps of the size of ``x`` or larger."""
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=nop, bw_compiler=nop, partition_fn=partition)
    result = torch.compile(function, backend=backend, fullgraph=True)(x)
    saved: tuple[Tensor, ...] = result.grad_fn.saved_tensors  # type: ignore[union-attr]
    return result, [one.dtype for one in saved if one.numel() >= x.numel()]


def twice_dropped(x: Tensor) -> Tensor:
    return F.dropout(F.dropout(x, 0.5) @ torch.ones(64, 64), 0.25)


@pytest.mark.parametrize(("rows", "type"), [(FEWEST // 64, torch.uint8), (FEWEST // 64 - 1, torch.bool)])
def test_large_masks_are_kept_as_bytes(rows: int, type: torch.dtype) -> None:
    x = torch.rand(rows, 64) + 1
    _, plain = kept(twice_dropped, x.clone().requires_grad_(), min_cut_rematerialization_partition)
    assert plain.count(torch.bool) == 2, "what this is about"
    torch.manual_seed(0)
    leaf = x.clone().requires_grad_()
    result, found = kept(twice_dropped, leaf, partitioner(keep_booleans_as_bytes_))
    assert found.count(type) == 2
    assert found.count(torch.bool) == (2 if type is torch.bool else 0)
    result.sum().backward()
    first = leaf.grad != 0
    passed = (result != 0).sum(dim=1, keepdim=True) / 0.75 * 2
    torch.testing.assert_close(leaf.grad, first * passed)
    assert 0.4 < first.float().mean() < 0.6


def test_a_mask_that_is_a_result_too_stays_one() -> None:
    """The same booleans are returned, and kept as bytes."""

    def dropped(x: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.rand_like(x) < 0.5
        return torch.where(mask, x, 0.0) @ torch.ones(64, 64), mask

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=nop, bw_compiler=nop, partition_fn=partitioner(keep_booleans_as_bytes_))
    x = torch.rand(FEWEST // 64, 64, requires_grad=True)
    result, mask = torch.compile(dropped, backend=backend, fullgraph=True)(x)
    assert mask.dtype == torch.bool
    assert torch.uint8 in [one.dtype for one in result.grad_fn.saved_tensors]
    result.sum().backward()
    torch.testing.assert_close(x.grad, 64.0 * mask)


def test_what_keeps_no_mask_stays_as_it_is() -> None:
    x = torch.rand(64, 64, requires_grad=True)
    result, found = kept(lambda x: (x @ x).exp(), x, partitioner(keep_booleans_as_bytes_))
    assert torch.bool not in found and torch.uint8 not in found
    (own,) = torch.autograd.grad(result.sum(), x)
    (wanted,) = torch.autograd.grad((x @ x).exp().sum(), x)
    torch.testing.assert_close(own, wanted)


def test_the_step_is_compiled_with_it_and_found_again_on_disk() -> None:
    """The option is a part of the key of what is kept on disk, so it has to be written as bytes, the same ones."""
    option = compiler_options()["custom_partitioner_fn"]
    again = pickle.loads(pickle.dumps(option))
    assert option.uuid() == again.uuid() == partitioner(keep_booleans_as_bytes_).uuid()
    assert pickle.dumps(option) == pickle.dumps(partitioner(keep_booleans_as_bytes_))
