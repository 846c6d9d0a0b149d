"""Weights from every format, through every wrapper, and one clear line for each way it can go wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qtrain.models.factory import create_model
from qtrain.models.weights import load_weights
from qtrain.pipeline.student_file import save_weights
from qtrain.utils.sharing import distinct


def small(classes: int = 10, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create_model(name="cifar_resnet8", num_classes=classes)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def prefixed(model: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in model.state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "student.", "student._orig_mod.module."])
@pytest.mark.parametrize("suffix", [".th", ".pth", ".pt", ".safetensors", ".ckpt"])
def test_formats_and_prefixes(tmp_path: Path, prefix: str, suffix: str) -> None:
    source, target, path = small(), small(seed=1), tmp_path / f"w{suffix}"
    state = prefixed(source, prefix)
    if suffix == ".safetensors":
        save_file(state, path)
    elif suffix == ".ckpt":
        torch.save({"state_dict": state, "epoch": 3, "hyper_parameters": {"lr": 0.1}}, path)
    else:
        torch.save({"model": state, "best": 91.0}, path, _use_new_zipfile_serialization=suffix != ".th")
    assert not same(source, target)
    load_weights(target, path)
    assert same(source, target)


def test_tensors_beside_the_student_are_ignored(tmp_path: Path) -> None:
    source, target = small(), small(seed=1)
    others = {"objective.regressor.weight": torch.zeros(3), "n_averaged": torch.tensor(5)}
    torch.save({"state_dict": prefixed(source, "student.") | others}, tmp_path / "w.ckpt")
    load_weights(target, tmp_path / "w.ckpt")
    assert same(source, target)


def test_prefix_of_the_models_own_keys_is_kept(tmp_path: Path) -> None:
    source = nn.ModuleDict({"model": nn.Linear(2, 3)})
    target = nn.ModuleDict({"model": nn.Linear(2, 3)})
    torch.save(source.state_dict(), tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert same(source, target)


def test_mismatch_lists_keys_and_changes_nothing(tmp_path: Path) -> None:
    target = small(seed=1)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    state = small().state_dict()
    del state["bn1.weight"]
    state["conv9.weight"] = torch.zeros(1)
    state["conv1.weight"] = torch.zeros(16, 1, 3, 3)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ValueError) as caught:
        load_weights(target, tmp_path / "w.pt")
    text = str(caught.value)
    assert "1 missing: bn1.weight;" in text
    assert "1 unexpected: conv9.weight;" in text
    assert "1 of another shape: conv1.weight (file (16, 1, 3, 3), model (16, 3, 3, 3))" in text
    assert "\n" not in text
    assert all(torch.equal(before[key], value) for key, value in target.state_dict().items())


def test_a_long_list_is_cut_after_eight(tmp_path: Path) -> None:
    torch.save({"linear.bias": torch.zeros(10)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"missing: (\S+, ){8}\.\.\.;"):
        load_weights(small(), tmp_path / "w.pt")


def test_other_head_needs_reset_head(tmp_path: Path) -> None:
    source, target = small(100), small(10, seed=1)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match="set reset_head=true"):
        load_weights(target, tmp_path / "w.pt")
    stale = target.linear.weight.detach().clone()
    load_weights(target, tmp_path / "w.pt", reset_head=True)
    assert torch.equal(target.conv1.weight, source.conv1.weight)
    assert target.linear.weight.shape == (10, 64)
    assert not torch.equal(target.linear.weight, stale)


def test_reset_head_keeps_a_head_that_fits(tmp_path: Path) -> None:
    source, target = small(), small(seed=1)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt", reset_head=True)
    assert same(source, target)


def test_reset_head_changes_nothing_where_the_rest_does_not_fit(tmp_path: Path) -> None:
    target = small(10, seed=1)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    torch.save(small(100).state_dict() | {"conv1.weight": torch.zeros(16, 3, 5, 5)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"1 of another shape: conv1\.weight"):
        load_weights(target, tmp_path / "w.pt", reset_head=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


class Payload:
    """Runs when unpickled by a loader that allows it."""

    def __reduce__(self) -> tuple:
        return os.mkdir, (os.environ["QTRAIN_PAYLOAD"],)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    monkeypatch.setenv("QTRAIN_PAYLOAD", str(tmp_path / "ran"))
    torch.save(
        {"state_dict": small().state_dict(), "x": Payload()}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(ValueError, match="Python objects besides tensors"):
        load_weights(small(), tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 10, 5000])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str, kept: int) -> None:
    path = tmp_path / f"w{suffix}"
    state = small().state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="load_weights: ") as caught:
        load_weights(small(), path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_suffix_and_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*absent\.pt"):
        load_weights(small(), tmp_path / "absent.pt")
    (tmp_path / "w.onnx").touch()
    with pytest.raises(ValueError, match=r"suffix must be one of .*got 'w.onnx'"):
        load_weights(small(), tmp_path / "w.onnx")
    torch.save({"epoch": 1}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="holds no named tensors"):
        load_weights(small(), tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("name", "file"), [("cifar_resnet20", "resnet20-12fca82f"), ("cifar_resnet56", "resnet56-4bfd9763")]
)
def test_public_checkpoints_fit(shared_data: Path, name: str, file: str) -> None:
    path = shared_data / "weights" / f"{file}.th"
    model = create_model(name=name, num_classes=10, weights=str(path))
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    assert all(torch.equal(model.state_dict()[key.removeprefix("module.")], value) for key, value in state.items())


@pytest.mark.parametrize("name", ["coat_lite_tiny", "memory"])
def test_shared_tensors_are_saved_once_and_load_for_all_their_owners(name: str, tmp_path: Path) -> None:
    """The library of safetensors refuses to write one memory under two names."""

    def made(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        if name == "coat_lite_tiny":
            return create_model(name=name, num_classes=4, in_channels=3, image_size=32)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = nn.Parameter(model[0].weight.data)
        return model

    source, target, path = made(0), made(1), tmp_path / "weights.safetensors"
    save_weights(source, path)
    numbers = sum(tensor.numel() for tensor in load_file(path).values())
    assert (
        numbers
        == sum(t.numel() for t in distinct(source.state_dict()).values())
        < sum(t.numel() for t in source.state_dict().values())
    )
    load_weights(target, path)
    assert same(source, target)
