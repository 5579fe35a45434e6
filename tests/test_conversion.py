"""Adapters on their way out, into the programs they are meant for, and back."""

import json
import re
import shutil
from pathlib import Path

import ctranslate2
import numpy
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_gpt2 import GPT2LMModel, conversion, runs
from lora_gpt2.data.encode import encoded
from lora_gpt2.data.tokenizer import load_tokenizer
from lora_gpt2.errors import UserError
from lora_gpt2.model.keys import is_lora
from lora_gpt2.weights.adapter import describe_adapter, open_adapter
from tests.conftest import generate, settings_of, train

IDS = torch.randint(0, 280, (3, 9), generator=torch.Generator().manual_seed(1))
TEXTS = ["red cat !", "  two\n\nlines", "naïve café 🦊", "<|endoftext|>"]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        out = model(IDS)
    return out.logits if hasattr(out, "logits") else out[0]


def adapted(run: Path, name: str = "adapter") -> GPT2LMModel:
    return open_adapter(run / name)[0]


@pytest.fixture(scope="module")
def merged(tmp_path_factory, run) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("merged")
    return folder, conversion.merge(str(run / "adapter"), None, folder, torch.float32)


def test_a_merged_folder_is_a_model_of_transformers(run, merged):
    folder, differences = merged
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(logits(theirs), logits(adapted(run)), atol=1e-5, rtol=1e-5)
    assert 0 < differences["float32"] < 1e-4


def test_its_tokenizer_gives_our_ids_and_texts(run, merged):
    ours, theirs = (
        load_tokenizer(str(run / "adapter" / "tokenizer")),
        AutoTokenizer.from_pretrained(merged[0]),
    )
    for text in TEXTS[:-1]:
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == ours.end_token
    assert len(theirs) == ours.vocab_size


def test_greedy_tokens_are_the_same_for_64_steps(run, merged, tmp_path):
    theirs = AutoModelForCausalLM.from_pretrained(merged[0]).eval()
    model, ids = adapted(run), IDS[:, :1]
    for _ in range(63):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids)[0][:, -1:].argmax(dim=-1)), dim=1)
    made = theirs.generate(IDS[:, :1], max_new_tokens=63, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(made, ids)


def test_ctranslate2_converts_it(tmp_path, run, merged):
    ctranslate2.converters.TransformersConverter(str(merged[0])).convert(str(tmp_path / "ct2"))
    bpe = load_tokenizer(str(run / "adapter" / "tokenizer"))
    entries = {number: entry for entry, number in bpe.vocabulary.items()}
    generator = ctranslate2.Generator(str(tmp_path / "ct2"))
    tokens = [[entries[i] for i in row] for row in IDS.tolist()]
    theirs = torch.tensor(numpy.array(generator.forward_batch(tokens)))
    torch.testing.assert_close(theirs, logits(adapted(run)), atol=1e-3, rtol=1e-3)


def test_a_merged_folder_is_a_base_here(tmp_path, run, merged, tiny_corpus):
    decoding = ["data=jsonl", f"data.root={tiny_corpus}", "data.seq_len=64", "decoding.eval_len=8"]
    for name, source in {"merged": f"base={merged[0]}", "adapter": f"adapter={run / 'adapter'}"}.items():
        generate(tmp_path / name, *decoding, source)
    texts = [(tmp_path / name / "hypotheses.txt").read_text() for name in ("merged", "adapter")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merged_folder_in_another_type(tmp_path, run, dtype):
    differences = conversion.merge(str(run / "adapter"), None, tmp_path, dtype)
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    name = str(dtype).removeprefix("torch.")
    assert differences.keys() == {"float32", name}
    assert differences["float32"] < differences[name] < 1
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype is dtype


def test_a_base_alone_goes_to_transformers_too(tmp_path, run):
    assert conversion.merge(str(run / "base"), None, tmp_path, torch.float32) == {"float32": 0.0}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not torch.allclose(logits(theirs), logits(adapted(run)), atol=1e-4)


@pytest.mark.parametrize("name", ["adapter", "other"])
def test_peft_and_back(tmp_path, run, name):
    conversion.export("peft", str(run / name), None, tmp_path / "peft", False)
    conversion.merge(str(run / "base"), None, tmp_path / "base", torch.float32)
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "peft"
    )
    expected = logits(adapted(run, name))
    torch.testing.assert_close(logits(theirs.eval()), expected, atol=1e-5, rtol=1e-5)
    told = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert told == str(run / "base")
    for base in (run / "base", tmp_path / "base"):  # our own form, and transformers'
        below = conversion.open_base(str(base), None, None)
        conversion.import_peft(tmp_path / "peft", below, tmp_path / "back")
        assert torch.equal(logits(open_adapter(tmp_path / "back")[0]), expected)


@pytest.mark.parametrize("everything", [False, True])
def test_the_published_scripts_and_back(tmp_path, run, everything):
    file, base = tmp_path / "a.pt", conversion.open_base(str(run / "base"), None, None)
    conversion.export("reference", str(run / "adapter"), None, file, everything)
    conversion.import_reference(file, base, tmp_path / "back", 32, 4, None)
    assert torch.equal(logits(open_adapter(tmp_path / "back")[0]), logits(adapted(run)))


def test_a_file_with_everything_brings_its_base(tmp_path, run):
    file, tokenizer = tmp_path / "a.pt", str(run / "base" / "tokenizer")
    conversion.export("reference", str(run / "adapter"), None, file, True)
    sizes = ["model.n_layer=2", "model.n_embd=16", "model.n_head=2", "model.n_positions=64"]
    card = settings_of("train", sizes).model
    below = conversion.held_base(file, card, tokenizer)
    conversion.import_reference(file, below, tmp_path / "back", 32, None, None)
    assert torch.equal(logits(open_adapter(tmp_path / "back")[0]), logits(adapted(run)))
    conversion.merge(str(tmp_path / "back"), None, tmp_path / "merged", torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(theirs), logits(adapted(run)), atol=1e-5, rtol=1e-5)


def test_a_file_with_another_base_is_refused(tmp_path, run):
    file = tmp_path / "a.pt"
    conversion.export("reference", str(run / "adapter"), None, file, True)
    held = torch.load(file, weights_only=True)
    held["model_state_dict"]["module.transformer.ln_f.bias"] += 1
    torch.save(held, file)
    base = conversion.open_base(str(run / "base"), None, None)
    with pytest.raises(UserError, match="holds a whole model whose base is not that at"):
        conversion.import_reference(file, base, tmp_path / "back", 32, None, None)
    assert not (tmp_path / "back").exists()


def test_the_average_of_adapters_is_the_average_of_their_updates(tmp_path, run):
    sources = [str(run / "adapter"), str(run / "other")]
    assert conversion.combine(sources, [0.5, 0.5], tmp_path, None) == 1.0
    made, parts = open_adapter(tmp_path)[0], [adapted(run), adapted(run, "other")]
    for place, layer in made.transformer.h.named_modules():
        if hasattr(layer, "delta_weight"):
            given = [dict(part.transformer.h.named_modules())[place].delta_weight() for part in parts]
            torch.testing.assert_close(layer.delta_weight(), (given[0] + given[1]) / 2, atol=1e-6, rtol=1e-4)
    assert describe_adapter(tmp_path)[1].notes["combined"] == dict.fromkeys(sources, 0.5)


def test_a_cut_adapter_has_the_rank_it_was_cut_to(tmp_path, run):
    kept = conversion.combine([str(run / "adapter")], [1.0], tmp_path, 2)
    assert 0.5 < kept < 1
    about = describe_adapter(tmp_path)[1]
    assert {lora.rank for lora in about.gpt2_config.lora_layers.values()} == {2}
    assert about.notes["energy_kept"] == kept
    assert not torch.equal(logits(open_adapter(tmp_path)[0]), logits(adapted(run)))


def write_rows(folder: Path, *adapters: str | None) -> None:
    rows = [{"context": f"red {word}", "completion": "!"} for word in ("cat", "dog", "fox", "cat", "cat")]
    lines = [{**row, **({"adapter": name} if name else {})} for row, name in zip(rows, adapters, strict=True)]
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_each_row_is_decoded_by_the_adapter_that_it_names(tmp_path, run):
    write_rows(tmp_path, "one", "two", None, "two", None)
    common = ["data=jsonl", f"data.root={tmp_path}", "data.seq_len=64", "decoding.eval_len=8",
              "decoding.beam_size=2", "decoding.batch_size=2"]  # fmt: skip
    both = f"adapters={{one:{run / 'adapter'},two:{run / 'other'}}}"
    generate(tmp_path / "mixed", *common, both)
    write_rows(tmp_path, None, None, None, None, None)
    alone = {
        "one": f"adapter={run / 'adapter'}",
        "two": f"adapter={run / 'other'}",
        "": f"base={run / 'base'}",
    }
    tokens = {}
    for name, source in alone.items():
        generate(tmp_path / f"alone{name}", *common, source)
        tokens[name] = predictions(tmp_path / f"alone{name}")
    expected = [tokens[name][row] for row, name in enumerate(("one", "two", "", "two", ""))]
    assert predictions(tmp_path / "mixed") == expected
    assert len(set(map(str, tokens.values()))) == 3


def predictions(folder: Path) -> list[tuple[list[int], float]]:
    lines = map(json.loads, (folder / "predictions.jsonl").read_text().splitlines())
    return [(line["predict"], round(line["score"], 4)) for line in lines]


@pytest.mark.parametrize(
    ("adapters", "choice", "message"),
    [
        (["one", "three"], "adapters", r'test.jsonl:2: asks for the adapter "three", loaded are: one'),
        (["one", None], "adapter", r'test.jsonl:1: asks for the adapter "one", loaded are: none'),
    ],
)
def test_a_row_that_names_an_unknown_adapter_is_refused(tmp_path, run, adapters, choice, message):
    write_rows(tmp_path, *adapters, None, None, None)
    source = f"adapters={{one:{run / 'adapter'}}}" if choice == "adapters" else f"adapter={run / 'adapter'}"
    with pytest.raises(UserError, match=message):
        generate(tmp_path / "out", "data=jsonl", f"data.root={tmp_path}", "data.seq_len=64",
                 "decoding.eval_len=8", source)  # fmt: skip


def test_several_adapters_hold_their_base_once(run):
    both = f"adapters={{one:{run / 'adapter'},two:{run / 'other'}}}"
    settings = settings_of("generate", [both, "data=demo"])
    tokenizer = load_tokenizer(str(run / "base" / "tokenizer"))
    models = runs.load(settings, tokenizer.sha256, 280)
    assert models.keys() == {"one", "two", ""}
    for name, weight in models["one"].named_parameters():
        if not is_lora(name):
            assert all(dict(model.named_parameters())[name] is weight for model in models.values())


def test_weights_that_do_not_say_what_they_are_are_not_merged(tmp_path, run):
    held = load_file(run / "base" / "model.safetensors")
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="does not say which model it is"):
        conversion.merge(str(tmp_path), None, tmp_path / "out", torch.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda run, out: conversion.merge(str(run / "nowhere"), None, out, torch.float32),
            "nowhere: there is no",
        ),
        (
            lambda run, out: conversion.merge(str(run / "adapter"), str(run / "adapter"), out, torch.float32),
            "holds neither model.safetensors",
        ),
        (
            lambda run, out: conversion.export("reference", str(run / "other"), None, out, False),
            "the published scripts know one rank and alpha on q, k and v alone",
        ),
    ],
)
def test_a_wrong_source_is_named_and_nothing_written(tmp_path, run, call, message):
    with pytest.raises(UserError, match=re.escape(message)):
        call(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merged_model_is_merged_again_and_never_over_its_source(tmp_path, run, merged, tiny_corpus):
    """A base in transformers' form, merged alone, says card and tokenizer, so that base= takes it."""
    theirs = AutoModelForCausalLM.from_pretrained(merged[0])
    theirs.save_pretrained(tmp_path / "theirs")
    load_tokenizer(str(run / "base" / "tokenizer")).save(tmp_path / "theirs" / "tokenizer")
    conversion.merge(str(tmp_path / "theirs"), None, tmp_path / "again", torch.float32)
    base = conversion.open_base(str(tmp_path / "again"), None, None)
    torch.testing.assert_close(logits(base.model), logits(theirs.eval()), atol=1e-5, rtol=1e-5)
    before = (run / "adapter" / "adapter.safetensors").read_bytes()
    with pytest.raises(UserError, match="holds what is read here or its base; give another folder"):
        conversion.merge(str(run / "adapter"), None, run / "adapter", torch.float32)
    assert (run / "adapter" / "adapter.safetensors").read_bytes() == before
    assert not (run / "adapter" / "model.safetensors").exists()


def test_an_adapter_with_another_tokenizer_is_not_merged(tmp_path, run, tiny_corpus):
    shutil.copytree(run / "adapter", tmp_path / "a")
    other = encoded("jsonl", tiny_corpus, "corpus:270", tmp_path / "cache") / "tokenizer"
    shutil.rmtree(tmp_path / "a" / "tokenizer")
    shutil.copytree(other, tmp_path / "a" / "tokenizer")
    with pytest.raises(UserError, match="knows another tokenizer than"):
        conversion.merge(str(tmp_path / "a"), str(run / "base"), tmp_path / "out", torch.float32)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("variant", [["lora.init=pissa"], ["lora.rslora=true"]])
def test_a_published_file_comes_back_with_the_alpha_that_export_says(tmp_path, run, tiny, variant):
    train(
        tmp_path / "a",
        *tiny,
        "data.tokenizer=null",
        f"base={run / 'base'}",
        "lora=qv",
        "trainer.max_steps=5",
        *variant,
    )
    said = conversion.export("reference", str(tmp_path / "a"), None, tmp_path / "a.pt", False)
    rank, alpha = re.fullmatch(r"load it with --lora_dim (\d+) --lora_alpha (\S+)", said).groups()
    base = conversion.open_base(str(run / "base"), None, None)
    conversion.import_reference(tmp_path / "a.pt", base, tmp_path / "back", float(alpha), int(rank), None)
    expected = logits(open_adapter(tmp_path / "a")[0])
    torch.testing.assert_close(logits(open_adapter(tmp_path / "back")[0]), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(base.model), expected, atol=1e-3)


def test_what_does_not_add_up_is_not_combined(tmp_path, run, tiny):
    train(tmp_path / "elsewhere", *tiny, "lora=qv", "seed=5", "trainer.max_steps=1")
    common = [*tiny, "data.tokenizer=null", f"base={run / 'base'}", "lora=qv", "trainer.max_steps=1"]
    train(tmp_path / "dora", *common, "lora.dora=true")
    for name, message in (("elsewhere", "has another base"), ("dora", "trains magnitudes or biases")):
        with pytest.raises(UserError, match=message):
            conversion.combine([str(run / "adapter"), str(tmp_path / name)], [1, 1], tmp_path / "sum", None)
    both = f"adapters={{one:{run / 'adapter'},two:{tmp_path / 'elsewhere'}}}"
    tokenizer = load_tokenizer(str(run / "base" / "tokenizer"))
    with pytest.raises(UserError, match=r"adapters.two: has another base"):
        runs.load(settings_of("generate", [both, "data=demo"]), tokenizer.sha256, 280)
    assert not (tmp_path / "sum").exists()
