"""Scaled dot-product attention over heads.  B rows, H heads, T queries, S keys, D head size."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_gpt2.model.dropout import dropout

_PLAIN_BELOW = 512
"""On a CPU plain matrix products beat the fused kernel for inputs shorter than this."""


def causal_attention(q: Tensor, k: Tensor, v: Tensor, p: float = 0.0) -> Tensor:
    """Each token reads itself and those before it: (B, H, T, D) for q, k, v alike; dropout of `p`.

    Right-padded rows need no mask: padding lies behind every real token.
    """
    if q.is_cuda or q.size(2) >= _PLAIN_BELOW:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
    seen = torch.ones(q.size(2), q.size(2), dtype=torch.bool, device=q.device).tril()
    return attend(q, k, v, seen, p)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, p: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the keys where `seen`, broadcast to (B, H, T, S), is true."""
    weights = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)  # (B, H, T, S)
    weights = weights.masked_fill(~seen, -torch.inf).softmax(dim=-1).to(v.dtype)
    return dropout(weights, p, p > 0) @ v  # (B, H, T, D)
