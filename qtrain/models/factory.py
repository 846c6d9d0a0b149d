"""Any timm model by its name, fitted to the data's classes, channels and image size.

Order: timm builds (and fetches weights of its own, if asked), the stem is adapted (if asked), a weights file is
loaded. So the architecture depends on the options alone, and a file saved from an adapted model loads again.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import timm
import torch
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, is_model, list_models, split_model_name_tag
from torch import nn

from qtrain.models import cifar_resnet as cifar_resnet  # registers its architectures with timm
from qtrain.models.hub import offline_unless_reachable
from qtrain.models.weights import WeightSource
from qtrain.utils.errors import first_line
from qtrain.utils.suggestions import did_you_mean

log = logging.getLogger(__name__)

SMALL_IMAGE = 64
"""Image size in pixels up to which a stem made for 224 pixels loses too much resolution."""

STEM_POOLS = ("maxpool", "features.pool0", "stem.pool")
"""Where ResNets, DenseNets and norm-free ResNets keep the pooling that follows their first convolution."""


def create_model(
    *,
    name: str,
    num_classes: int,
    in_channels: int = 3,
    image_size: int | None = None,
    weights: str | None = None,
    state: str | None = None,
    keys: Mapping[str, str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    pretrained: bool = False,
    reset_head: bool = False,
    adapt_stem: bool = False,
    **options: Any,
) -> nn.Module:
    """The timm model ``name`` for images (N, in_channels, image_size, image_size) and ``num_classes`` logits.

    ``weights`` is a file, ``state`` which of the weights in it, ``keys`` parts of its keys to rename (see
    ``load_weights``); ``reset_head`` lets it have another number of classes. ``mean`` and ``std`` say on what images
    the weights were trained, one value for each channel of pixels in [0, 1]. Otherwise the file says it, or timm does.
    The model's ``pretrained_cfg`` holds the result.
    ``pretrained`` takes timm's own weights, from the cache or the hub, where no file is given. ``adapt_stem`` makes the
    stem of an ImageNet architecture fit for images up to 64 pixels (see ``adapt_small_stem``). Models of a fixed input
    size (ViT, Swin, ...) are built for ``image_size``. ``options`` go to the model's constructor.

    Raises ValueError for an unknown name (with close matches) or option, and where weights cannot be had.
    """
    check_name(name)
    pretrained = pretrained and weights is None
    source = WeightSource(owner="create_model", weights=weights, state=state, keys=keys, mean=mean, std=std)
    if num_classes < 1 or in_channels < 1:
        raise ValueError(
            f"create_model: num_classes and in_channels must be at least 1, got {num_classes} and {in_channels}"
        )
    cfg = get_pretrained_cfg(name) if is_model(split_model_name_tag(name)[0]) else None
    arguments = {"num_classes": num_classes, "in_chans": in_channels} | options
    if image_size is not None and cfg is not None and cfg.fixed_input_size:
        arguments.setdefault("img_size", image_size)
    model = _build(name, pretrained, arguments)
    _log_adaptation(name, cfg, pretrained, num_classes, in_channels, arguments.get("img_size"))
    if adapt_stem and (image_size is None or image_size <= SMALL_IMAGE):
        adapt_small_stem(model, keep_weights=pretrained)
    elif adapt_stem:
        log.info("%s: stem left as it is, %d pixels are more than %d", name, image_size, SMALL_IMAGE)
    source.fill_(model, reset_head=reset_head)
    return model


def check_name(name: str) -> None:
    """ValueError with close matches unless timm knows ``name`` (a tag after a dot, or a ``hf-hub:`` name included)."""
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return
    architecture, tag = split_model_name_tag(name)
    if not is_model(architecture):
        hint = did_you_mean(architecture, list_models(), most=5) or "; timm.list_models() names all"
        raise ValueError(f"create_model: timm has no model {name!r}{hint}")
    known = [key for key in get_arch_pretrained_cfgs(architecture) if "." in key]
    if tag and name not in known:
        raise ValueError(
            f"create_model: {architecture} has no weights tagged {tag!r}; there are: {', '.join(known) or 'none'}"
        )


def adapt_small_stem(model: nn.Module, *, keep_weights: bool) -> None:
    """Make a standard stem keep the resolution of small images: first convolution to stride 1, pooling to nothing.

    A square kernel larger than 3 becomes 3x3, as in He's networks for CIFAR; with ``keep_weights`` it is the
    center of the old kernel, otherwise drawn anew. Patch embeddings (stride as large as the kernel) and stems
    that timm does not name are left, and the log says so.
    """
    name = type(model).__name__
    first = getattr(model, "pretrained_cfg", {}).get("first_conv") or ()
    convs: dict[str, nn.Conv2d] = {}
    for path in (first,) if isinstance(first, str) else first:
        conv = model.get_submodule(path)
        if not isinstance(conv, nn.Conv2d):
            log.info("%s: stem left as it is, %s is a %s", name, path, type(conv).__name__)
            return
        if isinstance(first, str) and conv.stride == conv.kernel_size != (1, 1):
            log.info("%s: stem left as it is, %s cuts patches of %s pixels", name, path, conv.stride)
            return
        convs[path] = conv
    done = []
    for path, conv in convs.items():
        before = _spell(conv)
        small = _small_kernel(model, path, conv, keep_weights=keep_weights)
        small.stride = (1, 1)
        if _spell(small) != before:
            done.append(f"{path} {before} -> {_spell(small)}")
    for path in STEM_POOLS if convs else ():
        if isinstance(_submodule(model, path), nn.MaxPool2d):
            model.set_submodule(path, nn.Identity())
            done.append(f"{path} -> none")
    log.info("%s: stem for small images: %s", name, ", ".join(done) or "nothing to adapt")


def _small_kernel(model: nn.Module, path: str, conv: nn.Conv2d, *, keep_weights: bool) -> nn.Conv2d:
    """``conv``, or in its place a 3x3 one where its kernel is larger, odd and square."""
    size = conv.kernel_size[0]
    if type(conv) is not nn.Conv2d or size <= 3 or size % 2 == 0 or conv.kernel_size[1] != size:
        return conv
    small = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, groups=conv.groups, bias=conv.bias is not None)
    nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
    if keep_weights:
        margin = (size - 3) // 2
        with torch.no_grad():
            small.weight.copy_(conv.weight[:, :, margin:-margin, margin:-margin])
            if small.bias is not None and conv.bias is not None:
                small.bias.copy_(conv.bias)
    model.set_submodule(path, small)
    return small


def _spell(conv: nn.Conv2d) -> str:
    return f"{conv.kernel_size[0]}x{conv.kernel_size[1]} stride {conv.stride[0]}"


def _build(name: str, pretrained: bool, arguments: dict[str, Any]) -> nn.Module:
    """timm's ``create_model``, with each of its errors turned into one line."""
    try:
        with offline_unless_reachable() if pretrained or ":" in name else nullcontext():
            return timm.create_model(name, pretrained=pretrained, **arguments)
    except TypeError as error:
        raise ValueError(f"create_model: {name} does not take these options: {first_line(error)}") from error
    except ValueError as error:
        raise ValueError(f"create_model: {name} cannot be built: {first_line(error)}") from error
    except AssertionError as error:
        raise ValueError(
            f"create_model: {name} refuses {arguments} {first_line(error)}; change image_size or the options"
        ) from error
    except Exception as error:
        # Hub, proxy, TLS and cache failures share no base class. If no weights are fetched, the error is a bug and is
        # not caught.
        if not pretrained and ":" not in name:
            raise
        raise ValueError(
            f"create_model: no pretrained weights for {name} ({type(error).__name__}: {first_line(error)}); "
            "give a file as `weights`, fill the Hugging Face cache, or set pretrained=false"
        ) from error


def _log_adaptation(
    name: str, cfg: Any, pretrained: bool, num_classes: int, in_channels: int, img_size: int | None
) -> None:
    """Log where the model differs from the one that ``name`` stands for."""
    if cfg is None:
        return
    if cfg.num_classes != num_classes:
        origin = ", drawn anew" if pretrained else ""
        log.info("%s: head of %d classes instead of %d%s", name, num_classes, cfg.num_classes, origin)
    if cfg.input_size[0] != in_channels:
        origin = ", timm's weights converted" if pretrained else ""
        log.info("%s: stem for %d channels instead of %d%s", name, in_channels, cfg.input_size[0], origin)
    if img_size is not None and img_size != cfg.input_size[-1]:
        log.info("%s: built for %s pixels instead of %d", name, img_size, cfg.input_size[-1])


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    return dict(model.named_modules()).get(path)
