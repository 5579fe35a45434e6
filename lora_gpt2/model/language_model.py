"""GPT-2 with its tied head: the documented `GPT2LMModel`.  B rows, T tokens, C = n_embd, V vocabulary."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_gpt2.model.activation import compiled_gelu
from lora_gpt2.model.cache import LayerCache, PackedRows
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.keys import TOKEN_TABLE, canonical, check_keys, is_lora
from lora_gpt2.model.lora import LayerNorm, MergedLinear
from lora_gpt2.model.loss import (
    CompletionReport,
    batch_loss,
    completion_report,
    head_loss,
    row_accuracy,
    token_loss,
)
from lora_gpt2.model.products import Prepacked
from lora_gpt2.model.transformer import MLP, Block, GPT2Model

_FEW_SHAPES = 16
"""Targets are filled up to a multiple of this: every new number of them costs a library time and memory."""


class Targets(NamedTuple):
    """What a batch of B T tokens is asked for, filled up to a number that comes often."""

    positions: Tensor
    """(N,) places in the flattened batch."""
    labels: Tensor
    """(N,) the tokens that follow there."""
    weights: Tensor
    """(N,) in float32, 0 for what was filled up."""

    @classmethod
    def at(cls, positions: Tensor, labels: Tensor) -> "Targets":
        spare = 0, -len(labels) % _FEW_SHAPES
        weights = F.pad(torch.ones(len(labels), dtype=torch.float32, device=labels.device), spare)
        return cls(F.pad(positions, spare), F.pad(labels, spare), weights)

    @classmethod
    def of(cls, labels: Tensor, mask: Tensor) -> "Targets":
        """Of `labels` (B, T) where `mask` (B, T) is true."""
        positions = mask.flatten().nonzero().squeeze(1)
        return cls.at(positions, labels.flatten()[positions])


class GPT2LMHead(nn.Module):
    """Hidden states (B, T, C) to logits (B, T, V) by the token embedding's own weights.

    Rows that pad the table (`vocab_multiple`) are computed and cut off: never predicted, never scored.
    """

    def __init__(self, model_embeddings_weights: Tensor, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.decoder: nn.Module = nn.Linear(
            config.n_embd, config.padded_vocab_size, bias=False, device="meta"
        )
        self.prepacked: Prepacked | None = None
        self.set_embeddings_weights(model_embeddings_weights)

    def set_embeddings_weights(self, model_embeddings_weights: Tensor) -> None:
        self.decoder.weight = cast(nn.Parameter, model_embeddings_weights)

    @property
    def weight(self) -> Tensor:
        """(V, C)"""
        weight, size = cast(Tensor, self.decoder.weight), self.config.vocab_size
        return weight if len(weight) == size else weight[:size]

    def loss(self, hidden: Tensor, targets: Targets, label_smooth: float = 0.0) -> Tensor:
        """The mean loss of N `targets` by their hidden states (N, C): see `head_loss`."""
        _, labels, weights = targets
        return head_loss(hidden, self.weight, labels, weights, label_smooth, self.prepacked)

    def forward(self, hidden_state: Tensor) -> Tensor:
        return self.decoder(hidden_state)[..., : self.config.vocab_size]


class GPT2LMModel(nn.Module):
    """A GPT-2 language model whose attention may carry LoRA.

    Fresh weights follow GPT-2: normal with `initializer_range`, over sqrt(2 n_layer) where a projection
    feeds the residual stream; biases 0, LayerNorms 1 and 0. The base is drawn before the update, so one seed
    gives one base whatever the rank. `sharded` tells that blocks are whole only while they run.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config, self.sharded = config, False
        with torch.random.fork_rng(devices=[]):  # constructors draw values that init_weights replaces
            self.transformer = GPT2Model(config)
        self.lm_head = GPT2LMHead(self.transformer.wte.weight, config)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws every weight anew from torch's global generator."""
        std = self.config.initializer_range
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding | MergedLinear):
                rows = self.config.vocab_size if name.endswith("wte") else None
                shrink = math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj") else 1.0
                nn.init.normal_(module.weight[:rows], std=std / shrink)
            if isinstance(module, MergedLinear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.transformer.wte.weight[self.config.vocab_size :] = 0
        for layer in self.lora_layers():
            layer.reset_lora()

    def set_tied(self) -> None:
        """Makes head and token embedding one tensor again."""
        self.lm_head.set_embeddings_weights(self.transformer.wte.weight)

    def lora_layers(self) -> list[MergedLinear | LayerNorm]:
        """The layers that carry an update, first block first; empty at rank 0."""
        layers = [module for module in self.modules() if isinstance(module, MergedLinear | LayerNorm)]
        return [layer for layer in layers if layer.adapted]

    def train_only_lora(self, dtype: torch.dtype | None = None) -> None:
        """Freezes everything but the LoRA parameters, and stores it in `dtype`, that of the products.

        The update keeps its type. bfloat16 loses what the weights had beyond it.
        """
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_lora(name))
            if dtype is not None and not is_lora(name):
                parameter.data = parameter.data.to(dtype)

    def prepack(self) -> None:
        """Lays frozen matrices out for training here, until `unpack`: see `MergedLinear.prepack`."""
        if self.sharded:
            return
        for module in self.modules():
            if isinstance(module, MergedLinear):
                module.prepack()
        weight = self.lm_head.weight
        if self.lm_head.prepacked is None and Prepacked.fits(weight):
            self.lm_head.prepacked = Prepacked(weight)

    def compile_blocks(self) -> None:
        """Compiles what gets faster by it: on a CPU the activation, elsewhere whole blocks."""
        for block in self.transformer.h:
            if self.transformer.wte.weight.is_cpu:
                cast(MLP, cast(Block, block).mlp).activation = compiled_gelu
            else:
                block.compile(dynamic=True)

    def unpack(self) -> None:
        """Puts every weight back, bit for bit."""
        self.lm_head.prepacked = None
        for module in self.modules():
            if isinstance(module, MergedLinear):
                module.unpack()

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters, the tied head once; by default without the position table."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return total - self.transformer.wpe.weight.numel() if non_embedding else total

    def crop_block_size(self, block_size: int) -> None:
        """Shortens the longest input to `block_size` tokens. Raises ValueError when it is longer already."""
        if not 1 <= block_size <= self.config.n_positions:
            limits = f"from 1 to {self.config.n_positions}"
            raise ValueError(f"block_size must be {limits}, the positions of the model, not {block_size}")
        shorter = {"n_positions": block_size, "n_ctx": min(self.config.n_ctx, block_size)}
        config = GPT2Config.from_dict({**self.config.to_dict(), **shorter})  # the old may be another's too
        self.config = self.transformer.config = self.lm_head.config = config
        wpe = self.transformer.wpe
        wpe.weight = nn.Parameter(wpe.weight[:block_size].detach().clone(), wpe.weight.requires_grad)
        wpe.num_embeddings = block_size

    def share_base(self, other: "GPT2LMModel") -> None:
        """Takes the base weights of `other`, of the same sizes, as they are: one copy in memory for both."""
        theirs = dict(other.named_modules())
        for place, module in self.named_modules():
            for name in [name for name in module._parameters if not is_lora(name)]:
                setattr(module, name, getattr(theirs[place], name))
            if isinstance(module, MergedLinear | GPT2LMHead):
                module.prepacked = cast(MergedLinear | GPT2LMHead, theirs[place]).prepacked

    def merge(self) -> None:
        for layer in self.lora_layers():
            layer.merge()

    def unmerge(self) -> None:
        for layer in self.lora_layers():
            layer.unmerge()

    def forward(
        self,
        input_ids: Tensor,
        lm_labels: Tensor | None = None,
        lm_mask: Tensor | None = None,
        past: Sequence[Tensor] | None = None,
        len_past: Tensor | None = None,
        label_smooth: float = 0.0,
        is_report_accuracy: bool = False,
    ) -> tuple[Any, ...]:
        """The published implementation's call.

        `input_ids`, `lm_labels`, `lm_mask` are (B, T). Returns

        * (logits (B, T, V), presents) without labels; `past` and `len_past` as in `GPT2Model.forward`;
        * (logits, loss) with labels: label-smoothed, averaged over `lm_mask` (default: everywhere);
        * (logits, loss, t1_acc (B,), all_acc (B,)) with `is_report_accuracy`.
        """
        hidden, presents = self.transformer(input_ids, past=past, len_past=len_past)
        logits = self.lm_head(hidden)
        if lm_labels is None:
            return logits, presents
        mask = torch.ones_like(lm_labels, dtype=torch.float) if lm_mask is None else lm_mask.float()
        losses = token_loss(logits.flatten(0, 1), lm_labels.flatten(), label_smooth)
        loss = batch_loss(losses, mask.flatten())
        if not is_report_accuracy:
            return logits, loss
        accuracy = row_accuracy(logits.argmax(dim=-1) == lm_labels, mask)
        return logits, loss, accuracy.first, accuracy.all

    def completion_loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        mask: Tensor,
        label_smooth: float = 0.0,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """The loss of `forward` on (B, T) each, with the head run on the target positions alone.

        `position_ids` (B, T) are given where rows are packed, and start again at 0 with each.
        """
        packed = None if position_ids is None else PackedRows(position_ids)
        return self.loss_at(input_ids, Targets.of(labels, mask), label_smooth, position_ids, packed)

    def loss_at(
        self,
        input_ids: Tensor,
        targets: Targets,
        label_smooth: float = 0.0,
        position_ids: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """The mean loss of `targets` after `input_ids` (B, T); every layer's attention reads by `cache`."""
        caches = None if cache is None else [cache] * self.config.n_layer
        hidden = self.transformer.hidden_states(input_ids, position_ids, caches, kept=targets.positions)
        return self.lm_head.loss(hidden, targets, label_smooth)

    def completion_report(self, input_ids: Tensor, labels: Tensor, mask: Tensor) -> CompletionReport:
        """Plain loss and accuracies of a batch, (B, T) each; `mask` is boolean."""
        positions = mask.flatten().nonzero().squeeze(1)
        logits = self.lm_head(self.transformer.hidden_states(input_ids, kept=positions))  # (N, V)
        return completion_report(logits, labels, mask)

    def load_weight(self, state_dict: Mapping[str, Any], may_be_missing: Sequence[str] = ()) -> None:
        """Loads a base, an update, or both, in any of the published layouts (see `lora_gpt2.model.keys`).

        Each of the two must be whole: all base weights or none, all of LoRA or none; `may_be_missing` names
        weights, with ``*`` and ``?``, that stay as they are when they are not given. After a base alone
        the update starts anew from it where it depends on it (PiSSA, OLoRA, DoRA).
        Raises ValueError listing what is missing, unexpected or misshapen; nothing is loaded then.
        """
        assert not any(layer.merged for layer in self.lora_layers()), "unmerge before loading"
        tensors = canonical(state_dict)
        own = self.weights()
        embedding = tensors.get(TOKEN_TABLE)
        if embedding is not None and len(embedding) == self.config.padded_vocab_size:
            tensors[TOKEN_TABLE] = embedding[: self.config.vocab_size]
        check_keys(own, tensors, may_be_missing)
        with torch.no_grad():
            for name, value in tensors.items():
                own[name].copy_(value)
        if not any(is_lora(name) for name in tensors):
            for layer in self.lora_layers():
                layer.start_from_base()

    def weights(self) -> dict[str, Tensor]:
        """Every weight under its name, the tied head's once, the token table without its padding.

        These are the tensors themselves, not copies.
        """
        assert self.lm_head.prepacked is None, "the base is prepacked: unpack() first"
        weights = {k: v for k, v in self.state_dict().items() if not k.startswith("lm_head.")}
        return {**weights, TOKEN_TABLE: weights[TOKEN_TABLE][: self.config.vocab_size]}
