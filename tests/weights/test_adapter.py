import re

import pytest
import torch

from lora_gpt2.errors import UserError
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.weights.adapter import load_adapter, open_adapter
from lora_gpt2.weights.store import (
    ADAPTER_FILE,
    Description,
    base_hash,
    save_adapter,
    save_model,
    write_weights,
)

IDS = torch.tensor([[1, 5, 9, 2]])


def build(seed: int = 0, **lora) -> GPT2LMModel:
    torch.manual_seed(seed)
    return GPT2LMModel(GPT2Config(11, 16, 16, 8, 2, 2, **{"lora_attn_dim": 2, **lora})).eval()


@pytest.fixture
def trained(tmp_path) -> GPT2LMModel:
    """A model whose update is not zero, saved as an adapter."""
    model = build()
    for layer in model.lora_layers():
        torch.nn.init.normal_(layer.lora_B)
    values = Description("adapter", "tiny", model.config.to_dict(), "tokens", base_hash(model))
    save_adapter(tmp_path / ADAPTER_FILE, model, values)
    return model


def test_an_adapter_over_its_base_gives_the_trained_logits_merged_or_not(tmp_path, trained):
    model = build()
    assert not torch.equal(model(IDS)[0], trained(IDS)[0])
    load_adapter(model, tmp_path)
    assert torch.equal(model(IDS)[0], trained(IDS)[0])
    model.merge()
    torch.testing.assert_close(model(IDS)[0], trained(IDS)[0])


def test_an_adapter_that_asks_for_any_memory_is_refused_before_it_is_taken(tmp_path, trained):
    """Its base is drawn at random: of the sizes that it names."""
    assert torch.equal(open_adapter(tmp_path)[0](IDS)[0], trained(IDS)[0])
    for sizes, told in {
        (11, 16, 16, 8, 3, 2): "does not fit what it says of itself: 2 missing",
        (11, 16, 16, 2**20, 2, 2): "does not fit what it says of itself: 4 misshapen",
        (2**40, 16, 16, 8, 2, 2): r"model tiny: takes 35184.4 GB, this machine has",
    }.items():
        config = GPT2Config(*sizes, lora_attn_dim=2)
        about = Description("adapter", "tiny", config.to_dict(), "tokens", "0")
        tensors = {name: value for name, value in trained.weights().items() if "lora_" in name}
        write_weights(tmp_path / ADAPTER_FILE, tensors, about)
        with pytest.raises(UserError, match=told):
            open_adapter(tmp_path)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"n_layer": 10**9}, r"cannot be read \(n_layer must be at most 1,000, not 1,000,000,000\)"),
        ({"n_embd": 2**33}, "does not fit what it says of itself"),
        ({"vocab_size": 2**70}, "does not fit what it says of itself"),
        ({"lora_attn_dim": 2**62}, "does not fit what it says of itself"),
        ({"of_a_later_version": 1}, "cannot be read .* 'of_a_later_version'"),
    ],
    ids=str,
)
def test_an_adapter_of_sizes_that_cannot_be_is_told(tmp_path, trained, changed, told):
    path, tensors = tmp_path / ADAPTER_FILE, {n: v for n, v in trained.weights().items() if "lora_" in n}
    config = {**trained.config.to_dict(), **changed}
    write_weights(path, tensors, Description("adapter", "tiny", config, "tokens", "0"))
    with pytest.raises(UserError, match=told):
        open_adapter(tmp_path)


def test_an_adapter_of_some_blocks_is_opened(tmp_path):
    """Those that its pattern leaves out may be the first or the last."""
    patterns = {"h.0.*": 0, "h.1.*": 0, "h.7.*": 0}
    config = GPT2Config(11, 16, 16, 8, 8, 2, lora_attn_dim=2, lora_rank_pattern=patterns)
    torch.manual_seed(0)
    model = GPT2LMModel(config).eval()
    about = Description("adapter", "tiny", config.to_dict(), "tokens", base_hash(model))
    save_adapter(tmp_path / ADAPTER_FILE, model, about)
    assert torch.equal(open_adapter(tmp_path)[0](IDS)[0], model(IDS)[0])


def test_a_damaged_adapter_is_told_once(tmp_path, trained):
    held = bytearray((tmp_path / ADAPTER_FILE).read_bytes())
    held[-1] ^= 1
    (tmp_path / ADAPTER_FILE).write_bytes(held)
    with pytest.raises(UserError, match=r"safetensors: is damaged: it is not what was written; take another"):
        load_adapter(build(), tmp_path)


def test_an_adapter_over_another_base_is_refused(tmp_path, trained):
    with pytest.raises(UserError, match=r"was trained on another base .* random weights, seed 0"):
        load_adapter(build(seed=1), tmp_path)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"lora_attn_dim": 3}, "lora_attn_dim 2 (here 3)"),
        ({"lora_attn_alpha": 16}, "lora_attn_alpha 128 (here 16)"),
        ({"lora_targets": ("q", "k", "v")}, "lora_targets ['q', 'v'] (here ['q', 'k', 'v'])"),
        ({"lora_attn_dim": 0}, "lora_attn_dim 2 (here 0)"),
        ({"lora_dora": True}, "lora_dora False (here True)"),
    ],
)
def test_other_lora_settings_are_refused(tmp_path, trained, lora, message):
    model = build()
    other = GPT2LMModel(GPT2Config(11, 16, 16, 8, 2, 2, **{"lora_attn_dim": 2, **lora}))
    other.load_weight({k: v for k, v in model.weights().items() if "lora_" not in k})
    with pytest.raises(UserError, match=re.escape(f"was trained with {message}")):
        load_adapter(other, tmp_path)


def test_a_model_is_no_adapter(tmp_path, trained):
    values = Description("model", "tiny", trained.config.to_dict(), "tokens")
    save_model(tmp_path / ADAPTER_FILE, trained, values)
    with pytest.raises(UserError, match="holds no adapter"):
        load_adapter(build(), tmp_path)
