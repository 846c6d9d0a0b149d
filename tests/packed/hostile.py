"""Students' files whose description was made to do harm, under a digest that is right.

Each is an edit of a good file's description (plain values) and tensors, and what the line that refuses it says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

Plain = dict[str, Any]
Edit = Callable[[Plain, dict[str, Tensor]], object]

HUGE = 2**40


@dataclass(frozen=True)
class Hostile:
    """``edit`` is done to the student whose weights are quantized by ``weights``; ``says`` is a pattern."""

    edit: Edit
    says: str
    weights: str = "lsq"


def at(plain: Any, *path: str | int) -> Any:
    for key in path:
        plain = plain[key]
    return plain


def put(plain: Plain, tensors: dict[str, Tensor], *, path: tuple[str | int, ...], value: Any) -> None:
    at(plain, *path[:-1])[path[-1]] = value


def setting(*path: str | int, to: Any) -> Edit:
    """The edit that sets the value at ``path`` of the description."""
    return partial(put, path=path, value=to)


LAYER = "layer1.0.conv1"
WEIGHT, INPUT = ("weights", 0), ("inputs", 0)
STORED = (*WEIGHT, "stored", "fields")
MADE_BY = (*INPUT, "made_by")
OPTIONS = ("network", "options")


def hostile() -> Iterator[tuple[str, Hostile]]:
    yield from _builders()
    yield from _options()
    yield from _quantizers()
    yield from _stored()
    yield from _structures()
    yield from _tensors()


def _builders() -> Iterator[tuple[str, Hostile]]:
    calls: dict[str, Plain] = {
        "os.system": {"command": "touch sprung"},
        "posix.system": {"command": "touch sprung"},
        "builtins.eval": {"source": "open('sprung', 'w')"},
        "builtins.exec": {"source": "open('sprung', 'w')"},
        "builtins.open": {"file": "sprung", "mode": "w"},
        "subprocess.run": {"args": ["touch", "sprung"]},
        "qtrain.cli.main": {},
        "qtrain.utils.importing.import_object": {"path": "trap.run", "admitted": ["trap"]},
        "qtrain.models.weights.load_weights": {"model": None, "path": "sprung"},
        "qtrain.packed.networks.create_model": {"name": "resnet18", "num_classes": 2},
        "timm.create_model": {"model_name": "resnet18"},
        "torch.load": {"f": "sprung", "weights_only": False},
        "torch.hub.load": {"repo_or_dir": "a/b", "model": "c"},
        "trap.run": {},
        "trap": {},
        "": {},
        ".": {},
        ".trap.run": {},
    }
    for builder, options in calls.items():
        said = (
            "is code of your own, which is not run unasked; if you trust|its network: .* builds no network of students"
        )
        yield f"builder {builder!r}", Hostile(setting("network", to={"builder": builder, "options": options}), said)
    yield "two lines", Hostile(setting("network", "builder", to="a\nb"), "cannot be loaded: a$")
    for builder in (None, 3, [], {}):
        yield (
            f"builder {builder!r}",
            Hostile(setting("network", "builder", to=builder), "network.builder is \\w+, not str"),
        )


def _options() -> Iterator[tuple[str, Hostile]]:
    for name, value in {
        "weights": "sprung",
        "pretrained": True,
        "pretrained_cfg": {"file": "sprung"},
        "pretrained_cfg_overlay": {"url": "http://localhost/sprung"},
        "checkpoint_path": "sprung",
        "cache_dir": "sprung",
        "reset_head": True,
    }.items():
        said = f"the option {name} would read other files; it is not followed"
        yield f"option {name}", Hostile(setting(*OPTIONS, name, to=value), said)
    for name in ("hf-hub:a/b", "hf_hub:a/b", "local-dir:/tmp", "https://localhost/a"):
        yield f"name {name}", Hostile(setting(*OPTIONS, "name", to=name), "would be fetched from elsewhere")
    for name in ("", "resnet18.nothing", "../resnet18", None, 7, ["hf-hub:a/b"], {"a": 1}):
        yield f"name {name!r}", Hostile(setting(*OPTIONS, "name", to=name), "cannot be loaded")
    for option, value in (("num_classes", 10**8), ("in_channels", 10**9), ("width", 10**4)):
        said = r"its network has \d+ numbers, and \d+ bytes cannot hold more than"
        yield f"{option} {value}", Hostile(setting(*OPTIONS, option, to=value), said)
    for option, value in (
        ("num_classes", 2**62),
        ("num_classes", -1),
        ("num_classes", "7"),
        ("width", None),
        ("unknown", 1),
        ("width", []),
    ):
        yield f"{option} {value!r}", Hostile(setting(*OPTIONS, option, to=value), "cannot be loaded")
    swin = {"name": "swin_tiny_patch4_window7_224", "num_classes": 5, "in_channels": 3, "image_size": 8000}
    vit = {"name": "vit_tiny_patch16_224", "num_classes": 5, "in_channels": 3, "embed_dim": 3 * 10**5}
    for options in ({**swin, "window_size": 400}, {**vit, "image_size": 32}, {**vit, "image_size": 10**6}):
        said = r"its network has \d+ numbers, and \d+ bytes cannot hold more than"
        yield f"{options}", Hostile(setting(*OPTIONS, to=options), said)


def _quantizers() -> Iterator[tuple[str, Hostile]]:
    calls: dict[str, Plain] = {
        "os.system": {"command": "touch sprung"},
        "trap.Quantizer": {},
        "torch.nn.Linear": {"in_features": 1, "out_features": 1},
        "qtrain.schedules.constant.Constant": {"value": 1},
        "qtrain.packed.load.load_student": {"path": "sprung"},
    }
    for call, options in calls.items():
        edit = setting(*MADE_BY, to={"call": call, "options": options})
        yield f"quantizer {call}", Hostile(edit, "is code of your own, which is not run unasked")
    for call in (
        "qtrain.quantizers.base.torch.load",
        "qtrain.quantizers",
        "qtrain.quantizers.Missing",
        "qtrain.quantizers.",
    ):
        yield (
            f"quantizer {call}",
            Hostile(
                setting(*MADE_BY, to={"call": call, "options": {}}), "cannot import|has no|must be a class or function"
            ),
        )
    aliases = {
        "qtrain.storage.description.import_object": {"path": "trap.run", "admitted": ["trap"]},
        "qtrain.storage.base.dataclass": {},
        "qtrain.quantizers.base.final": {},
        "qtrain.quantizers.base.Tensor": {},
        "qtrain.quantizers.hooks.nn.Linear": {},
    }
    for call, options in aliases.items():
        edit = setting(*MADE_BY, to={"call": call, "options": options})
        yield f"alias {call}", Hostile(edit, "is defined elsewhere|cannot import")
    for call in ("qtrain.quantizers.base.full_range", "qtrain.storage.bits.bits_to_bytes", "qtrain.spec.LayerBits"):
        yield f"no quantizer {call}", Hostile(setting(*MADE_BY, to={"call": call, "options": {}}), "is no")
    for call in ("qtrain.quantizers.base.Quantizer", "qtrain.quantizers.wrappers.wrapper.TrainingWrapper"):
        yield f"abstract {call}", Hostile(setting(*MADE_BY, to={"call": call, "options": {}}), "cannot be loaded")
    nested: Plain = {"call": "qtrain.quantizers.uniform.lsq.LSQ", "options": {}}
    for _ in range(400):
        nested = {"call": "qtrain.quantizers.wrappers.outlier.Outlier", "options": {"quantizer": nested}}
    yield "quantizers in quantizers", Hostile(setting(*MADE_BY, to=nested), "more than 32 levels|no whole student")
    for bits in (0, 17, HUGE, -4):
        yield f"input bits {bits}", Hostile(setting(*INPUT, "bits", to=bits), "bits must be in 1..16")
    for value in (
        None,
        7,
        "LSQ",
        [],
        {"type": "qtrain.spec.granularity.PerTensor", "fields": {}},
        {"dtype": "float32"},
    ):
        yield f"made by {value!r}", Hostile(setting(*MADE_BY, to=value), "is not made by a quantizer's constructor")
    for dtype in ("load", "nn", "float33", ""):
        yield f"type {dtype!r}", Hostile(setting(*INPUT, "dtype", to=dtype), "there is no type of numbers")
    block = {"type": "qtrain.spec.granularity.PerBlock", "fields": {"size": HUGE}}
    made = {"call": "qtrain.quantizers.uniform.lsq.LSQ", "options": {"granularity": block}}
    yield "granularity of an input", Hostile(setting(*MADE_BY, to=made), "cannot be loaded")


def _stored() -> Iterator[tuple[str, Hostile]]:
    for bits in (0, -1, 33, 10**9, HUGE, "4", 4.0, True, None):
        yield f"weight bits {bits!r}", Hostile(setting(*STORED, "bits", to=bits), "cannot be loaded")
    yield "bits other than those of the codes", Hostile(setting(*WEIGHT, "bits", to=7), "is described in two ways")
    for shape in ([HUGE], [2**62, 2**62], [-1], "ab", [1.5], [], None, [10**5, 1, 1, 1], [0], [0, HUGE]):
        yield f"codes {shape!r}", Hostile(setting(*STORED, "codes", "shape", to=shape), "cannot be loaded")
    for shape in ([1, 10**6], [3, 1, 1, 1], [HUGE], [0]):
        yield f"scale {shape!r}", Hostile(setting(*STORED, "scale", "shape", to=shape), "cannot be loaded")
    for size in (HUGE, 10**9, 0, -1):
        group = {"type": "qtrain.spec.granularity.PerGroup", "fields": {"size": size}}
        yield f"groups of {size}", Hostile(setting(*STORED, "granularity", to=group), "cannot be loaded")
    for value in (
        "int32",
        None,
        {"values": [[1, [2]]], "dtype": "int32"},
        {"shape": [4]},
        {"values": "ab", "dtype": "int8"},
    ):
        yield f"codes as {value!r}", Hostile(setting(*STORED, "codes", to=value), "cannot be loaded")
    for path in ("qtrain.storage.elements.Element", "qtrain.storage.base.IntegerPart", "qtrain.spec.QuantSpec"):
        described = {"type": path, "fields": {}}
        yield f"stored as {path}", Hostile(setting(*WEIGHT, "stored", to=described), "cannot be loaded")
    for path in ("pathlib.Path", "trap.run", "qtrain.quantizers.stored.Stored"):
        described = {"type": path, "fields": {}}
        yield (
            f"stored as {path}",
            Hostile(setting(*WEIGHT, "stored", to=described), "is code of your own|is no class"),
        )
    for shape in ([HUGE], [1], [5, 5], []):
        yield f"weight of {shape}", Hostile(setting(*WEIGHT, "shape", to=shape), "is a weight of shape")
    sparse = {"shape": [HUGE], "gap_bits": 10**9, "gaps": {"shape": [HUGE], "dtype": "int32"}}
    for name, value in sparse.items():
        yield f"sparse {name}", Hostile(setting(*STORED, name, to=value), "cannot be loaded", "pruned")
    huffman = setting(*STORED, "huffman", to=True)
    yield "no Huffman code", Hostile(huffman, "cannot be loaded", "pruned")
    for name, value in {
        "fine_bits": HUGE,
        "blocks": {"type": "qtrain.spec.blocks.Blocks", "fields": {"size": 1}},
    }.items():
        yield f"vectors {name}", Hostile(setting(*STORED, name, to=value), "cannot be loaded", "vsq")
    yield "codebook", Hostile(setting(*STORED, "codebook", "shape", to=[10**6, 16]), "cannot be loaded", "kmeans")


def _structures() -> Iterator[tuple[str, Hostile]]:
    for name, value in {
        "folded": ["conv1"],
        "relu": ["nowhere"],
        "merged_norms": {"conv1": "linear"},
        "fixed_factors": {"conv1": "all"},
        "dtype": "load",
        "exposed": "all",
        "channels_last": 1,
    }.items():
        said = "cannot be loaded|is no whole student's file"
        yield f"structure {name}", Hostile(setting("structure", name, to=value), said)
    for key in ("network", "images", "structure", "layers", "size_bytes"):
        yield f"without {key}", Hostile(lambda plain, _, key=key: plain.pop(key), f"the description lacks {key}")
    for name in ("nowhere", "", "bn1", "layer1.0.conv1.weight"):
        edit = partial(_layer_as, name=name)
        yield f"layer {name!r}", Hostile(edit, "cannot be loaded")
    yield "a field more", Hostile(setting("more", to=1), "the description has 'more', which is not known")

    for side, index in (("weight", HUGE), ("weight", -1), ("input", 99)):
        edit = setting("layers", LAYER, side, to=index)
        yield f"{side} of kind {index}", Hostile(edit, rf"layer {LAYER} is of kind {index}, of which \d+ are described")
    yield (
        "tied to nothing",
        Hostile(setting("layers", LAYER, "tied", to="nowhere"), f"the network has .* at {LAYER}.weight, the file"),
    )


def _layer_as(plain: Plain, tensors: dict[str, Tensor], *, name: str) -> None:
    plain["layers"][name] = plain["layers"].pop(LAYER)


def _tensors() -> Iterator[tuple[str, Hostile]]:
    name = f"{LAYER}.weight"
    for value in (torch.ones(4), torch.zeros(1, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8), None):
        shape = None if value is None else tuple(value.shape)
        edit = partial(_tensor_as, name=name, value=value)
        yield f"codes of {shape}", Hostile(edit, "cannot be loaded")
    for other in ("bn1.weight", "bn1.running_mean", "linear.bias", "layer1.0.conv1.input_quantizer"):
        yield f"without {other}", Hostile(partial(_tensor_as, name=other, value=None), "the file (lacks|has no bytes)")
    for value in (torch.ones(5), torch.ones(4, dtype=torch.int32)):
        edit = partial(_tensor_as, name="bn1.weight", value=value)
        yield f"bn1.weight of {value.dtype} {tuple(value.shape)}", Hostile(edit, "the network has .* at bn1.weight")
    for other in ("nowhere", "bn1.nothing", "a..b", "layer1.0.conv1.weight.x", "__class__", "bn1.__class__", "forward"):
        edit = partial(_tensor_as, name=other, value=torch.ones(2))
        yield f"a tensor {other}", Hostile(edit, "the network has n")


def _tensor_as(plain: Plain, tensors: dict[str, Tensor], *, name: str, value: Tensor | None) -> None:
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value


HOSTILE = dict(hostile())
