import json

import pytest

from lora_gpt2.data.jsonl import Row, write_rows
from lora_gpt2.data.module import DataToText
from lora_gpt2.decoding.predictions import Queries
from lora_gpt2.errors import UserError
from lora_gpt2.scoring import Asked
from tests.conftest import settings_of


def data(*overrides: str) -> DataToText:
    return DataToText(settings_of("train", list(overrides)).data, "gpt2", 0)


@pytest.fixture
def tokens(tmp_path, tiny_corpus):
    """Overrides for a corpus of token ids, with the tiny corpus' tokenizer."""
    tokenizer = (
        data("data=jsonl", f"data.root={tiny_corpus}", "data.tokenizer=corpus:280").folder / "tokenizer"
    )
    for split in ("train", "valid"):
        write_rows(tmp_path / f"{split}.jsonl", [Row([1, 2], [3]), Row([1] * 9, [4])])
    return ["data=jsonl", f"data.root={tmp_path}", f"data.tokenizer={tokenizer}"]


def test_a_context_that_fills_the_positions_is_named_by_file_and_line(tokens):
    with pytest.raises(UserError, match=r"train.jsonl:2: a context of 9 tokens does not fit 9 positions"):
        data(*tokens, "data.seq_len=8").load(9)


def test_a_damaged_file_of_an_encoded_corpus_is_refused(tmp_path, tokens):
    module = data(*tokens, "data.seq_len=64", f"data.cache={tmp_path / 'cache'}")
    train, valid = (module.folder / f"{split}.jsonl" for split in ("train", "valid"))
    for file in (train, valid):
        file.write_text(file.read_text().replace("[1, 2]", "[1, 5]"))
    with pytest.raises(UserError, match=r"train.jsonl: is damaged: it is not what was encoded; delete its"):
        module.load(64)
    with pytest.raises(UserError, match=r"valid.jsonl: is damaged"):
        next(module.rows("valid", 64))
    (module.folder / "valid.text.jsonl").write_text('{"context": "a", "completion": "b"}\n')
    with pytest.raises(UserError, match=r"valid.text.jsonl: is damaged"):
        Asked.of(module, "valid", Queries([], 8))
    module.meta["files"].clear()  # as of an earlier version, which wrote none
    module.load(64)
    assert next(module.rows("valid", 64)) == Row([1, 5], [3])


def test_a_tokenizer_that_is_not_the_rows_own_is_refused(tmp_path, tokens):
    arguments = [*tokens, f"data.cache={tmp_path / 'cache'}"]
    path = data(*arguments).folder / "tokenizer" / "vocab.json"
    held = json.loads(path.read_text())
    held["a"], held["b"] = held["b"], held["a"]
    path.write_text(json.dumps(held))
    with pytest.raises(UserError, match="tokenizer: is damaged: it is not what the rows were encoded with"):
        data(*arguments)


def test_rows_longer_than_the_model_are_refused(tokens):
    with pytest.raises(UserError, match=r"data.seq_len: 512 is more than the model's 64 positions"):
        data(*tokens).load(64)


@pytest.mark.parametrize(("objective", "targets"), [("clm", 2), ("jlm", 11)])
def test_the_objective_says_which_tokens_count(tokens, objective, targets):
    module = data(*tokens, f"data.objective={objective}", "data.seq_len=64")
    module.load(64)
    assert sum(int(batch.mask.sum()) for batch in module.val_dataloader()) == targets


def test_every_row_is_served_whatever_the_batch_size(tokens):
    module = data(*tokens, "data.batch_size=1", "data.seq_len=64")
    module.load(64)
    assert sorted(int(row) for batch in module.train_dataloader() for row in batch.rows) == [0, 1]
