"""The two scripts as a user starts them, from raw rows to scores."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from lora_gpt2 import runs
from lora_gpt2.data.jsonl import read_text_rows
from lora_gpt2.data.tokenizer import load_tokenizer
from lora_gpt2.errors import UserError
from lora_gpt2.training.callbacks import Progress
from tests.conftest import TINY, generate, script, settings_of, train

DECODING = ["data=jsonl", "data.seq_len=64", "decoding.eval_len=16", "decoding.beam_size=3"]


def test_one_line_a_row_in_order_and_scores_beside(tmp_path, run, tiny_corpus):
    decoding = [*DECODING, f"adapter={run / 'adapter'}", f"data.root={tiny_corpus}"]
    scores = generate(tmp_path, *decoding, meteor=True)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    rows = list(read_text_rows(tiny_corpus / "test.jsonl"))
    assert [line["id"] for line in lines] == list(range(len(rows)))
    assert all(set(line) == {"id", "predict", "score", "text"} for line in lines)
    assert all(len(line["predict"]) == 16 for line in lines)
    by_context = {row.context: line["text"] for row, line in zip(rows, lines, strict=True)}
    assert [by_context[row.context] for row in rows] == [line["text"] for line in lines]
    assert (tmp_path / "hypotheses.txt").read_text().splitlines() == list(by_context.values())
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    assert {"bleu", "nist", "meteor", "rouge_l", "cider"} <= scores.keys()
    assert not list(tmp_path.glob(".part*"))


def test_results_do_not_depend_on_the_batch_size(tmp_path, run, tiny_corpus):
    common = [*DECODING, f"adapter={run / 'adapter'}", f"data.root={tiny_corpus}"]
    for size in (1, 3):
        generate(tmp_path / str(size), *common, f"decoding.batch_size={size}")
    texts = [(tmp_path / str(size) / "hypotheses.txt").read_text() for size in (1, 3)]
    assert texts[0] == texts[1]


def test_limit_decodes_the_first_contexts_only(tmp_path, run, tiny_corpus):
    generate(tmp_path, *DECODING, f"base={run / 'base'}", f"data.root={tiny_corpus}", "limit=2")
    assert len((tmp_path / "hypotheses.txt").read_text().splitlines()) == 2


def test_the_adapter_finds_its_base_and_tokenizer_again(run):
    settings = settings_of("generate", [f"adapter={run / 'adapter'}", "data=demo"])
    tokenizer = load_tokenizer(runs.tokenizer_of(settings.adapter))
    assert tokenizer.vocab_size == 280
    model = runs.load(settings, tokenizer.sha256, 280)[""]
    base = load_file(run / "base" / "model.safetensors")
    assert torch.equal(model.transformer.wte.weight, base["transformer.wte.weight"])
    assert all(layer.merged for layer in model.lora_layers())


@pytest.mark.parametrize(("warmup", "rises"), [(2, False), (6, False), (7, True)])
def test_a_rate_that_never_reaches_its_top_is_told(tmp_path, tiny, capsys, warmup, rises):
    train(tmp_path, *tiny, "trainer.max_epochs=1", f"optimizer.warmup_steps={warmup}")
    assert ("the rate still rises at the last step" in capsys.readouterr().out) == rises


def test_two_processes_train_and_decode_completely_and_in_order(tmp_path, run, tiny_corpus):
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    adapter = [f"base={run / 'base'}", "lora=qv", "lora.dropout=0", "data=jsonl", f"data.root={tiny_corpus}",
               *TINY, "trainer.max_epochs=1", f"hydra.run.dir={tmp_path / 'adapter'}"]  # fmt: skip
    trained = script("train", *two, *adapter)
    assert trained.returncode == 0, trained.stderr
    assert "6 steps of 8 rows on 2 devices" in trained.stdout
    train(tmp_path / "alone", *adapter[:-1])
    alone, both = (load_file(tmp_path / name / "adapter.safetensors") for name in ("alone", "adapter"))
    for name, value in alone.items():
        torch.testing.assert_close(both[name], value, rtol=1e-3, atol=1e-6, msg=f"{name}: one device as two")
    decoding = [*DECODING, f"data.root={tiny_corpus}", f"adapter={tmp_path / 'adapter'}",
                "decoding.batch_size=1", "split=train"]  # fmt: skip
    decoded = script("generate", *two, *decoding, f"hydra.run.dir={tmp_path / 'two'}")
    assert decoded.returncode == 0, decoded.stderr
    generate(tmp_path / "one", *decoding)
    two, one = (
        [json.loads(line) for line in (tmp_path / name / "predictions.jsonl").read_text().splitlines()]
        for name in ("two", "one")
    )
    assert len(two) % 2 == 1  # so that one rank has more to do
    assert [line["id"] for line in two] == list(range(41))
    assert [line["predict"] for line in two] == [line["predict"] for line in one]
    assert [line["score"] for line in two] == pytest.approx([line["score"] for line in one], rel=1e-5)


def test_a_sweep_leaves_a_folder_for_each_combination(tmp_path, tiny):
    sweep = ["-m", *tiny, "lora.rank=1,2", "trainer.max_steps=1", f"hydra.sweep.dir={tmp_path}"]
    swept = script("train", *sweep)
    assert swept.returncode == 0, swept.stderr
    sizes = [load_file(tmp_path / str(i) / "adapter.safetensors") for i in range(2)]
    assert [tensors["transformer.h.0.attn.c_attn.lora_B"].shape[1] for tensors in sizes] == [1, 2]


def test_a_dry_run_prints_the_parameters_and_writes_no_weights(tmp_path, tiny, capsys):
    train(tmp_path, *tiny, "lora=qv", "dry_run=true")
    assert "512 trainable" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_random_base_is_said_to_be_random(tmp_path, tiny, capsys):
    train(tmp_path, *tiny, "lora=qv", "trainer.max_steps=1")
    assert "the base has random weights" in capsys.readouterr().out


def test_rows_cut_by_seq_len_are_counted(tmp_path, tiny, capsys):
    train(tmp_path, *tiny, "data.seq_len=16", "trainer.max_steps=1")
    assert "15 of 41 rows cut to data.seq_len=16" in capsys.readouterr().out


def test_metrics_of_an_earlier_run_in_the_folder_are_kept(tmp_path, tiny):
    for _ in range(2):
        train(tmp_path, *tiny, "trainer.max_epochs=1")
    assert (tmp_path / "metrics.csv").is_file()
    assert (tmp_path / "earlier-1.csv").is_file()


def row(context: str, completion: str) -> str:
    return f'{{"context": {context}, "completion": {completion}}}'


MESSAGES = {
    "malformed": (row("[1, 2]", "[3, 27"), "train.jsonl:2: is not valid JSON"),
    "outside the vocabulary": (row("[1]", "[280]"), "train.jsonl:2: .*token id 280, the vocabulary has 280"),
    "empty context": (row("[]", "[3]"), 'train.jsonl:2: "context" is empty'),
    "empty completion": (row("[1]", "[]"), 'train.jsonl:2: "completion" is empty'),
    "too long": (
        row(f"{[1] * 70}", "[3]"),
        "train.jsonl:2: a context of 70 tokens does not fit 64 positions",
    ),
}


@pytest.mark.parametrize("fault", MESSAGES)
def test_a_faulty_row_is_named_by_file_and_line(tmp_path, tiny, run, fault):
    line, message = MESSAGES[fault]
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for split in ("train", "valid"):
        (corpus / f"{split}.jsonl").write_text(row("[1, 2]", "[3]") + "\n" + line + "\n")
    arguments = [*tiny, f"data.root={corpus}", f"data.tokenizer={run / 'base' / 'tokenizer'}"]
    with pytest.raises(UserError, match=message):
        train(tmp_path / "out", *arguments)
    assert not list((tmp_path / "out").iterdir())


FAULTS = {
    "missing": (["data=jsonl", "data.root=/nowhere"], "/nowhere: there is no such file or folder"),
    "type": (["lora.rank=four"], "lora.rank"),
    "key": (["lora.rnak=4"], "lora.rnak"),
    "added key": (["+papr=x"], "papr: no such setting"),
    "checkpoint": (["resume=/nowhere.ckpt"], "/nowhere.ckpt: there is no such file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_users_mistake_is_a_message_and_exit_code_1(tmp_path, fault):
    arguments, message = FAULTS[fault]
    done = script("train", *arguments, f"hydra.run.dir={tmp_path}")
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_option_is_exit_code_2():
    assert script("train", "--nonsense").returncode == 2


def test_an_adapter_for_another_card_is_refused(tmp_path, run, tiny_corpus):
    arguments = [*DECODING, f"adapter={run / 'adapter'}", f"data.root={tiny_corpus}", "model=gpt2.sm"]
    with pytest.raises(UserError, match=r"was made for model gpt2.nano, not gpt2.sm"):
        generate(tmp_path, *arguments)


def test_an_adapter_over_another_base_is_refused(tmp_path, run, tiny, tiny_corpus):
    train(tmp_path / "other", *tiny, "seed=7", "trainer.max_steps=1")
    with pytest.raises(UserError, match=r"adapter.safetensors: was trained on another base"):
        generate(tmp_path / "out", *DECODING, f"adapter={run / 'adapter'}", f"base={tmp_path / 'other'}",
                 f"data.root={tiny_corpus}")  # fmt: skip


@pytest.mark.parametrize("name", ["train", "generate"])
def test_help_explains_itself(name):
    done = script(name, "--help")
    assert done.returncode == 0
    assert "Groups and their options" in done.stdout
    assert f"python {name}.py" in done.stdout


def test_an_adapter_over_a_base_that_lacked_weights_finds_them_again(tmp_path, run, tiny, tiny_corpus):
    held = load_file(run / "base" / "model.safetensors")
    del held["transformer.wpe.weight"]
    torch.save(held, tmp_path / "base.pt")
    tokenizer = f"data.tokenizer={run / 'base' / 'tokenizer'}"
    common = [*tiny, tokenizer, f"base={tmp_path / 'base.pt'}", "lora=qv", "trainer.max_steps=2"]
    with pytest.raises(UserError, match=r"1 missing \(transformer.wpe.weight\)"):
        train(tmp_path / "a", *common)
    train(tmp_path / "a", *common, "base_may_lack=[transformer.wpe.*]")
    assert generate(tmp_path / "out", *DECODING, f"adapter={tmp_path / 'a'}", f"data.root={tiny_corpus}")


class KillAfter(Progress):
    """Ends the process as `kill -9` does when so many outputs are on disk."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def on_decoded(self, total: int) -> None:
        self.count -= 1
        if not self.count:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_decoding_that_was_killed_goes_on(tmp_path, run, tiny_corpus, elsewhere):
    """In its own folder by itself, in another one by resume=; nothing is lost, doubled or another text."""
    common = [*DECODING, f"data.root={tiny_corpus}", f"adapter={run / 'adapter'}", "split=train",
              "decoding.batch_size=2", "decoding.n_best=2"]  # fmt: skip
    generate(tmp_path / "whole", *common)
    kill = "+callbacks.kill={_target_: tests.test_experiment.KillAfter, count: 5}"
    broken = script("generate", *common, kill, f"hydra.run.dir={tmp_path / 'broken'}")
    assert broken.returncode == -signal.SIGKILL, broken.stderr
    part = tmp_path / "broken" / ".part-0.jsonl"
    before = part.read_text().splitlines()
    assert len(before) == 1 + 5
    with open(part, "a") as file:
        file.write("[1, [[[3, 4")  # what was being written
    if elsewhere:
        folder = tmp_path / "resumed"
        generate(folder, *common, f"resume={tmp_path / 'broken'}", "decoding.batch_size=3")
    else:
        folder = tmp_path / "broken"
        generate(folder, *common)
    for name in ("hypotheses.txt", "scores.json"):
        assert (folder / name).read_text() == (tmp_path / "whole" / name).read_text()
    whole, mended = (
        [json.loads(line) for line in (place / "predictions.jsonl").read_text().splitlines()]
        for place in (tmp_path / "whole", folder)
    )
    assert [line["id"] for line in mended] == list(range(41))
    for one, other in zip(whole, mended, strict=True):
        assert one["predict"] == other["predict"]
        assert [n["tokens"] for n in one["n_best"]] == [n["tokens"] for n in other["n_best"]]
        assert one["score"] == pytest.approx(other["score"], rel=1e-5)
    assert not list(folder.glob(".part*"))


def test_a_decoding_of_something_else_is_not_gone_on_with(tmp_path, run, tiny_corpus):
    common = [*DECODING, f"data.root={tiny_corpus}", f"adapter={run / 'adapter'}"]
    (tmp_path / ".part-0.jsonl").write_text('{"decoding": "other"}\n')
    with pytest.raises(UserError, match="holds outputs of an interrupted decoding of something else"):
        generate(tmp_path, *common)
    with pytest.raises(UserError, match=r"resume: .*nowhere: there is no such folder"):
        generate(tmp_path / "out", *common, f"resume={tmp_path / 'nowhere'}")


@pytest.mark.parametrize(
    "option",
    [
        "decoding.precision=bfloat16",
        "decoding.precision=int8",
        "trainer.precision=bf16-mixed",
        "decoding=hf",
        "decoding=sample",
        "decoding=diverse",
    ],
)
def test_every_way_of_decoding_runs(tmp_path, run, tiny_corpus, option):
    assert generate(tmp_path, *DECODING[:3], option, "decoding.eval_len=16", f"adapter={run / 'adapter'}",
                    f"data.root={tiny_corpus}")  # fmt: skip


def test_types_are_named_once(tmp_path, run, tiny_corpus):
    with pytest.raises(UserError, match=r"decoding.precision: int8 and trainer.precision=bf16-mixed exclude"):
        generate(tmp_path, *DECODING, f"data.root={tiny_corpus}", f"adapter={run / 'adapter'}",
                 "decoding.precision=int8", "trainer.precision=bf16-mixed")  # fmt: skip


def test_end_tokens_are_tokens(tmp_path, run, tiny_corpus):
    with pytest.raises(UserError, match=r"decoding.end_tokens: 99999 is no token, the tokenizer has 0 to"):
        generate(tmp_path, *DECODING, f"data.root={tiny_corpus}", f"adapter={run / 'adapter'}",
                 "decoding.end_tokens=[99999]")  # fmt: skip


def test_a_row_gets_the_phrases_that_it_requires(tmp_path, run):
    rows = [{"context": "red cat", "completion": "red cat !", "require": ["blue", "old tree"]},
            {"context": "red cat", "completion": "red cat !"}]  # fmt: skip
    (tmp_path / "rows").mkdir()
    for split in ("test", "train"):
        (tmp_path / "rows" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    generate(tmp_path / "out", *DECODING, f"data.root={tmp_path / 'rows'}", f"adapter={run / 'adapter'}")
    first, second = (tmp_path / "out" / "hypotheses.txt").read_text().splitlines()
    assert " blue" in f" {first}"
    assert " old tree" in f" {first}"
    assert "blue" not in second
    with pytest.raises(UserError, match=r'test.jsonl:1: "require" needs a plain beam search'):
        generate(tmp_path / "bad", *DECODING[:3], "decoding=sample", f"data.root={tmp_path / 'rows'}",
                 f"adapter={run / 'adapter'}")  # fmt: skip
    (tmp_path / "rows" / "test.jsonl").write_text(json.dumps({**rows[0], "require": "blue"}) + "\n")
    with pytest.raises(UserError, match=r'test.jsonl:1: "require" must be a list of phrases, not "blue"'):
        generate(tmp_path / "bad", *DECODING, f"data.root={tmp_path / 'rows'}", f"adapter={run / 'adapter'}")
