"""Files as training programs leave them: which of several weights are taken, and what stands beside them."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qtrain.models.factory import create_model
from qtrain.models.normalization import Normalization, stated_normalization
from qtrain.models.weight_file import metadata_of, read_weight_file
from qtrain.models.weights import load_weights

IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def linear(value: float) -> dict[str, Tensor]:
    return {"weight": torch.full((3, 2), value), "bias": torch.full((3,), value)}


def value_of(path: Path, state: str | None = None) -> float:
    model = nn.Linear(2, 3)
    load_weights(model, path, state=state)
    values = {float(value) for value in model.state_dict()["weight"].flatten()}
    assert len(values) == 1
    return values.pop()


def saved(folder: Path, content: dict[str, Any], name: str = "w.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(3, 2), "step": torch.tensor(5.0)}}, "param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize(
    "content",
    [
        linear(1.0),
        {"state_dict": linear(1.0), "best_acc1": torch.tensor(91.0)},
        {"net": linear(1.0), "acc": 91.0, "epoch": 199},
        {"model_state_dict": linear(1.0), "optimizer_state_dict": OPTIMIZER},
        {"state_dict_ema": linear(1.0)},
        {"ema": {"module": linear(1.0), "updates": 17}},
        {"model": {"state_dict": prefixed(linear(1.0), "module.")}},
        {"my_own_name": linear(1.0), "epoch": 3},
        {"state_dict": linear(1.0), "state_dict_ema": linear(2.0)},
        {"ema": {"module": linear(2.0)}, "model": linear(1.0), "optimizer": OPTIMIZER},
        {"swa": linear(2.0), "anything": linear(1.0)},
        {"state_dict": linear(1.0), "callbacks": {"Averaging": {"weights": linear(2.0)}}, "loops": {"x": linear(3.0)}},
    ],
    ids=lambda content: "-".join(content),
)
def test_plain_weights_are_found_among_what_programs_save(tmp_path: Path, content: dict[str, Any]) -> None:
    assert value_of(saved(tmp_path, content)) == 1.0


@pytest.mark.parametrize(
    ("content", "state"),
    [
        ({"state_dict": linear(1.0), "state_dict_ema": linear(2.0)}, "ema"),
        ({"state_dict": linear(1.0), "state_dict_ema": linear(2.0)}, "state_dict_ema"),
        ({"model": linear(1.0), "ema": {"module": linear(2.0)}}, "ema"),
        ({"model": linear(1.0), "ema": {"module": linear(2.0)}}, "ema.module"),
        ({"generator": linear(2.0), "discriminator": linear(1.0)}, "generator"),
        ({"state_dict": prefixed(linear(1.0), "model.") | prefixed(linear(2.0), "model_ema.")}, "model_ema"),
    ],
)
def test_state_names_which_weights_to_take(tmp_path: Path, content: dict[str, Any], state: str) -> None:
    assert value_of(saved(tmp_path, content), state) == 2.0


def test_choice_among_several_weights_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved(tmp_path, {"state_dict": linear(1.0), "state_dict_ema": linear(2.0)})
    with caplog.at_level(logging.INFO):
        value_of(path)
        assert "taking state_dict of w.pth, which also holds state_dict_ema; model.state=state_dict_ema" in caplog.text
        caplog.clear()
        value_of(path, "ema")
        value_of(saved(tmp_path, {"net": linear(1.0), "optimizer": OPTIMIZER}))
        assert "also holds" not in caplog.text


@pytest.mark.parametrize(
    ("content", "state", "message"),
    [
        (
            {"epoch": 1, "arch": "resnet20"},
            None,
            r"holds no named tensors \(keys at the top: epoch, arch\); .*state=KEY",
        ),
        (
            {"generator": linear(1.0), "critic": linear(1.0)},
            None,
            r"several weights: generator, critic; choose by state=",
        ),
        ({"net": linear(1.0)}, "netz", r"has no state 'netz'; did you mean 'net'\? \(it has net\)"),
        (linear(1.0), "ema", r"has no state 'ema' \(it has one set of weights alone; leave state null\)"),
        ({"a": {"ema": linear(1.0)}, "b": {"ema": linear(1.0)}}, "ema", r"state=ema fits several in .*: a.ema, b.ema"),
    ],
)
def test_what_a_file_lacks_is_said_with_what_it_has(
    tmp_path: Path, content: dict[str, Any], state: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_weight_file(saved(tmp_path, content), state=state)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_name_the_others(tmp_path: Path) -> None:
    path = saved(tmp_path, {"state_dict": {"conv.weight": torch.zeros(1)}, "student_ema": linear(1.0)})
    with pytest.raises(ValueError, match="state=NAME takes other weights of the file: student_ema"):
        load_weights(nn.Linear(2, 3), path)


@pytest.mark.parametrize("zipped", [True, False])
def test_options_of_a_program_beside_the_tensors_are_read_as_values(tmp_path: Path, zipped: bool) -> None:
    args = argparse.Namespace(lr=0.1, mean=list(IMAGENET.mean), std=list(IMAGENET.std), inner=argparse.Namespace(a=1))
    path = tmp_path / "checkpoint.pth.tar"
    content = {"state_dict": linear(1.0), "optimizer": OPTIMIZER, "args": args, "epoch": 3}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert value_of(path) == 1.0
    assert read_weight_file(path).normalization == IMAGENET


class Foreign:
    """What a program may keep in its options and nobody admits."""


def test_nothing_but_a_namespace_is_admitted_and_that_only_while_reading(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    path = saved(tmp_path, {"state_dict": linear(1.0), "args": argparse.Namespace(data=Foreign())})
    with pytest.raises(ValueError, match=r"holds Python objects besides tensors \(\S*Foreign\)"):
        read_weight_file(path)
    assert set(torch.serialization.get_safe_globals()) == before


def test_safetensors_state_the_normalization_in_their_metadata(tmp_path: Path) -> None:
    save_file(linear(1.0), tmp_path / "w.safetensors", metadata_of(IMAGENET))
    assert read_weight_file(tmp_path / "w.safetensors").normalization == IMAGENET
    save_file(linear(1.0), tmp_path / "silent.safetensors", {"mean": "unknown"})
    assert read_weight_file(tmp_path / "silent.safetensors").normalization is None


@pytest.mark.parametrize(
    "args", [{"mean": [120.0], "std": [60.0]}, {"mean": None, "std": None}, {"mean": [0.1, 0.2], "std": [1.0]}]
)
def test_options_that_are_no_normalization_are_ignored(tmp_path: Path, args: dict[str, Any]) -> None:
    path = saved(tmp_path, {"state_dict": linear(1.0), "args": argparse.Namespace(**args)})
    assert read_weight_file(path).normalization is None


def test_parts_of_keys_are_renamed(tmp_path: Path) -> None:
    target = create_model(name="cifar_resnet8", num_classes=10, shortcut="B")
    foreign = {key.replace("shortcut", "downsample"): value for key, value in target.state_dict().items()}
    path = saved(tmp_path, prefixed(foreign, "module."))
    with pytest.raises(ValueError, match=r"missing: .*shortcut.*keys=\{OLD: NEW\} renames parts of the file's keys"):
        load_weights(target, path)
    model = create_model(
        name="cifar_resnet8", num_classes=10, shortcut="B", weights=str(path), keys={"downsample": "shortcut"}
    )
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in target.state_dict().items())


def test_renaming_that_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, linear(1.0))
    with pytest.raises(ValueError, match=r"keys: no key of .* contains 'wait'; did you mean 'weight'\?"):
        load_weights(nn.Linear(2, 3), path, keys={"wait": "x"})
    with pytest.raises(ValueError, match=r"with 'bias' in place of 'weight', 1 keys of .* become the same as others"):
        load_weights(nn.Linear(2, 3), path, keys={"weight": "bias"})
    with pytest.raises(ValueError, match="state and keys say how to read a file of weights; give one"):
        create_model(name="cifar_resnet8", num_classes=10, state="ema")


def test_a_models_normalization_is_the_options_or_the_files_or_timms(tmp_path: Path) -> None:
    own, file = Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), Normalization((0.5,) * 3, (0.25,) * 3)
    state = create_model(name="cifar_resnet8", num_classes=10).state_dict()
    save_file(state, tmp_path / "w.safetensors", metadata_of(file))
    save_file(state, tmp_path / "silent.safetensors")

    def stated(name: str, **options: Any) -> Normalization | None:
        weights = str(tmp_path / f"{name}.safetensors")
        return stated_normalization(create_model(name="cifar_resnet8", num_classes=10, weights=weights, **options))

    assert stated("silent") == IMAGENET
    assert stated("w") == file
    assert stated("w", mean=list(own.mean), std=list(own.std)) == own
    with pytest.raises(ValueError, match="mean and std are two lists"):
        stated("w", mean=[0.5])


def test_normalizations_agree_up_to_rounding() -> None:
    assert IMAGENET.agrees(Normalization((0.485, 0.456, 0.4061), (0.229, 0.2241, 0.225)))
    assert not IMAGENET.agrees(Normalization((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)))
    assert IMAGENET.as_overrides("data") == "data.mean=[0.485,0.456,0.406] data.std=[0.229,0.224,0.225]"


@pytest.mark.parametrize("text", ["{}", "null", "x", "[1]", '{"student": 3}'])
def test_metadata_of_a_student_that_say_nothing_are_refused_by_the_files_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(linear(1.0), path, metadata={"qtrain_student": text})
    with pytest.raises(ValueError, match=r"w\.safetensors is damaged: its metadata 'qtrain_student'") as caught:
        read_weight_file(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("images", ["{}", "null", "3", '{"mean": 1, "std": null}'])
def test_metadata_without_a_normalization_are_no_error(images: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(linear(1.0), path, metadata={"qtrain_student": f'{{"student": {{"images": {images}}}}}'})
    assert read_weight_file(path).normalization is None


@pytest.mark.parametrize("key", ["optimal_state_dict", "amplifier", "argsort_net", "optimus", "configured"])
def test_a_key_that_only_begins_like_that_of_an_optimizer_holds_weights(key: str, tmp_path: Path) -> None:
    assert value_of(saved(tmp_path, {key: linear(1.0), "epoch": 3})) == 1.0


NOT_A_MODEL = (
    "optim", "optimizer", "optimizers", "optimiser", "optimizer_states", "optimizerD", "optimizer2", "optim_state",
    "amp", "amp_scaler", "scaler", "lr_scheduler", "schedulers", "callbacks", "loops", "hyper_parameters", "args",
    "cfg", "config",
)  # fmt: skip


@pytest.mark.parametrize("key", NOT_A_MODEL)
def test_what_else_a_program_saves_holds_no_weights(key: str, tmp_path: Path) -> None:
    file = read_weight_file(saved(tmp_path, {"net": linear(1.0), key: {"moments": torch.zeros(3)}}))
    assert file.others == ()
