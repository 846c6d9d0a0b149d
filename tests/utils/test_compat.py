"""The private parts of libraries that qtrain uses: each is where ``qtrain/utils/compat.py`` expects it."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock, create_autospec

import pytest
import pytorch_lightning as pl
import torch
from functorch.compile import nop
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from qtrain.utils import compat

PACKAGE = Path(compat.__file__).resolve().parents[1]

BASE_CLASSES = {
    "torch": ("_int_mm",),
    "torch.nn.modules.conv": ("_ConvNd", "_ConvTransposeNd"),
    "torch.nn.modules.batchnorm": ("_BatchNorm",),
    "torch.nn.modules.dropout": ("_DropoutNd",),
    "torch.nn.modules.instancenorm": ("_InstanceNorm",),
    "torch.nn.modules.padding": ("_ReflectionPadNd", "_ReplicationPadNd"),
    "torch.nn.modules.pooling": ("_AdaptiveAvgPoolNd", "_AdaptiveMaxPoolNd", "_AvgPoolNd", "_MaxPoolNd"),
    "torch.distributed": ("_functional_collectives",),
    "torch.utils": ("_python_dispatch", "_pytree"),
}
"""Private names of torch that are imported outside of compat.py. Tried with torch 2.15.0."""

ATTRIBUTES = {
    "torch.nn.Module": ("_buffers", "_modules", "_parameters"),
    "torch.nn.Conv2d": ("_conv_forward", "_reversed_padding_repeated_twice"),
    "torch.nn.ConvTranspose2d": ("_output_padding",),
    "omegaconf.DictConfig": ("_get_full_key", "_get_root"),
}
"""Private attributes that are read outside of compat.py. Tried with torch 2.15.0 and omegaconf 2.3.1."""

STANDARD = {"_exit", "_asdict", "_replace", "_fields"}
"""Of Python itself, and public in spite of the underscore: ``os._exit``, and those of named tuples."""

SPECIMENS: dict[str, Any] = {
    "torch.nn.Module": (),
    "torch.nn.Conv2d": (1, 1, 1),
    "torch.nn.ConvTranspose2d": (1, 1, 1),
    "omegaconf.DictConfig": ({},),
}
"""What each class is made from, since some of these attributes are only on instances."""


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(trees: list[ast.Module]) -> set[str]:
    """Names of functions, classes, variables and fields that the package defines itself."""
    names: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                names.add(name)
    return names


def private_uses(tree: ast.Module) -> Iterator[str]:
    """Private names that are imported in ``tree``, read there as attributes, or asked for by ``getattr``."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) if private(name):
                yield name
            case ast.Import() | ast.ImportFrom():
                parts = [*(getattr(node, "module", None) or "").split("."), *(alias.name for alias in node.names)]
                yield from (part for name in parts for part in name.split(".") if private(part))
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(name)), *_]) if private(name):
                yield name


def test_private_parts_of_libraries_are_used_in_compat_or_listed_here() -> None:
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in PACKAGE.rglob("*.py")}
    own = own_names([tree for file, tree in trees.items() if file.name != "compat.py"])
    listed = {name for names in (*BASE_CLASSES.values(), *ATTRIBUTES.values()) for name in names}
    found = {
        f"{file.relative_to(PACKAGE)}: {name}"
        for file, tree in trees.items()
        if file.name != "compat.py"
        for name in private_uses(tree)
        if name not in own | listed | STANDARD
    }
    assert sorted(found) == []


def test_the_search_for_private_parts_sees_each_way_to_use_one() -> None:
    text = "from torch.nn import _A\nimport torch._b\nx._c\ngetattr(x, '_d', None)\nx.__name__"
    assert sorted(private_uses(ast.parse(text))) == ["_A", "_b", "_c", "_d"]


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in BASE_CLASSES.items() for name in names]
)
def test_torch_has_the_private_name(module: str, name: str) -> None:
    try:
        importlib.import_module(f"{module}.{name}")
    except ImportError:
        assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in ATTRIBUTES.items() for name in names])
def test_an_instance_has_the_private_attribute(kind: str, name: str) -> None:
    module, _, attribute = kind.rpartition(".")
    instance = getattr(importlib.import_module(module), attribute)(*SPECIMENS[kind])
    assert hasattr(instance, name)


def test_publish_artifact_calls_the_interface_of_a_wandb_run() -> None:
    wandb = pytest.importorskip("wandb")
    from wandb.sdk.interface.interface import InterfaceBase

    assert "_interface" in wandb.Run.__annotations__
    run = Mock(_interface=create_autospec(InterfaceBase, instance=True))  # refuses arguments that the real one would
    artifact = object()
    compat.publish_artifact(run, artifact, used=True)  # type: ignore[arg-type]
    (call,) = run._interface.publish_artifact.call_args_list
    assert call.args[:2] == (run, artifact)
    assert (call.kwargs["is_user_created"], call.kwargs["use_after_commit"]) == (True, True)


def test_workspace_definition_holds_the_identity_that_was_set() -> None:
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")
    workspace = workspaces.Workspace(entity="us", project="vision", name="ours", sections=[])
    assert (workspace._internal_name, workspace._internal_id) == ("", "")
    compat.set_workspace_identity_(workspace, name="nw-1234-v", id="VmlldzoxMjM0")
    view = json.loads(compat.workspace_definition(workspace))
    assert (view["name"], view["id"], view["displayName"]) == ("nw-1234-v", "VmlldzoxMjM0", "ours")


def test_restore_loader_position_loads_the_state_that_lightning_left() -> None:
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", devices=1, barebones=True)
    loop = trainer.fit_loop
    assert (loop._combined_loader_states_to_load, loop._data_fetcher, loop._combined_loader) == ([], None, None)
    compat.restore_loader_position_(trainer)
    fetcher, loader = type("Fetcher", (), {"iterated": 0, "__iter__": _count_iterations})(), Mock()
    loop.epoch_progress.current.ready = 1  # an epoch that was begun
    loop.restarting, loop._data_fetcher, loop._combined_loader = True, fetcher, loader
    loop._combined_loader_states_to_load = [{"batch": 3}]
    compat.restore_loader_position_(trainer)
    assert loader._load_state_dicts.call_args.args == ([{"batch": 3}],)
    assert fetcher.iterated == 1  # type: ignore[attr-defined]


def test_hooks_are_shared_until_their_handle_removes_them() -> None:
    source, module, calls = nn.Linear(2, 2), nn.Linear(2, 2), []
    assert not compat.has_hooks(source)
    kinds = [
        source.register_forward_pre_hook(lambda *_: calls.append("before")),
        source.register_forward_pre_hook(lambda *_: calls.append("before, with keywords"), with_kwargs=True),
        source.register_forward_hook(lambda *_: calls.append("after")),
        source.register_forward_hook(lambda *_: calls.append("after, with keywords"), with_kwargs=True),
        source.register_forward_hook(lambda *_: calls.append("always"), always_call=True),
        source.register_full_backward_pre_hook(lambda *_: calls.append("backward, before")),
        source.register_full_backward_hook(lambda *_: calls.append("backward")),
    ]
    compat.share_hooks_(source, module)
    assert compat.has_hooks(module)
    module(torch.ones(1, 2, requires_grad=True)).sum().backward()
    expected = ["before", "before, with keywords", "after", "after, with keywords", "always"]
    assert calls == [*expected, "backward, before", "backward"]
    for handle in kinds:
        handle.remove()
    assert not compat.has_hooks(module)


def test_each_kind_of_hook_on_a_state_dict_is_found() -> None:
    for name in ("register_state_dict_pre_hook", "register_state_dict_post_hook", "register_load_state_dict_pre_hook",
                 "register_load_state_dict_post_hook"):  # fmt: skip
        layer = nn.Linear(2, 2)
        assert not compat.has_state_hooks(layer)
        getattr(layer, name)(lambda *_: None)
        assert compat.has_state_hooks(layer), name


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_hooks_that_compute_weights_rest_in_their_places() -> None:
    layers = [
        torch.nn.utils.weight_norm(nn.Linear(2, 2)),
        torch.nn.utils.spectral_norm(nn.Linear(2, 2)),
        torch.nn.utils.prune.l1_unstructured(nn.Linear(2, 2), "weight", 1),
    ]
    for layer in layers:
        seen: list[str] = []
        layer.register_forward_pre_hook(lambda *_, seen=seen: seen.append("a user's"))
        hooks = dict(layer._forward_pre_hooks)
        with compat.weight_hooks_at_rest(layer):
            layer(torch.ones(1, 2))
            first = layer.weight
            layer(torch.ones(1, 2))
            assert layer.weight is first
        assert seen == ["a user's"] * 2
        assert dict(layer._forward_pre_hooks) == hooks
        layer(torch.ones(1, 2))
        assert layer.weight is not first


def test_hydra_argument_parser_knows_hydras_flags() -> None:
    parsed = compat.hydra_argument_parser().parse_args(["-m", "seed=0,1"])
    assert (parsed.multirun, parsed.overrides) == (True, ["seed=0,1"])
    flags = ("config_path", "config_name", "config_dir", "experimental_rerun", "hydra_help", "info", "shell_completion")
    assert not any(getattr(parsed, flag) for flag in flags)


def test_import_torchmetrics_leaves_scipy_signal_to_be_imported_later() -> None:
    script = """if True:
        import sys
        from qtrain.utils.compat import import_torchmetrics
        import_torchmetrics()
        print("torchmetrics" in sys.modules, "scipy.signal" in sys.modules)
        import scipy.signal
        print(callable(scipy.signal.convolve))
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["True False", "True"]


def _count_iterations(self: Any) -> Iterator[object]:
    self.iterated += 1
    return iter(())


@pytest.mark.parametrize("name", compat.COMPILER)
def test_the_compiler_has_the_option_and_gets_it_inside_only(name: str) -> None:
    config = importlib.import_module("torch._functorch.config")
    before = getattr(config, name)
    with compat.compiling():
        assert getattr(config, name) is compat.COMPILER[name]
    assert getattr(config, name) is before is not compat.COMPILER[name], "or the option is not needed any more"


def test_the_partitioner_is_torchs_own_and_then_changes_both_parts() -> None:
    seen: list[tuple[Any, Any, int]] = []

    def change(forward: torch.fx.GraphModule, backward: torch.fx.GraphModule, outputs: int) -> None:
        seen.append((forward, backward, outputs))

    partition = compat.partitioner(change)
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=nop, bw_compiler=nop, partition_fn=partition)
    torch.compile(lambda x: x.sin().sum(), backend=backend)(torch.ones(3, requires_grad=True)).backward()
    ((forward, backward, outputs),) = seen
    assert outputs == 1
    assert "sin" in forward.code
    assert "cos" in backward.code
