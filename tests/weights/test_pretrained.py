import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config as TheirConfig
from transformers import GPT2LMHeadModel

from lora_gpt2.errors import UserError
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.weights.pretrained import load_base
from lora_gpt2.weights.store import Description, save_model

CONFIG = GPT2Config(13, 16, 16, 8, 2, 2, lora_attn_dim=2)
IDS = torch.tensor([[1, 5, 9, 2, 12]])


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
    with pytest.raises(UserError, match=r"w.bin: (could not be read as plain tensors|holds a list)"):
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
