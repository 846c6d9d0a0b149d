"""The Python lines of README, docs/api.md and docs/pieces.md run as they stand, on real images."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import qtrain

ROOT = Path(__file__).resolve().parent.parent.parent


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def shop() -> Any:
    """The module that README's lines import: a network, trained, and images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        import shop

        yield shop
        sys.modules.pop("shop", None)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readmes_lines_make_a_small_student_that_a_file_gives_again(
    shop: Any, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = (block for block in blocks("README.md") if "import qtrain" in block)
    assert len([line for line in block.splitlines() if line.strip()]) <= 12
    space: dict[str, Any] = {}
    exec(block, space)
    before, after = shop.top1(shop.model), shop.top1(space["student"])
    assert before > 92
    assert after > before - 3, f"{before:.1f} % in full precision, {after:.1f} % with 4 bits"
    assert (place / "student.safetensors").stat().st_size < 4 * sum(p.numel() for p in shop.model.parameters()) / 2
    printed = capsys.readouterr().out
    assert "features.4: weight 4 bits, input 4 bits" in printed
    assert "smaller than" in printed


def test_the_pages_lines_run(shop: Any, place: Path) -> None:
    space: dict[str, Any] = {
        "model": shop.model, "Net": shop.Net, "train_loader": shop.train_loader, "val_loader": shop.val_loader,
        "images": next(iter(shop.val_loader))[0], "torch": torch, "partial": partial, "qtrain": qtrain,
        "batches": list(shop.train_loader)[:3],
    }  # fmt: skip
    from qtrain.pieces import Affine, MinMax

    space |= {"Affine": Affine, "MinMax": MinMax}
    lines, choices, many, loop = blocks("docs/api.md")
    exec(lines, space)
    exec(choices.replace('rounding="brecq", ', ""), space)  # learning the rounding takes minutes
    exec(many, space)
    assert space["many"].bits == 4
    exec(loop, space)
    for block in blocks("docs/pieces.md"):
        exec(block, {})


def test_every_piece_of_the_page_is_there() -> None:
    from qtrain import pieces

    page = (ROOT / "docs" / "pieces.md").read_text(encoding="utf-8")
    for line in page.splitlines():
        if (row := re.match(r"\| [^|]+ \| `(\w+)\(.*` \| `([\w/.]+)` \|", line)) is not None:
            assert hasattr(pieces, row[1]), row[1]
            assert (ROOT / row[2]).is_file(), row[2]
