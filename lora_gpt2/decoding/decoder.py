"""Beam search on a GPT-2: the contexts run once, their keys and values are shared by all beams."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora_gpt2.decoding.beam import Hypothesis, beam_search
from lora_gpt2.decoding.config import DecodingSettings
from lora_gpt2.model.cache import PrefixCache
from lora_gpt2.model.language_model import GPT2LMModel


@torch.inference_mode()
def decode(
    model: GPT2LMModel, contexts: Sequence[Sequence[int]], settings: DecodingSettings, end_tokens: list[int]
) -> list[Hypothesis]:
    """The best output of each context, whatever else is in the batch. `model` is in eval mode.

    Raises ValueError when a context and `eval_len` together exceed the model's positions.
    """
    longest = max(map(len, contexts))
    if longest + settings.eval_len > model.config.n_ctx:
        what = f"a context of {longest} tokens and eval_len {settings.eval_len}"
        raise ValueError(f"{what} exceed the model's {model.config.n_ctx} positions")
    device = model.transformer.wte.weight.device
    lengths = torch.tensor([len(context) for context in contexts], device=device)
    ids = pad_sequence([torch.tensor(context, device=device) for context in contexts], batch_first=True)
    caches = [PrefixCache(lengths, settings.eval_len) for _ in range(model.config.n_layer)]
    hidden = model.transformer.hidden_states(ids, caches=caches)  # (Q, S, C)
    last = hidden[torch.arange(len(contexts), device=device), lengths - 1]

    def step(queries: Tensor, parents: Tensor, tokens: Tensor) -> Tensor:
        for cache in caches:
            cache.reorder(queries, parents)
        positions = (caches[0].lengths + caches[0].used).repeat_interleave(tokens.size(1))
        hidden = model.transformer.hidden_states(tokens.view(-1, 1), positions[:, None], caches)
        return model.lm_head(hidden[:, 0])

    return beam_search(model.lm_head(last), step, settings, end_tokens)
