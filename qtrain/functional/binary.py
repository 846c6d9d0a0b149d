"""The codes of signs, and the factor that brings signs close to a tensor."""

from torch import Tensor

from qtrain.spec import Granularity


def plane_range(bits: int, signed: bool) -> tuple[int, int]:
    """Codes of a sum of binary tensors: each of the ``bits`` planes has 0 for -1 and 1 for 1, whatever the sign."""
    return 0, 1


def mean_magnitude(x: Tensor, granularity: Granularity) -> Tensor:
    """``mean |x|`` over each group, float32, of the state shape; 0 for groups without elements.

    With ``B = sign(x)`` it is the factor that minimizes ``||x - alpha B||^2`` (XNOR-Net, arXiv 1603.05279, eq. 6).
    """
    rows = granularity.flatten(x.float().abs())
    return (rows.sum(dim=1) / max(rows.shape[1], 1)).reshape(granularity.state_shape(tuple(x.shape)))
