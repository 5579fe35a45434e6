"""Dropout whose random numbers are cheap on a CPU."""

import torch
from torch import Tensor
from torch.nn import functional as F


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zeroes each element with probability `p` and scales the others by 1 / (1 - p); `x` unless `training`.

    torch draws on one core, a whole number for each element. Here four elements share a draw of 64 bits,
    which keeps `p` to a step of 2 ** -16 and takes a third of the time. Other devices take torch's own.
    """
    if not training or p == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    numbers = draws.view(torch.int16)[: x.numel()].view(x.shape)  # even over -2 ** 15 .. 2 ** 15 - 1
    kept = numbers >= min(round(p * 2**16), 2**16 - 1) - 2**15
    return x * kept.to(x.dtype).mul_(1 / (1 - p))
