"""Comparisons as numbers say what the comparisons say, by arithmetic as well."""

from __future__ import annotations

import pytest
import torch

from qtrain.functional.indicator import above, equal, sign

LEAST = torch.finfo(torch.float32).tiny
VALUES = torch.tensor([-3e38, -1.0, -LEAST, -1e-45, -0.0, 0.0, 1e-45, LEAST, 1.0, 1.0 + 2**-23, 3e38])


@pytest.fixture(params=[True, False], ids=["compiled", "eager"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_they_are_the_comparisons(dtype: torch.dtype) -> None:
    x = VALUES.to(dtype)
    rows, columns = x[:, None], x[None, :].clone()
    for found, wanted in (
        (above(rows, columns), rows > columns), (equal(rows, columns), rows == columns),
        (above(x, 0.0), x > 0), (equal(x, 0.0), x == 0),
    ):  # fmt: skip
        assert found.dtype == dtype
        assert torch.equal(found, wanted.to(dtype))
    assert torch.equal(sign(x), torch.where(x >= 0, 1.0, -1.0))


def test_they_have_no_gradient() -> None:
    x = VALUES.clone().requires_grad_()
    assert not any(result.requires_grad for result in (above(x, 0.0), above(x, x), equal(x, x), sign(x)))
