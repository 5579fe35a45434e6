import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config as TheirConfig
from transformers import GPT2LMHeadModel

from lora_gpt2.errors import UserError
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.weights.pretrained import base_weights, build_base, describe_base
from lora_gpt2.weights.store import Description, save_model

CONFIG = GPT2Config(13, 16, 16, 8, 2, 2, lora_attn_dim=2)
IDS = torch.tensor([[1, 5, 9, 2, 12]])


def load_base(model, source, card, tokenizer, may_be_missing=()):
    """As `build_base` does, into a model that is there."""
    model.load_weight(base_weights(model.config, source, card, tokenizer, may_be_missing), may_be_missing)


@pytest.fixture(scope="module")
def theirs() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = TheirConfig(vocab_size=13, n_positions=16, n_embd=8, n_layer=2, n_head=2, initializer_range=0.5)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def model() -> GPT2LMModel:
    return GPT2LMModel(CONFIG).eval()


@pytest.mark.parametrize("form", ["folder", "pytorch_model.bin", "w.pt", "w.safetensors"])
def test_a_gpt2_of_transformers_gives_its_logits(tmp_path, theirs, model, form):
    source = tmp_path / form
    match form:
        case "folder":
            theirs.save_pretrained(source)
        case "w.safetensors":
            save_file({k: v for k, v in theirs.state_dict().items() if k != "lm_head.weight"}, source)
        case _:
            torch.save(theirs.state_dict(), source)
    source = tmp_path if form == "pytorch_model.bin" else source
    load_base(model, str(source), "tiny", "tokens")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS)[0], theirs(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "misshapen"])
def test_a_base_that_does_not_fit_changes_nothing(tmp_path, theirs, model, fault):
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "transformer.ln_f.weight"
    match fault:
        case "missing":
            del tensors[name]
        case "unexpected":
            tensors["transformer.h.2.ln_1.weight"] = tensors[name].clone()
        case _:
            tensors[name] = torch.ones(9)
    save_file(tensors, tmp_path / "model.safetensors")
    before = {name: value.clone() for name, value in model.weights().items()}
    with pytest.raises(UserError, match=f"does not fit model tiny: 1 {fault}"):
        load_base(model, str(tmp_path), "tiny", "tokens")
    assert all(torch.equal(value, before[name]) for name, value in model.weights().items())


class Code:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize("content", [{"a": Code()}, [1, 2]], ids=["code", "no dict"])
def test_a_pickle_of_anything_but_tensors_is_refused(tmp_path, model, content, capsys):
    torch.save(content, tmp_path / "w.bin")
    with pytest.raises(
        UserError, match=r"w.bin: (holds more than plain tensors \(\S*print\), nothing was run|holds a list)"
    ):
        load_base(model, str(tmp_path / "w.bin"), "tiny", "tokens")
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "tokenizer", "kind", "message"),
    [
        (
            GPT2Config(14, 16, 16, 8, 2, 2),
            "tokens",
            "model",
            r"was made for another tiny: it has vocab_size 14",
        ),
        (GPT2Config(13, 16, 16, 8, 2, 2), "others", "model", "was made with tokenizer others"),
        (CONFIG, "tokens", "adapter", "holds an adapter, not a base"),
    ],
)
def test_a_base_of_ours_must_be_made_for_the_run(tmp_path, model, config, tokenizer, kind, message):
    path = tmp_path / "model.safetensors"
    save_model(path, GPT2LMModel(config), Description(kind, "tiny", config.to_dict(), tokenizer))
    with pytest.raises(UserError, match=message):
        load_base(model, str(tmp_path), "tiny", "tokens")


@pytest.mark.parametrize("source", ["./nowhere", "nowhere.safetensors", "a/b/c"])
def test_a_local_base_that_is_not_there_is_named(model, source):
    with pytest.raises(UserError, match="there is no such file"):
        load_base(model, source, "tiny", "tokens")


def test_a_hub_that_does_not_answer_is_an_error_with_a_way_out(model, monkeypatch):
    import huggingface_hub as hub

    def not_cached(*_, **__):
        raise hub.errors.LocalEntryNotFoundError("not cached")

    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(hub, "hf_hub_download", not_cached)
    monkeypatch.setattr(hub, "get_hf_file_metadata", unreachable)
    message = r"base=openai-community/gpt2: .*OSError: no network; check the name and the network"
    with pytest.raises(UserError, match=message):
        load_base(model, "openai-community/gpt2", "tiny", "tokens")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_head": 4}, r"config.json: does not fit model tiny: it has n_head 2 \(here 4\)"),
        ({"n_layer": 3, "n_embd": 4}, r"it has n_embd 8 \(here 4\), n_layer 2 \(here 3\)"),
        ({"layer_norm_epsilon": 1e-6}, r"it has layer_norm_epsilon 1e-05 \(here 1e-06\)"),
        ({"n_positions": 17, "n_ctx": 17}, r"it has n_positions 16 \(here 17\)"),
        ({"bias": False}, r"it has bias True \(here False\)"),
    ],
)
def test_a_difference_from_the_card_names_both_values(tmp_path, theirs, sizes, message):
    """A head more changes no shape: only config.json tells."""
    theirs.save_pretrained(tmp_path)
    own = {"n_positions": 16, "n_ctx": 16, "n_embd": 8, "n_layer": 2, "n_head": 2, **sizes}
    model = GPT2LMModel(GPT2Config(13, **own))
    with pytest.raises(UserError, match=message):
        load_base(model, str(tmp_path), "tiny", "tokens")


@pytest.mark.parametrize(
    ("size", "value", "fault"),
    [("n_layer", 10**18, "n_layer must be at most 1,000"), ("n_layer", 3, r"12 missing \(transformer.h.2"),
     ("n_embd", 10**8, "28 misshapen"), ("n_embd", 10**18, "does not fit"),
     ("n_positions", 10**12, "1 misshapen"), ("vocab_size", 10**12, "1 misshapen"),
     ("vocab_size", 2**70, "does not fit")],
)  # fmt: skip
def test_sizes_that_the_weights_do_not_have_take_no_memory(tmp_path, theirs, size, value, fault):
    """They stand in a folder's config.json, which anyone can write."""
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), size: value}))
    with pytest.raises(UserError, match=fault):
        build_base(describe_base(str(tmp_path)).gpt2_config, str(tmp_path), "tiny", "tokens", 0)


def test_a_shorter_context_and_dropout_may_differ_from_the_base(tmp_path, theirs):
    theirs.save_pretrained(tmp_path)
    model = GPT2LMModel(GPT2Config(13, 9, 9, 8, 2, 2, fix_dropout=0.2, vocab_multiple=8)).eval()
    load_base(model, str(tmp_path), "tiny", "tokens")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS)[0], theirs(IDS).logits, atol=1e-5, rtol=1e-5)


def test_a_partial_load_happens_only_by_name(tmp_path, theirs, model):
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["transformer.wpe.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="1 missing"):
        load_base(model, str(tmp_path), "tiny", "tokens", ["transformer.wte.*"])
    before = model.transformer.wpe.weight.clone()
    load_base(model, str(tmp_path), "tiny", "tokens", ["transformer.wpe.*"])
    assert torch.equal(model.transformer.wpe.weight, before)
    assert torch.equal(model.transformer.wte.weight, theirs.transformer.wte.weight)


def test_most_blocks_may_be_missing_by_name(tmp_path):
    model = GPT2LMModel(GPT2Config(13, 16, 16, 8, 4, 2))
    held = {
        name: value + 1 for name, value in model.weights().items() if ".h." not in name or ".h.3." in name
    }
    torch.save(held, tmp_path / "last.pt")
    load_base(model, str(tmp_path / "last.pt"), "tiny", "tokens", ["transformer.h.[012].*"])
    assert all(torch.equal(model.weights()[name], value) for name, value in held.items())


def test_a_checkpoint_of_nanogpt_is_read(tmp_path, theirs, model):
    """It keeps linear layers (out, in) and, compiled, prefixes every name."""
    state = theirs.state_dict()
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    turned = {f"_orig_mod.{k}": v.T if k.endswith(linear) else v for k, v in state.items()}
    torch.save({"model": turned, "iter_num": 3}, tmp_path / "ckpt.pt")
    load_base(model, str(tmp_path / "ckpt.pt"), "tiny", "tokens")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS)[0], theirs(IDS).logits, atol=1e-5, rtol=1e-5)


def test_a_folder_of_transformers_says_its_sizes(tmp_path, theirs):
    theirs.save_pretrained(tmp_path)
    about = describe_base(str(tmp_path))
    sizes = GPT2Config(13, 16, 16, 8, 2, 2, initializer_range=0.5)
    assert (about.card, about.gpt2_config) == ("", sizes)
    torch.save(theirs.state_dict(), tmp_path / "alone.bin")
    (tmp_path / "config.json").unlink()
    assert describe_base(str(tmp_path / "alone.bin")) is None


def test_a_base_that_carries_lora_is_refused(tmp_path):
    """Not started from silently: its targets and alpha may be others."""
    config = GPT2Config(7, 8, 8, 8, 2, 2, lora_attn_dim=2)
    weights = {name: value.clone() for name, value in GPT2LMModel(config).weights().items()}
    lora = {name: value for name, value in weights.items() if "lora_" in name}
    for held, message in ((weights, "holds LoRA beside the base"), (lora, "holds LoRA alone, no base")):
        torch.save(held, tmp_path / "base.pt")
        with pytest.raises(UserError, match=message):
            load_base(GPT2LMModel(config), str(tmp_path / "base.pt"), "tiny", "")


@pytest.mark.parametrize(
    ("source", "message"),
    [("gpt2", "the hub's is openai-community/gpt2"), ("tests/nowhere", "there is no such file or folder")],
)
def test_a_mistyped_base_is_not_asked_of_the_hub(source, message):
    with pytest.raises(UserError, match=message):
        load_base(GPT2LMModel(GPT2Config(7, 8, 8, 8, 2, 2)), source, "tiny", "")


def test_an_empty_file_is_no_weights(tmp_path):
    (tmp_path / "base.pt").touch()
    with pytest.raises(UserError, match=r"base.pt: is empty; take another copy, or write it again"):
        load_base(GPT2LMModel(GPT2Config(7, 8, 8, 8, 2, 2)), str(tmp_path / "base.pt"), "tiny", "")
