"""The outputs of named layers, beside the logits, from one forward.

Distillation looks at features; a model gives logits. Forward hooks bridge the two for any architecture without
rewriting it, and torch.compile traces through them with no graph break.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qtrain.utils.eval_mode import evaluating
from qtrain.utils.suggestions import did_you_mean


class FeatureTaps:
    """Taps on the layers ``names`` of ``model``: ``forward_with_features(x) -> (logits, {name: output})``.

    A tapped layer must return one tensor; where it runs several times in one forward, the last output counts.
    Put the taps in after the layers were converted: a replaced module takes its hook with it. Any other forward
    of the model is as it was, and stores nothing. ``close()`` (or leaving a ``with`` block) takes the taps out.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        modules = tapped_modules(model, names)
        self.model = model
        self.names = tuple(names)
        self._store: dict[str, Tensor] | None = None
        self._handles: list[RemovableHandle] = [self._tap(name, module) for name, module in modules.items()]

    def forward_with_features(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (N, K) of images (N, C, H, W), and the tapped outputs in the order of ``names``."""
        store: dict[str, Tensor] = {}
        self._store = store
        try:
            logits = self.model(x)
        finally:
            self._store = None
        silent = [name for name in self.names if name not in store]
        if silent:
            raise ValueError(f"FeatureTaps: the forward never calls {', '.join(silent)}; tap the layers around it")
        return logits, {name: store[name] for name in self.names}

    def close(self) -> None:
        """Take the taps out; the model keeps no trace of them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> "FeatureTaps":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _tap(self, name: str, module: nn.Module) -> RemovableHandle:
        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self._store is None:
                return
            if not isinstance(output, Tensor):
                raise ValueError(
                    f"FeatureTaps: {name} returns a {type(output).__name__}, not one tensor; tap a layer inside it"
                )
            self._store[name] = output

        return module.register_forward_hook(keep)


def tapped_modules(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The modules called ``names``. Raises ``ValueError`` with close matches for a name that ``model`` lacks."""
    modules = dict(model.named_modules())
    if len(set(names)) != len(names):
        raise ValueError(f"FeatureTaps: each name once, got {list(names)}")
    for name in names:
        if name not in modules or not name:
            children = ", ".join(child for child, _ in model.named_children())
            near = did_you_mean(name, modules, most=4) or f"; its parts are {children}"
            raise ValueError(f"FeatureTaps: {type(model).__name__} has no layer {name!r}{near}")
    return {name: modules[name] for name in names}


def feature_shapes(model: nn.Module, names: Sequence[str], input_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tapped outputs for an input of ``input_shape`` (N, C, H, W), from one forward of zeros.

    (2, 3, 32, 32) into cifar_resnet20 gives {"layer2": (2, 32, 16, 16)}. The model is left as it was: eval mode
    during the forward, each module's own mode afterwards, no statistics changed.
    """
    first = next(model.parameters())
    with FeatureTaps(model, names) as taps, evaluating(model), torch.no_grad():
        _, features = taps.forward_with_features(torch.zeros(*input_shape, device=first.device, dtype=first.dtype))
    return {name: tuple(feature.shape) for name, feature in features.items()}
