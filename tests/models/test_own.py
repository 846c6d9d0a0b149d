"""Networks of the user's own: what is passed to a builder, and what is refused in one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qtrain.models.normalization import stated_normalization
from qtrain.models.own import arguments_for, build_own
from qtrain.utils.user_code import BuilderPath
from tests.helpers.own_package import own_package

FACTS = {"num_classes": 10, "in_channels": 1, "image_size": 8}


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with own_package(tmp_path_factory.mktemp("own"), "ownnets"):
        yield


def network(name: str, **given: object) -> nn.Module:
    return build_own(builder=BuilderPath(f"ownnets.{name}"), **{**FACTS, **given})  # type: ignore[arg-type]


def test_a_builder_gets_the_facts_that_its_signature_names_and_no_others() -> None:
    assert network("networks.Plain")(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    assert network("networks.Wide", num_classes=7, in_channels=2).fc.out_features == 7
    assert network("build", options={"width": 6}).fc.in_features == 6, "its **rest stays empty"


def test_options_win_over_facts() -> None:
    path = BuilderPath("ownnets.networks.Wide")
    assert arguments_for(path, {"num_classes": 3, "width": 2}, FACTS) == {
        "num_classes": 3,
        "in_channels": 1,
        "width": 2,
    }


def test_the_arguments_build_the_same_network_again() -> None:
    arguments = arguments_for(BuilderPath("ownnets.networks.Wide"), {"width": 5}, FACTS)
    again = build_own(builder=BuilderPath("ownnets.networks.Wide"), options=arguments)
    shapes = {name: tensor.shape for name, tensor in again.state_dict().items()}
    first = network("networks.Wide", options={"width": 5})
    assert shapes == {name: tensor.shape for name, tensor in first.state_dict().items()}


def test_weights_are_loaded_from_a_file(tmp_path: Path) -> None:
    trained = network("networks.Plain")
    save_file(trained.state_dict(), tmp_path / "plain.safetensors")
    loaded = network("networks.Plain", weights=str(tmp_path / "plain.safetensors"))
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded.eval()(images), trained.eval()(images))
    with pytest.raises(ValueError, match=r"plain\.safetensors does not fit Wide: .* unexpected"):
        network("networks.Wide", weights=str(tmp_path / "plain.safetensors"))


def test_one_of_several_weights_of_a_file_is_taken_and_its_keys_renamed(tmp_path: Path) -> None:
    trained, average = network("networks.Plain"), network("networks.Plain")
    renamed = {name.replace("fc.", "head."): tensor for name, tensor in average.state_dict().items()}
    torch.save({"state_dict": trained.state_dict(), "state_dict_ema": renamed}, tmp_path / "plain.pth")
    file = str(tmp_path / "plain.pth")
    loaded = network("networks.Plain", weights=file, state="ema", keys={"head": "fc"}, mean=[0.5], std=[0.2])
    assert torch.equal(loaded.fc.weight, average.fc.weight)
    assert stated_normalization(loaded) == ((0.5,), (0.2,))
    with pytest.raises(ValueError, match="build_own: state and keys say how to read a file of weights; give one"):
        network("networks.Plain", state="ema")
    with pytest.raises(ValueError, match="build_own: mean and std are two lists"):
        network("networks.Plain", mean=[0.5])


REFUSED = {
    "networks.needs": r"ownnets\.networks\.needs needs depth; add to its options depth=VALUE",
    "networks.fails": r"fails\(\) failed: TypeError: .*'chanels' \(networks\.py, line \d+\); HYDRA_FULL_ERROR=1",
    "networks.nothing": r"must give a torch\.nn\.Module, got a value of type NoneType",
    "networks.no_parameters": r"Flatten has no parameters",
    "networks.five_classes": r"must give logits \(2, 10\) for images \(2, 1, 8, 8\), got \(2, 5\); the data have 10 cl",
    "networks.Pair": r"Pair must give logits \(N, classes\), got a value of type tuple",
    "networks.Plain2": r"ownnets\.networks has no 'Plain2'; did you mean 'Plain'\? \(it is .*networks\.py\)",
    "networks.NUMBER": r"must be a class or function, got a value of type int",
    "network.Plain": r"cannot import ownnets\.network: there is no module 'ownnets\.network' in /.*PYTHONPATH=FOLDER",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_network_for_the_data_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[name]) as refusal:
        network(name)
    assert "\n" not in str(refusal.value)


def test_network_for_other_images_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Plain fails on images \(2, 3, 8, 8\): RuntimeError: .*networks\.py, line"):
        network("networks.Plain", in_channels=3)


def test_options_are_plain_values() -> None:
    with pytest.raises(ValueError, match=r"options\.width\.0 must be a plain value .* got a value of type Linear"):
        network("build", options={"width": [nn.Linear(1, 1)]})
