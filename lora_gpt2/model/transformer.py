"""GPT-2 (Radford et al. 2019): pre-norm blocks, learned positions, weights stored (in, out).

B rows, T tokens, C = n_embd, H heads, D = C / H.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_gpt2.model.attention import causal_attention
from lora_gpt2.model.cache import LayerCache, RowCache
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.dropout import dropout
from lora_gpt2.model.lora import MergedLinear


class Conv1D(nn.Module):
    """x W + b with W stored (in, out), as the published GPT-2 checkpoints store it."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T, self.bias)


class Attention(nn.Module):
    """Multi-head causal self-attention with LoRA on the fused q, k, v projection."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.fix_dropout
        self.c_attn = MergedLinear(
            config.n_embd,
            3 * config.n_embd,
            r=config.lora_attn_dim,
            lora_alpha=config.lora_attn_alpha,
            lora_dropout=config.lora_dropout,
            lora_r_dropout=config.lora_r_dropout,
            enable_lora=config.enable_lora,
            fan_in_fan_out=True,
        )
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        heads = self.c_attn(x).unflatten(-1, (3, self.n_head, -1))  # (B, T, 3, H, D)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if cache is None:
            y = causal_attention(q, k, v, self.dropout if self.training else 0.0)
        else:
            y = cache.attend(q, k, v)
        return self.c_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


class MLP(nn.Module):
    """C -> 4 C -> C with GELU by its tanh formula."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, 4 * config.n_embd)
        self.c_proj = Conv1D(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)
        self.dropout = config.fix_dropout

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        x = x + dropout(self.attn(self.ln_1(x), cache), self.dropout, self.training)
        return x + dropout(self.mlp(self.ln_2(x)), self.dropout, self.training)


class GPT2Model(nn.Module):
    """Tokens to hidden states."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def hidden_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        caches: Sequence[LayerCache] | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """(B, T) -> (B, T, C). `position_ids` broadcasts to (B, T); default 0 .. T - 1."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.size(1), device=input_ids.device)
        x = self.wte(input_ids) + self.wpe(position_ids)
        if token_type_ids is not None:
            x = x + self.wte(token_type_ids)
        x = dropout(x, self.config.fix_dropout, self.training)
        for i, block in enumerate(self.h):
            x = block(x, caches[i] if caches else None)
        return self.ln_f(x)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        past: Sequence[Tensor] | None = None,
        len_past: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """(B, T) -> hidden states (B, T, C) and, for each layer, its keys and values (2, B, H, S, D).

        `past` is the second value of an earlier call; with `len_past` (B,) it is a table of fixed size,
        filled up to len_past in each row, into which one new token a row is written (see `RowCache`).
        `token_type_ids` (B, T) are embedded by the token table and added.
        Raises ValueError when a row grows beyond n_ctx tokens.
        """
        caches = [RowCache(past[i] if past else None, len_past) for i in range(len(self.h))]
        if position_ids is None:
            position_ids = self._positions(input_ids, past, len_past)
        hidden = self.hidden_states(input_ids, position_ids, caches, token_type_ids)
        return hidden, [cache.present for cache in caches if cache.present is not None]

    def _positions(self, ids: Tensor, past: Sequence[Tensor] | None, len_past: Tensor | None) -> Tensor:
        if len_past is not None:
            return len_past[:, None]
        start = past[0].size(3) if past is not None else 0
        if start + ids.size(1) > self.config.n_ctx:
            raise ValueError(f"{start + ids.size(1)} tokens are more than n_ctx {self.config.n_ctx}")
        return torch.arange(start, start + ids.size(1), device=ids.device)
