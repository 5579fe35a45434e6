"""The programs that are compared, each opened on the same weights with the same settings."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Contexts = list[list[int]]
Decode = Callable[[Contexts], list[list[int]]]


def ours(options: argparse.Namespace, dtype: str, batch: int, model: Path, folder: Path) -> Decode:
    from lora_gpt2.decoding.config import DecodingSettings
    from lora_gpt2.decoding.decoder import decode
    from lora_gpt2.model.inference import prepare_for_decoding
    from lora_gpt2.model.settings import Precision
    from lora_gpt2.weights.pretrained import build_base, describe_base

    settings = DecodingSettings(
        beam_size=options.beams,
        eval_len=options.eval_len,
        no_repeat_ngram_size=options.ngram,
        length_penalty=options.length_penalty,
        batch_size=batch,
    )
    about = describe_base(str(model))
    assert about is not None
    loaded = build_base(about.gpt2_config, str(model), about.card, about.tokenizer, 0).to(options.device)
    loaded = prepare_for_decoding(loaded, Precision(dtype))
    ends = options.ends or [loaded.config.vocab_size]

    def run(contexts: Contexts) -> list[list[int]]:
        order = sorted(range(len(contexts)), key=lambda i: -len(contexts[i]))
        found = decode(loaded, [contexts[i] for i in order], settings, ends)
        outputs = {i: best[0].tokens for i, best in zip(order, found, strict=True)}
        return [outputs[i] for i in range(len(contexts))]

    return run


def transformers(
    options: argparse.Namespace, dtype: str, batch: int, model: Path, folder: Path, **more: Any
) -> Decode:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = (
        AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).to(options.device).eval()
    )
    loaded.generation_config.eos_token_id = None
    pad = options.ends[0] if options.ends else 0

    def run(contexts: Contexts) -> list[list[int]]:
        order = sorted(range(len(contexts)), key=lambda i: -len(contexts[i]))
        outputs: list[list[int]] = [[] for _ in contexts]
        for first in range(0, len(order), batch):
            numbers = order[first : first + batch]
            longest = len(contexts[numbers[0]])
            ids = torch.tensor([[pad] * (longest - len(contexts[i])) + contexts[i] for i in numbers])
            mask = torch.tensor(
                [[0] * (longest - len(contexts[i])) + [1] * len(contexts[i]) for i in numbers]
            )
            found = loaded.generate(
                ids.to(options.device),
                attention_mask=mask.to(options.device),
                num_beams=options.beams,
                max_new_tokens=options.eval_len,
                no_repeat_ngram_size=options.ngram,
                length_penalty=options.length_penalty,
                do_sample=False,
                pad_token_id=pad,
                eos_token_id=options.ends or None,
                **more,
            )
            for i, tokens in zip(numbers, found[:, longest:].tolist(), strict=True):
                outputs[i] = cut(tokens, options.ends)
        return outputs

    return run


def transformers_static(*arguments: Any) -> Decode:
    return transformers(*arguments, cache_implementation="static")


def ctranslate2(options: argparse.Namespace, dtype: str, batch: int, model: Path, folder: Path) -> Decode:
    from ctranslate2 import Generator

    generator = Generator(str(folder / "ctranslate2"), device=options.device, compute_type=dtype)
    names = json.loads((folder / "ctranslate2" / "vocabulary.json").read_text())

    def run(contexts: Contexts) -> list[list[int]]:
        found = generator.generate_batch(
            [[names[token] for token in context] for context in contexts],
            max_batch_size=batch,
            beam_size=options.beams,
            max_length=options.eval_len,
            min_length=0 if options.ends else options.eval_len,
            no_repeat_ngram_size=options.ngram,
            length_penalty=options.length_penalty,
            include_prompt_in_result=False,
            end_token=options.ends or None,
        )
        return [result.sequences_ids[0] for result in found]

    return run


OPENERS: dict[str, Callable[..., Decode]] = {
    "ours": ours,
    "transformers": transformers,
    "transformers-static": transformers_static,
    "ctranslate2": ctranslate2,
}


def cut(tokens: list[int], ends: list[int]) -> list[int]:
    """Up to the first end token, itself included."""
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))]
