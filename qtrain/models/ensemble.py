"""Several models that answer as one.

An ensemble is an ordinary module, so whatever works on a model works on it: taps, freezing, compilation, a cache of its
answers. Its members are children under their names: ``resnet56.layer3`` is a layer of the member ``resnet56``.
"""

from collections.abc import Mapping
from typing import Literal, final

import torch
from torch import Tensor, nn

Combine = Literal["logits", "probabilities"]


def combine_logits(logits: Tensor, shares: Tensor, combine: Combine) -> Tensor:
    """One answer (N, K) from ``logits`` (M, N, K) of M members, with ``shares`` (M,) that sum to 1; float32.

    ``logits``: ``sum_m share_m logits_m``. Its softmax, at any temperature, is the weighted geometric mean of the
    members' softmaxes at that temperature, normalized. ``probabilities``: ``log sum_m share_m softmax(logits_m)``,
    whose softmax is the weighted arithmetic mean. Both are named in Hinton et al. 2015 (arXiv 1503.02531, §1).
    """
    logits, shares = logits.float(), shares.float().view(-1, 1, 1)
    if combine == "logits":
        return (shares * logits).sum(dim=0)
    return (shares.log() + logits.log_softmax(dim=2)).logsumexp(dim=0)


@final
class Ensemble(nn.Module):
    """Logits (N, K) float32 of all ``members`` on the same images, combined by :func:`combine_logits`.

    ``shares`` maps each member's name to its weight in the mean, above 0, and is normalized; ``None``: all alike.
    """

    _shares: Tensor

    def __init__(
        self,
        *,
        members: Mapping[str, nn.Module],
        shares: Mapping[str, float] | None = None,
        combine: Combine = "logits",
    ) -> None:
        super().__init__()
        if not members:
            raise ValueError("Ensemble: members is empty; name at least one model")
        shares = dict.fromkeys(members, 1.0) if shares is None else shares
        if shares.keys() != members.keys() or min(shares.values()) <= 0:
            raise ValueError(
                f"Ensemble: shares must give each of {', '.join(members)} a number above 0, got {dict(shares)}; "
                "or null for equal shares"
            )
        for name, member in members.items():
            if not name or "." in name or hasattr(self, name):
                raise ValueError(f"Ensemble: {name!r} cannot be a member's name; take another, without dots")
            self.add_module(name, member)
        self._names = tuple(members)
        self._combine: Combine = combine
        given = torch.tensor([float(shares[name]) for name in members])
        self.register_buffer("_shares", given / given.sum(), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        logits = [self.get_submodule(name)(image).float() for name in self._names]
        return combine_logits(torch.stack(logits), self._shares, self._combine)
