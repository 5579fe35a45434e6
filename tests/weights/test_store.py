import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from lora_gpt2.errors import UserError
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.weights import store
from lora_gpt2.weights.store import (
    Description,
    base_hash,
    find,
    read_weights,
    save_adapter,
    save_model,
)

IDS = torch.tensor([[1, 5, 9, 2], [3, 3, 0, 7]])


@pytest.fixture
def model() -> GPT2LMModel:
    """A small model whose update is not zero."""
    torch.manual_seed(0)
    model = GPT2LMModel(GPT2Config(11, 16, 16, 8, 2, 2, lora_attn_dim=2)).eval()
    for layer in model.lora_layers():
        torch.nn.init.normal_(layer.lora_B)
    return model


def description(model: GPT2LMModel, kind: str) -> Description:
    return Description(
        kind, "tiny", model.config.to_dict(), "tokens", base_hash(model), "there", seed=3, notes={"a": 1}
    )


def test_a_model_and_an_adapter_come_back_bit_for_bit(tmp_path, model):
    twin = GPT2LMModel(model.config).eval()
    for kind in ("model", "adapter"):
        save = save_adapter if kind == "adapter" else save_model
        save(tmp_path / kind, model, description(model, kind))
        found, tensors = read_weights(tmp_path / kind)
        assert found == replace(description(model, kind), sha256=found.sha256)
        assert re.fullmatch("[0-9a-f]{64}", found.sha256)
        assert all(("lora_" in name) == (kind == "adapter") for name in tensors)
        twin.load_weight(tensors)
    assert torch.equal(model(IDS)[0], twin(IDS)[0])


def test_the_same_weights_are_the_same_bytes(tmp_path, model):
    about = replace(description(model, "model"), card='tiny ü "\\')
    for number in range(20):  # metadata in any order would be in another one by then
        save_model(tmp_path / f"{number}.safetensors", model, about)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    found, _ = read_weights(tmp_path / "0.safetensors")
    assert found == replace(about, sha256=found.sha256) != about


def test_what_an_older_writer_did_not_say_is_no_damage(tmp_path, model, monkeypatch):
    def older(about):
        return {name: value for name, value in vars(about).items() if name != "base_may_lack"}

    with monkeypatch.context() as patch:
        patch.setattr(store, "asdict", older)
        save_model(tmp_path / "a", model, description(model, "model"))
    assert read_weights(tmp_path / "a")[0].base_may_lack == []


def test_the_hash_sees_one_bit_of_the_base_and_nothing_of_the_update(model):
    before = base_hash(model)
    torch.nn.init.normal_(model.lora_layers()[0].lora_A)
    assert base_hash(model) == before
    bits = model.transformer.ln_f.bias.data.view(torch.int32)
    bits[0] ^= 1
    assert base_hash(model) != before


@pytest.mark.parametrize("kept", [0, 7, 500])
def test_a_file_cut_short_is_refused(tmp_path, model, kept):
    path = tmp_path / "model.safetensors"
    save_model(path, model, description(model, "model"))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model.safetensors: is not a whole safetensors file"):
        read_weights(path)


@pytest.mark.parametrize("at", [-1, -3000])
def test_a_damaged_file_is_refused(tmp_path, model, at):
    path = tmp_path / "model.safetensors"
    save_model(path, model, description(model, "model"))
    held = bytearray(path.read_bytes())
    held[at] ^= 1
    path.write_bytes(held)
    with pytest.raises(UserError, match=r"model.safetensors: is damaged: it is not what was written"):
        read_weights(path)


def test_a_damaged_description_is_refused(tmp_path, model):
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, model, description(model, "adapter"))
    held = path.read_bytes()
    changed = re.sub(rb'(lora_attn_alpha\\": )\d', rb"\g<1>9", held)
    assert changed != held
    path.write_bytes(changed)
    with pytest.raises(UserError, match=r"adapter.safetensors: is damaged: it is not what was written"):
        read_weights(path)


ABOUT = {"format": 1, "kind": "adapter", "card": "tiny", "config": GPT2Config(5).to_dict(), "tokenizer": ""}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": 99}, "has format 99, this version reads 1"),
        ({"format": 1, "kind": "adapter"}, "has a description that cannot be read"),
        ({"format": 1, "colour": "red"}, "has a description that cannot be read"),
        *(
            ({**ABOUT, **wrong}, "has a description that cannot be read")
            for wrong in (
                {"config": {}},
                {"base_source": 5},
                {"seed": "x"},
                {"seed": -1},
                {"card": None},
                {"base_may_lack": 1},
                {"notes": 1},
            )
        ),
        ([1], "has a description that cannot be read"),
        ("[" * 100_000, "is JSON nested too deep"),
    ],
)
def test_another_description_is_refused(tmp_path, metadata, message):
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    save_file({"a": torch.zeros(1)}, tmp_path / "x", {"lora-gpt2": text})
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / "x")


def test_a_failed_save_leaves_the_old_file(tmp_path, model, monkeypatch):
    path = tmp_path / "adapter.safetensors"
    path.write_text("old")

    def full_disk(tensors, name, metadata):
        name.write_text("half")
        raise OSError("no space left on device")

    monkeypatch.setattr(store, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_adapter(path, model, description(model, "adapter"))
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_the_folder_of_several_adapters_names_theirs(tmp_path):
    for rank in "12":
        (tmp_path / f"lora.rank-{rank}").mkdir()
        (tmp_path / f"lora.rank-{rank}" / "adapter.safetensors").touch()
    with pytest.raises(UserError, match=r"give one of \S+/lora.rank-1, \S+/lora.rank-2$"):
        find(tmp_path, "adapter.safetensors")


def test_the_folder_of_several_runs_names_theirs(tmp_path):
    (tmp_path / "0" / "checkpoints").mkdir(parents=True)
    (tmp_path / "0" / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(UserError, match=r"holds no checkpoints/last.ckpt; give one of \S+/0$"):
        find(tmp_path, "checkpoints/last.ckpt")


def test_a_folder_without_the_file_says_what_it_lacks(tmp_path):
    with pytest.raises(
        UserError, match=r"holds no adapter.safetensors; give the folder of a run that trained"
    ):
        find(tmp_path, "adapter.safetensors")
