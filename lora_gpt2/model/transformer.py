"""GPT-2 (Radford et al. 2019): pre-norm blocks, learned positions, weights stored (in, out).

B rows, T tokens, C = n_embd, H heads, D = C / H.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_gpt2.model.activation import gelu
from lora_gpt2.model.attention import causal_attention
from lora_gpt2.model.cache import LayerCache, RowCache
from lora_gpt2.model.config import GPT2Config, LayerLora
from lora_gpt2.model.dropout import dropout
from lora_gpt2.model.lora import LayerNorm, MergedLinear


def linear(config: GPT2Config, name: str, in_features: int, out_features: int) -> MergedLinear:
    """x W + b with W (in, out), as the published checkpoints store it, and LoRA where `config` says."""
    lora = config.lora_layers.get(name, LayerLora(0, 1, [False]))
    biases = {"none": False, "lora_only": lora.rank > 0, "all": config.lora_attn_dim > 0}
    return MergedLinear(
        in_features,
        out_features,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=config.lora_dropout,
        lora_r_dropout=config.lora_r_dropout,
        enable_lora=lora.enable,
        fan_in_fan_out=True,
        bias=config.bias,
        rslora=config.lora_rslora,
        dora=config.lora_dora,
        init=config.lora_init,
        train_bias=biases[config.lora_bias],
    )


def layer_norm(config: GPT2Config) -> LayerNorm:
    train_bias = config.lora_bias == "all" and config.lora_attn_dim > 0
    return LayerNorm(config.n_embd, config.layer_norm_epsilon, config.bias, train_bias)


def _kept(x: Tensor, positions: Tensor | None) -> Tensor:
    """(B, T, C) -> (N, C) at `positions` (N,) of B T, or all of it as it is."""
    return x if positions is None else x.flatten(0, 1).index_select(0, positions)


class Attention(nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, config: GPT2Config, name: str) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.fix_dropout
        self.c_attn: nn.Module = linear(config, f"{name}.c_attn", config.n_embd, 3 * config.n_embd)
        self.c_proj: nn.Module = linear(config, f"{name}.c_proj", config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: LayerCache | None = None, kept: Tensor | None = None) -> Tensor:
        heads = self.c_attn(x).unflatten(-1, (3, self.n_head, -1))  # (B, T, 3, H, D)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        p = self.dropout if self.training else 0.0
        y = causal_attention(q, k, v, p) if cache is None else cache.attend(q, k, v, p)
        return self.c_proj(_kept(y.transpose(1, 2).flatten(2), kept))  # (B, T, C)


class MLP(nn.Module):
    """C -> 4 C -> C with GELU by its tanh formula."""

    def __init__(self, config: GPT2Config, name: str) -> None:
        super().__init__()
        self.c_fc = linear(config, f"{name}.c_fc", config.n_embd, 4 * config.n_embd)
        self.c_proj = linear(config, f"{name}.c_proj", 4 * config.n_embd, config.n_embd)
        self.activation = gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config: GPT2Config, name: str) -> None:
        super().__init__()
        self.ln_1 = layer_norm(config)
        self.attn = Attention(config, f"{name}.attn")
        self.ln_2 = layer_norm(config)
        self.mlp: nn.Module = MLP(config, f"{name}.mlp")
        self.dropout = config.fix_dropout

    def forward(self, x: Tensor, cache: LayerCache | None = None, kept: Tensor | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C), or (N, C) at the `kept` (N,) of the B T positions."""
        attended = self.attn(self.ln_1(x), cache, kept)
        x = _kept(x, kept) + dropout(attended, self.dropout, self.training)
        return x + dropout(self.mlp(self.ln_2(x)), self.dropout, self.training)


class GPT2Model(nn.Module):
    """Tokens to hidden states.

    With ``gradient_checkpointing`` a block keeps its input alone and is computed again for its gradients.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, f"h.{i}") for i in range(config.n_layer))
        self.ln_f = layer_norm(config)

    def hidden_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        caches: Sequence[LayerCache] | None = None,
        token_type_ids: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """(B, T) -> (B, T, C), or (N, C) at the `kept` (N,) of the B T positions alone.

        `position_ids` broadcasts to (B, T); default 0 .. T - 1.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.size(1), device=input_ids.device)
        x = self.wte(input_ids) + self.wpe(position_ids)
        if token_type_ids is not None:
            x = x + self.wte(token_type_ids)
        x = dropout(x, self.config.fix_dropout, self.training)
        last = len(self.h) - 1
        for i, block in enumerate(self.h):
            rest = caches[i] if caches else None, kept if i == last else None
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *rest, use_reentrant=False)
            else:
                x = block(x, *rest)
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
