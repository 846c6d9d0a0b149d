"""How a teacher's logits are kept, exactly or in a few bytes: as rows of named tensors."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple, final

import torch
from torch import Tensor


class StoredColumn(NamedTuple):
    """One of the tensors that hold the answers, (samples, width)."""

    dtype: torch.dtype
    width: int


class LogitFormat(ABC):
    """From logits (N, K) float32 to named columns with N rows, and back; neither direction waits on the host."""

    @property
    @abstractmethod
    def columns(self) -> dict[str, StoredColumn]:
        """The columns by name."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Plain values that identify this format."""

    @abstractmethod
    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        """The columns' rows for ``logits``."""

    @abstractmethod
    def decode(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Logits (N, K) float32 from rows as ``encode`` makes them."""

    def bytes_a_sample(self) -> int:
        """Memory of one sample's row in all columns."""
        return sum(column.dtype.itemsize * column.width for column in self.columns.values())


@final
class Full(LogitFormat):
    """Logits as they are: 4 K bytes a sample, bit for bit."""

    def __init__(self, *, num_classes: int) -> None:
        self.num_classes = num_classes

    @property
    def columns(self) -> dict[str, StoredColumn]:
        return {"logits": StoredColumn(torch.float32, self.num_classes)}

    def describe(self) -> dict[str, Any]:
        return {"kind": "full", "num_classes": self.num_classes}

    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        return {"logits": logits}

    def decode(self, rows: Mapping[str, Tensor]) -> Tensor:
        return rows["logits"]


@final
class TopK(LogitFormat):
    """Log-probabilities of the k likeliest classes in 16 bits; the others share what is left evenly.

    The marginal smoothing of FKD (Shen and Xing, arXiv 2112.01528, section 3.2). With ``p = softmax(z)``, kept are the
    k largest ``log p_i``, their classes, and the log of the others' mean ``m = rest / (K - k)``: k + 1 float16 and k
    whole numbers. Decoded are log-probabilities: logits up to a constant, which softmax does not see.

    How far that is from the teacher: let ``p_T`` be the teacher's softmax at temperature T >= 1, ``q_T`` that of what
    is decoded, ``r_T`` the part of ``q_T`` outside of the k classes, and ``e = 2^-11 (1 + ln K)``. Then

        sum_i |p_T,i - q_T,i| / 2  <=  r_T + e
        KL(p_1 || q_1)             <=  rest ln(K - k) + 2 e

    Smoothing takes from the k classes what it gives to the others, at most ``r_T`` in all, since the mean of powers
    1/T is at most the power of the mean. A float16 is right to 2^-11 of a log-probability, and
    ``sum_i p_i |log p_i| <= ln K``. So the gradient on a student's logits, ``T (softmax(z_s / T) - p_T)`` after scaling
    by T^2, is off by at most ``2 T (r_T + e)`` in the sum of magnitudes.
    """

    def __init__(self, *, num_classes: int, k: int) -> None:
        if not 1 <= k < num_classes:
            raise ValueError(
                f"TopK: k must be at least 1 and below the {num_classes} classes, got {k}; "
                "teacher_cache=full keeps all of them"
            )
        self.num_classes = num_classes
        self.k = k

    @property
    def columns(self) -> dict[str, StoredColumn]:
        largest = self.num_classes - 1
        dtype = next(d for d in (torch.uint8, torch.int16, torch.int32) if largest <= torch.iinfo(d).max)
        return {"log_probs": StoredColumn(torch.float16, self.k + 1), "classes": StoredColumn(dtype, self.k)}

    def describe(self) -> dict[str, Any]:
        return {"kind": "top_k", "num_classes": self.num_classes, "k": self.k}

    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        log_p = logits.log_softmax(dim=1)
        top, classes = log_p.topk(self.k, dim=1)
        # The others' own sum: 1 - sum(top) would lose all digits where the teacher is sure.
        others = log_p.scatter(1, classes, -math.inf).logsumexp(dim=1, keepdim=True) - math.log(self._others)
        kept = torch.cat([top, others], dim=1).clamp(min=torch.finfo(torch.float16).min)
        return {"log_probs": kept.half(), "classes": classes.to(self.columns["classes"].dtype)}

    def decode(self, rows: Mapping[str, Tensor]) -> Tensor:
        log_p = rows["log_probs"].float()
        others = log_p[:, self.k :].expand(-1, self.num_classes)
        return others.scatter(1, rows["classes"].long(), log_p[:, : self.k])

    @property
    def _others(self) -> int:
        return self.num_classes - self.k
