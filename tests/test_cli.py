"""`lora-gpt2` as a user calls it."""

import json
from pathlib import Path

import pytest

from tests.conftest import cli, script


@pytest.fixture
def texts(tmp_path) -> list[object]:
    """Options that name a file of predictions and one of references."""
    (tmp_path / "predictions").write_text("the cat sat on the mat .\na dog ran .\n")
    (tmp_path / "references").write_text(
        "the cat sat on the mat .\na cat sat there .\n\na dog ran away .\n\n"
    )
    return ["--predictions", tmp_path / "predictions", "--references", tmp_path / "references"]


def test_scores_as_json_are_json_alone(texts):
    done = cli("score", *texts, "--json")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    assert {"bleu", "nist", "meteor", "rouge_l", "cider"} <= scores.keys()
    assert 0.5 < scores["bleu"] < 1


def test_scores_as_a_table_say_how_they_were_taken(texts):
    done = cli("score", *texts)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("bleu", "nist", "meteor", "rouge_l", "cider", "13a"))


def test_webnlg_has_scores_of_its_own(texts):
    done = cli("score", *texts, "--task", "webnlg", "--json")
    assert done.returncode == 0, done.stderr
    assert {"bleu", "meteor", "ter", "chrf"} <= {name.rstrip("+") for name in json.loads(done.stdout)}


def test_encode_says_what_it_wrote(tmp_path):
    (tmp_path / "train.txt").write_text("name : Aromi||Aromi is a café .\n")
    output = tmp_path / "out"
    done = cli("encode", "e2e", "--input", tmp_path, "--output", output, "--tokenizer", "corpus:280")
    assert done.returncode == 0, done.stderr
    assert "train: 1 rows, 1 different contexts" in done.stdout
    assert {path.name for path in output.iterdir()} == {
        "meta.json", "tokenizer", "train.jsonl", "train.text.jsonl"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["encode", "e2e", "--input", "/nowhere", "--output", "out"], 1, "/nowhere: there is no such file"),
        (["score", "--predictions", "/nowhere", "--references", "/nowhere"], 1, "/nowhere: there is no such"),
        (["encode", "e2e"], 2, "Missing option"),
        (["encodd"], 2, "No such command"),
        (["encode", "e3e", "--input", "x", "--output", "y"], 2, "e3e"),
        (["merge", "/nowhere", "--output", "x"], 1, "/nowhere: there is no such file"),
        (["export", "peft", "/nowhere", "--output", "x"], 1, "/nowhere: there is no such file"),
        (["import", "peft", "/nowhere", "--output", "x"], 1, "no base is given; use --base"),
        (
            ["import", "peft", "/nowhere", "--output", "x", "--base", "/none"],
            1,
            "/none: there is no such file",
        ),
        (["combine", "a", "b", "--output", "x", "--weights", "1"], 1, "--weights: '1' is not 2 numbers"),
        (["combine", "a", "b", "--output", "x", "--weights", "1,b"], 1, "--weights: '1,b' is not 2 numbers"),
        (["inspect", "/nowhere"], 1, "/nowhere: there is no such file"),
        (["inspect", "/nowhere", "--output", "x"], 1, "say to which rank: --to-rank 2"),
        (["plan", "lora.rnak=3"], 1, "Could not override 'lora.rnak'"),
        (["plan", "model=gpt2.smm"], 1, "Could not find 'model/gpt2.smm'"),
        (["plan", "data=e2e"], 1, "data.root is missing"),
        (["plan", "model.n_head=5"], 1, "n_embd 128 is not divisible by n_head 5"),
    ],
)
def test_a_users_mistake_is_one_message(arguments, code, message):
    done = cli(*arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_demonstration_improves_every_score(tmp_path):
    done = cli("demo", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    before, after = (
        json.loads(Path(tmp_path, name, "scores.json").read_text()) for name in ("before", "after")
    )
    assert after["bleu"] > before["bleu"] + 0.2
    assert all(after[name] > before[name] for name in ("nist", "rouge_l", "cider"))
    again = cli("demo", "--output", tmp_path)
    assert "is there already" in again.stdout


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("train", "lora.ranks=1", "lora.ranks: no such setting, did you mean lora.rank?"),
        (
            "train",
            "callbacks.x._target_=y",
            "callbacks.x._target_: no such setting; +callbacks.x._target_ adds it",
        ),
        ("train", "serd=1", "serd: no such setting, did you mean seed?"),
        ("train", "logger=wnadb", "logger: there is no wnadb, did you mean logger=wandb?"),
        ("train", "lora=4", "a group takes the name of an option, as in lora=qv; see python train.py --help"),
        ("train", "precision=float8", "precision=float8: Invalid value 'float8', expected one of [float32, "),
        ("train", "data.batch_size=two", "data.batch_size=two: Value 'two' of type 'str' could not be conv"),
        ("train", "lora.rank=[]", "lora.rank is an empty list: one value for each adapter was expected"),
        ("train", "data.seq_len=1", "data.seq_len must be at least 2, a token and the next, not 1"),
        ("generate", "decoding.beam=1", "decoding.beam: no such setting, did you mean decoding.beam_size?"),
        ("train", "score=none", "score must be train, valid or test, or null, not none"),
    ],
)
def test_a_wrong_setting_is_told_in_a_line(name, override, message):
    done = script(name, override)
    assert done.returncode == 1
    *_, line = done.stderr.splitlines()
    assert line.startswith(message)
    assert "Traceback" not in done.stderr
    assert "HYDRA_FULL_ERROR" not in done.stderr
    assert "Traceback" in script(name, override, HYDRA_FULL_ERROR="1").stderr
