"""GPT2Config: the documented defaults, checks at construction, and the command line's two groups."""

import inspect
import json
from dataclasses import fields

import pytest

from lora_gpt2 import GPT2Config
from lora_gpt2.model.config import LoraBias, LoraInit, Target
from lora_gpt2.model.settings import LoraSettings, ModelSettings, gpt2_config


def test_defaults_are_the_documented_ones():
    config = GPT2Config()
    assert (config.vocab_size, config.n_positions, config.n_ctx) == (50257, 1024, 1024)
    assert (config.n_embd, config.n_layer, config.n_head) == (768, 12, 12)
    assert (config.layer_norm_epsilon, config.initializer_range) == (1e-5, 0.02)
    assert (config.lora_attn_dim, config.lora_attn_alpha) == (0, 128)
    assert (config.lora_dropout, config.lora_r_dropout, config.fix_dropout) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_embd": 10, "n_head": 3}, "n_embd 10 is not divisible by n_head 3"),
        ({"lora_attn_dim": -1}, "rank must be a whole number of at least 0, not -1"),
        ({"lora_attn_dim": 2.5}, "rank must be a whole number of at least 0, not 2.5"),
        ({"lora_targets": ["q", "o"]}, "among q, k, v, c_attn, c_proj, mlp_c_fc, mlp_c_proj, not o"),
        ({"lora_targets": []}, "different ones of q, k, v, c_attn"),
        ({"n_ctx": 2048}, "n_ctx 2048 is larger than n_positions 1024"),
        ({"n_layer": 0}, "n_layer must be a whole number of at least 1, not 0"),
        ({"fix_dropout": 1.0}, "fix_dropout must be in"),
        ({"lora_attn_alpha": 0}, "alpha must be above 0"),
        ({"lora_targets": ["q", "c_attn"]}, "c_attn adapts q, k and v as one"),
        ({"lora_init": "svd"}, "LoRA init must be one of kaiming, pissa, olora, not svd"),
        ({"lora_bias": "some"}, "LoRA bias must be one of none, lora_only, all, not some"),
        ({"lora_bias": "all", "bias": False}, "needs a model with biases"),
        ({"vocab_multiple": 0}, "vocab_multiple must be at least 1, not 0"),
        ({"lora_attn_dim": 2, "lora_rank_pattern": {"h.12.*": 4}}, r"the pattern h.12.\* fits no layer"),
        ({"lora_rank_pattern": {"h.1.*": 2.5}}, "ranks must be whole numbers of at least 0"),
        (
            {"lora_attn_dim": 2, "lora_rank_pattern": {"*.mlp.*": 4}},
            r"fits no layer that is adapted: h.0.attn.c_attn",
        ),
        ({"lora_attn_dim": 2, "lora_rank_pattern": {"*": 0}}, "rank is 0 in every layer"),
        ({"lora_attn_dim": 800, "lora_init": "pissa"}, "pissa needs ranks of at most n_embd 768, not 800"),
        ({"lora_rank_pattern": {"h.1.*": -4}}, "ranks must be whole numbers of at least 0"),
        ({"lora_alpha_pattern": {"h.1.*": 0}}, "alphas must be above 0"),
    ],
)
def test_what_does_not_fit_is_refused_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        GPT2Config(**arguments)


def test_all_faults_are_named_at_once():
    with pytest.raises(ValueError, match=r"n_layer.*; .*dropout"):
        GPT2Config(n_layer=0, lora_dropout=2)


def test_a_json_file_gives_the_settings(tmp_path):
    config = GPT2Config(100, n_embd=32, n_head=4, lora_attn_dim=2, lora_targets=["k"])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert GPT2Config(str(path)) == config == GPT2Config.from_dict(config.to_dict())


def test_transformers_json_is_understood(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(
            {
                "model_type": "gpt2",
                "vocab_size": 10,
                "n_positions": 64,
                "n_embd": 16,
                "n_head": 2,
                "attn_pdrop": 0.1,
                "vocab_multiple": 10**12,
                "lora_attn_dim": 4,
            }
        )
    )
    config = GPT2Config(path)
    assert (config.padded_vocab_size, config.lora_attn_dim) == (10, 0), "these are ours"
    assert (config.vocab_size, config.n_positions, config.n_ctx, config.n_embd) == (10, 64, 64, 16)


def test_an_unknown_key_in_json_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"vocab_size": 10, "n_heads": 2}))
    with pytest.raises(ValueError, match="no such settings: n_heads"):
        GPT2Config(path)


def test_every_field_of_the_groups_reaches_the_config_and_none_is_left_over():
    model = ModelSettings("card", 64, 32, 16, 3, 2, 1e-3, 0.5, 0.25, False, 48)
    patterns = {"h.0.*": 11}, {"h.1.*": 12.0}
    lora = LoraSettings(
        7, 9.0, 0.125, 0.375, [Target.k], *patterns, True, True, LoraInit.pissa, LoraBias.none
    )
    values = gpt2_config(model, lora, 50).to_dict()
    given = [getattr(model, f.name) for f in fields(model) if f.name != "name"]
    given += [lora.rank, lora.alpha, lora.dropout, lora.rank_dropout, ["k"], *patterns, True, True]
    given += ["pissa", "none"]
    assert sorted(map(str, values.values())) == sorted(map(str, [*given, 32]))  # n_positions is n_ctx too
    assert len(values) == len(inspect.signature(GPT2Config).parameters)


def test_a_card_vocabulary_smaller_than_the_tokenizers_is_refused():
    with pytest.raises(ValueError, match="40 is smaller than the tokenizer's 50"):
        gpt2_config(ModelSettings("card", 40), LoraSettings(), 50)


def test_patterns_choose_rank_and_alpha_by_layer_and_the_first_that_fits_counts():
    config = GPT2Config(
        n_layer=2,
        lora_attn_dim=4,
        lora_attn_alpha=8,
        lora_targets=["q", "mlp_c_fc"],
        lora_rank_pattern={"h.0.attn.*": 0, "h.0.*": 2, "*.mlp.c_fc": 16},
        lora_alpha_pattern={"*.attn.c_attn": 1},
    )
    assert config.lora_layers == {
        "h.0.mlp.c_fc": (2, 8, [True]),
        "h.1.attn.c_attn": (4, 1, [True, False, False]),
        "h.1.mlp.c_fc": (16, 8, [True]),
    }
    assert GPT2Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(("multiple", "rows"), [(1, 50257), (64, 50304), (50257, 50257)])
def test_the_token_table_is_padded_to_a_multiple(multiple, rows):
    assert GPT2Config(vocab_multiple=multiple).padded_vocab_size == rows
