"""The private parts of libraries that are used because these libraries offer no public way.

Each function names the version that it was tried with. ``tests/utils/test_compat.py`` has a test for each, which fails
by name when a new version moves the part. The libraries are imported inside the functions, so that this file is light.

Not here: classes and attributes of torch that only its own modules are told by (``_ConvNd``, ``_BatchNorm`` and a few
more). Code that is compiled and type-checked needs them where they are used; the same test file lists them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import argparse

    import pytorch_lightning as pl
    import wandb
    from torch import nn
    from torch.fx import GraphModule

COMPILER = {
    "ban_recompute_materialized_backward": False,
    "ban_recompute_used_far_apart": False,
    "autograd_cache_allow_custom_autograd_functions": True,
}
"""What torch's compiler may do, although by itself it does not.

It may compute cheap things twice. A convolution of the backward reads codes, and a gradient's mask comes from what was
rounded. Both follow from what is kept anyway, by cheap operations in the same pass over the memory. And it may find a
step with gradients written by hand on disk, whose key has their operations too.
"""


class Workspace(Protocol):
    """What is used of ``wandb_workspaces.workspaces.Workspace``."""

    _internal_name: str
    _internal_id: str

    def _to_model(self) -> Any: ...


def publish_artifact(run: wandb.Run, artifact: wandb.Artifact, *, used: bool) -> None:
    """Hand ``artifact`` to the client of ``run`` as its input (``used``) or its output, and return at once.

    ``run.use_artifact`` and ``run.log_artifact`` do the same in the end. But they refuse to use an artifact offline,
    and online they ask the server first and wait for its answer. Tried with wandb 0.31.0.
    """
    interface = run._interface
    assert interface is not None
    interface.publish_artifact(
        run, artifact, ["latest"], [], finalize=True, is_user_created=used, use_after_commit=used
    )


def workspace_definition(workspace: Workspace) -> str:
    """``workspace`` as the JSON text that the server would get.

    The package can only save a workspace to a server or load it from there. Tried with wandb-workspaces 0.4.13.
    """
    definition: str = workspace._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=1)
    return definition


def set_workspace_identity_(workspace: Workspace, *, name: str, id: str) -> None:
    """Make ``workspace`` replace the saved one with this ``name`` and ``id`` when it is saved.

    Publicly this takes ``Workspace.from_url``, which needs the server. Tried with wandb-workspaces 0.4.13.
    """
    workspace._internal_name, workspace._internal_id = name, id


def restore_loader_position_(trainer: pl.Trainer) -> None:
    """Move the training loader of a resumed run to the saved batch, if Lightning has not done so.

    Lightning gives a loader its saved state where it makes the loader. If ``configure_optimizers`` asks for
    ``trainer.estimated_stepping_batches``, the loader is made before the checkpoint's loop state is read, and the epoch
    would start over. Tried with pytorch-lightning 2.6.6.
    """
    loop = trainer.fit_loop
    if loop.restarting and loop._combined_loader_states_to_load and loop._data_fetcher is not None:
        loop._load_combined_loader_states()
        iter(loop._data_fetcher)


def hydra_argument_parser() -> argparse.ArgumentParser:
    """The parser of Hydra's own flags and overrides, as ``hydra.main`` uses it.

    Hydra has no public way to parse a command line without running it. Tried with hydra-core 1.3.8.
    """
    from hydra._internal.utils import get_args_parser

    parser: argparse.ArgumentParser = get_args_parser()
    return parser


def import_torchmetrics() -> None:
    """Import torchmetrics without scipy.signal, which takes about a second and can be imported later as usual.

    torchmetrics imports it only to give it an old name, ``hamming``, that a package for an audio metric looks for. So
    a stand-in that has the name is enough. Tried with torchmetrics 1.9.0.
    """
    name = "scipy.signal"
    if name in sys.modules:
        return
    stand_in = ModuleType(name)
    vars(stand_in)["hamming"] = None
    sys.modules[name] = stand_in
    try:
        import torchmetrics as torchmetrics
    finally:
        del sys.modules[name]


HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks",
)  # fmt: skip
"""Where a module of torch keeps the hooks of its forward and backward."""

STATE_HOOKS = (
    "_state_dict_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
"""Where a module of torch keeps the hooks of its state dict."""


def share_hooks_(source: nn.Module, module: nn.Module) -> None:
    """Give ``module`` the forward and backward hooks of ``source``, by sharing: a handle removes them from both.

    Torch has no public way to list hooks. Tried with torch 2.15.0.
    """
    for name in (*HOOKS, "_is_full_backward_hook"):
        setattr(module, name, getattr(source, name))


def has_hooks(module: nn.Module) -> bool:
    """Whether ``module`` has a hook of its forward or backward. Tried with torch 2.15.0."""
    return any(getattr(module, name) for name in HOOKS)


def has_state_hooks(module: nn.Module) -> bool:
    """Whether ``module`` has a hook of its state dict. Tried with torch 2.15.0."""
    return any(getattr(module, name) for name in STATE_HOOKS)


@contextmanager
def weight_hooks_at_rest(model: nn.Module) -> Iterator[None]:
    """Inside, torch's pruning and its older weight and spectral norm do not compute the weights of ``model`` anew.

    They do so by hooks before each forward, which run once on entering. Tried with torch 2.15.0.
    """
    from torch.nn.utils.prune import BasePruningMethod
    from torch.nn.utils.spectral_norm import SpectralNorm
    from torch.nn.utils.weight_norm import WeightNorm

    resting: list[tuple[dict[int, Any], int, Any]] = []
    try:
        for module in model.modules():
            for key, hook in module._forward_pre_hooks.items():
                if isinstance(hook, BasePruningMethod | SpectralNorm | WeightNorm):
                    hook(module, ())
                    resting.append((module._forward_pre_hooks, key, hook))
        for hooks, key, _ in resting:
            hooks[key] = lambda *_: None  # in its place, so that the order of all hooks stays
        yield
    finally:
        for hooks, key, hook in resting:
            hooks[key] = hook


def compiling() -> AbstractContextManager[Any]:
    """Inside, torch's compiler has the options :data:`COMPILER`; those that a version of torch lacks are left out.

    It keeps less between forward and backward, and finds more on disk. Tried with torch 2.15.0.
    """
    from torch._functorch import config

    patched: AbstractContextManager[Any] = config.patch({k: v for k, v in COMPILER.items() if hasattr(config, k)})
    return patched


def partitioner(change: Callable[[GraphModule, GraphModule, int], None]) -> Any:
    """How torch's compiler divides a step into forward and backward, after which ``change`` may alter both in place.

    It is also told how many results the forward has. It is torch's own way, as an option ``custom_partitioner_fn``. On
    disk a compiled step is found again as long as the file of ``change`` is the same. Tried with torch 2.15.0.
    """
    from functorch.compile import min_cut_rematerialization_partition
    from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files

    class Partitioner(CustomPartitionerFn):
        def __call__(self, gm: GraphModule, joint_inputs: Any, **options: Any) -> tuple[GraphModule, GraphModule]:
            forward, backward = min_cut_rematerialization_partition(gm, joint_inputs, **options)
            change(forward, backward, options["num_fwd_outputs"])
            return forward, backward

        def uuid(self) -> Any:
            return get_hash_for_files((inspect.getfile(change),))

        def __reduce__(self) -> Any:  # a part of the key by which a compiled step is found on disk
            return partitioner, (change,)

    return Partitioner()
