"""What the page asks and what it is told, against the decoder itself."""

import json
from pathlib import Path

import pytest

from lora_gpt2.data.jsonl import read_text_rows
from lora_gpt2.decoding.config import DecodingSettings
from lora_gpt2.decoding.decoder import decode
from lora_gpt2.errors import UserError
from lora_gpt2.playground.models import BASE, open_playground
from lora_gpt2.weights.adapter import open_adapter
from tests.conftest import TINY, train

DECODING = {"beam_size": 3, "eval_len": 16}


def test_the_outputs_are_the_decoders(run, playground):
    told = playground.decode({"input": " red cat ", "adapter": "adapter", "decoding": DECODING})
    model, _ = open_adapter(run / "adapter")
    bpe = playground.tokenizer
    tokens = [*bpe.encode("red cat"), bpe.end_token]
    settings = DecodingSettings(beam_size=3, n_best=3, eval_len=16)
    (found,) = decode(model, [tokens], settings, bpe.end_tokens)
    assert [one["text"] for one in told["outputs"]] == [bpe.clean(one.tokens) for one in found]
    assert [one["score"] for one in told["outputs"]] == pytest.approx([one.score for one in found], abs=1e-4)
    for one, output in zip(told["outputs"], found, strict=True):
        assert "".join(text for text, _ in one["tokens"]) == bpe.decode(output.tokens)
    assert {rank for *_, rank in told["tree"]} == {None, 0, 1, 2}
    json.dumps(told, allow_nan=False)


def test_adapters_are_told_apart_from_each_other_and_from_their_base(playground):
    assert list(playground.models) == ["adapter", "other", "base", BASE]
    told = {
        name: playground.decode({"input": "red cat dog", "adapter": name, "decoding": DECODING})["outputs"]
        for name in playground.models
    }
    assert told["base"] == told[BASE]
    assert told["base"] != told["other"] != told["adapter"]


def test_a_sweep_is_its_jobs_over_one_base_in_memory(swept):
    models = open_playground([str(swept)]).models
    assert list(models) == ["rank 1", "rank 2", BASE]
    assert len({id(model.transformer.wte.weight) for model in models.values()}) == 1
    assert [model.config.lora_attn_dim for model in models.values()] == [1, 2, 0]


def test_what_an_output_misses_is_told(playground):
    asked = {"input": "name : Zizzi | area : riverside", "adapter": "adapter", "decoding": DECODING}
    assert playground.decode(asked)["outputs"][0]["missed"] == ["name: Zizzi", "area: riverside"]


def test_inputs_to_pick_are_those_of_the_validation(run, playground):
    first = json.loads((run / "base" / "provenance.json").read_text())["corpus"]
    contexts = [row.context for row in read_text_rows(Path(first) / "valid.text.jsonl")]
    assert playground.about()["examples"] == list(dict.fromkeys(contexts))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ([], "request: is no JSON object"),
        ({}, "input: a text was expected"),
        ({"input": "\n"}, "input: a text was expected"),
        ({"input": "x", "adapter": "/etc/passwd"}, "adapter: is none of those here"),
        ({"input": "x", "adapter": ["adapter"]}, "adapter: is none of those here"),
        ({"input": "x", "adapter": "adapter", "decoding": [1]}, "settings by their names"),
        ({"input": "x", "adapter": "adapter", "decoding": {"precision": 1}}, "has a setting that is none"),
        ({"input": "x", "adapter": "adapter", "decoding": {"beam_size": 33}}, "beam_size: is out of range"),
        ({"input": "x", "adapter": "adapter", "decoding": {"beam_size": 10**30}}, "is out of range"),
        ({"input": "x", "adapter": "adapter", "decoding": {"beam_size": True}}, "is no number"),
        ({"input": "x", "adapter": "adapter", "decoding": {"beam_size": 1.5}}, "decoding: "),
        ({"input": "x", "adapter": "adapter", "decoding": {"length_penalty": float("nan")}}, "out of range"),
        ({"input": "x " * 99, "adapter": "adapter"}, "exceed the model's 64 positions"),
    ],
)
def test_what_cannot_be_asked_is_named(playground, asked, told):
    with pytest.raises(UserError, match=told):
        playground.decode(asked)


def test_another_tokenizer_is_named(tmp_path, run, tiny_corpus):
    options = [*TINY, "data=jsonl", f"data.root={tiny_corpus}", "data.tokenizer=corpus:270"]
    train(tmp_path / "foreign", *options, "trainer.max_steps=1")
    with pytest.raises(UserError, match="has tokenizer"):
        open_playground([str(run / "adapter"), str(tmp_path / "foreign")])
