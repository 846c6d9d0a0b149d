"""The folder of a generator: it goes on where it stood, and is not taken for another one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from qtrain.schedules.linear import Linear
from qtrain.synthesis.generator_checkpoint import GeneratorCheckpoint


def trained(seed: int) -> tuple[nn.Module, torch.optim.Adam]:
    torch.manual_seed(seed)
    module = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return module, optimizer


def test_generator_checkpoint_restores_what_was_saved(tmp_path: Path) -> None:
    learned = GeneratorCheckpoint(folder=tmp_path / "new", identity={"lr": 0.1})
    module, optimizer = trained(0)
    other, other_optimizer = trained(1)
    assert learned.restore(other, other_optimizer) == 0
    learned.save(7, module, optimizer)
    assert learned.restore(other, other_optimizer) == 7
    assert torch.equal(other.weight, module.weight)  # type: ignore[arg-type]
    moments = [o.state_dict()["state"][0]["exp_avg"] for o in (optimizer, other_optimizer)]
    assert torch.equal(*moments)
    learned.keep(5, module)
    assert torch.equal(learned.kept(5)["bias"], module.bias)  # type: ignore[arg-type]
    assert sorted(path.name for path in learned.folder.iterdir()) == ["5.pt", "learning.pt"]


def test_checkpoint_folder_of_another_generator_is_refused(tmp_path: Path) -> None:
    module, optimizer = trained(0)
    identity = {"lr": 0.1, "schedule": Linear(start=1.0, end=0.0), "data": (10, 0.5)}
    GeneratorCheckpoint(folder=tmp_path, identity=identity).save(1, module, optimizer)
    same = {**identity, "schedule": Linear(start=1.0, end=0.0)}
    assert GeneratorCheckpoint(folder=tmp_path, identity=same).restore(module, optimizer) == 1
    changed = {**same, "lr": 0.2, "schedule": Linear(start=1.0, end=0.5)}
    with pytest.raises(ValueError, match="holds one that was learned with other lr, schedule; take another folder"):
        GeneratorCheckpoint(folder=tmp_path, identity=changed).restore(module, optimizer)


def test_missing_checkpoint_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"30\.pt is missing"):
        GeneratorCheckpoint(folder=tmp_path, identity={}).kept(30)


@pytest.mark.parametrize("content", [b"", b"PK garbage", None], ids=["empty", "garbage", "another file"])
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    module, optimizer = trained(0)
    learned = GeneratorCheckpoint(folder=tmp_path, identity={"lr": 0.1})
    learned.save(7, module, optimizer)
    learned.keep(5, module)
    for name in ("learning.pt", "5.pt"):
        if content is None:
            torch.save({"something": torch.ones(1)}, tmp_path / name)
        else:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"generator: .*learning\.pt is damaged, delete .* to learn anew"):
        learned.restore(module, optimizer)
    if content is not None:
        with pytest.raises(ValueError, match=r"generator: .*5\.pt is damaged, delete .* to learn anew"):
            learned.kept(5)
