"""Which tensors of a model belong to several of its modules: the one place that finds them.

A module that is used twice is one owner with two names. Here it is about two modules with one weight or bias: whoever
changes it for one of them changes it for the other. Two parameters over the same memory are one tensor too.
"""

from collections.abc import Hashable, Mapping

from torch import Tensor, nn


def place_of(tensor: Tensor) -> Hashable:
    """Equal for two tensors that are the same numbers in memory, seen in the same way."""
    start = _address(tensor)
    return id(tensor) if start is None else (tensor.device, start, tensor.dtype, tensor.shape, tensor.stride())


def distinct(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` without those that are another one under a further name; the first name stays."""
    seen: dict[Hashable, str] = {}
    return {name: tensor for name, tensor in tensors.items() if seen.setdefault(place_of(tensor), name) == name}


def completed(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with the names that :func:`distinct` took out, where ``own``, a model's state, has them shared."""
    known = {place_of(own[name]): tensor for name, tensor in tensors.items() if name in own}
    others = {name: known[place_of(tensor)] for name, tensor in own.items() if place_of(tensor) in known}
    return {**others, **tensors}


def shared_tensors(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Each parameter and buffer of ``model`` that several modules own -> its names in the others.

    Two tensors are shared where their memory overlaps. A module has the first of its qualified names.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> model[1].bias = model[0].bias
    >>> shared_tensors(model)
    {'0.bias': ('1.bias',), '1.bias': ('0.bias',)}
    """
    extents: list[tuple[str, int, int, str]] = []
    for owner, module in model.named_modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and (start := _address(tensor)) is not None:
                name = f"{owner}.{leaf}" if owner else leaf
                extents.append((str(tensor.device), start, start + _extent(tensor), name))
    groups: list[list[str]] = []
    where, end = "", 0
    for device, start, after, name in sorted(extents):
        if groups and device == where and start < end:
            groups[-1].append(name)
            end = max(end, after)
        else:
            groups.append([name])
            where, end = device, after
    return {name: tuple(other for other in group if other != name) for group in groups for name in group if group[1:]}


def why_shared(shared: Mapping[str, tuple[str, ...]], layer: str, *parts: str) -> str | None:
    """Why the first shared one of the ``parts`` of ``layer`` cannot be changed for this layer alone, if one is shared.

    ``shared`` is that of :func:`shared_tensors`.
    """
    for part in parts:
        others = shared.get(f"{layer}.{part}" if layer else part)
        if others is not None:
            return f"its {part} is also {', '.join(others)}, which would change with it"
    return None


def _address(tensor: Tensor) -> int | None:
    """Where the numbers of ``tensor`` begin; ``None`` where it has no memory of its own kind."""
    try:
        return tensor.data_ptr() or None if tensor.numel() else None
    except RuntimeError:  # a wrapper around other tensors, such as the share of a rank
        return None


def _extent(tensor: Tensor) -> int:
    """Bytes from the first to the last of its numbers."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
