"""A base for adapters."""

from pathlib import Path

import pytest

from tests.conftest import TINY, train


@pytest.fixture(scope="session")
def base(tmp_path_factory, tiny_corpus) -> Path:
    """A tiny model after an epoch on the tiny corpus."""
    folder = tmp_path_factory.mktemp("base")
    train(folder, *TINY, "data=jsonl", f"data.root={tiny_corpus}", "data.tokenizer=corpus:280",
          "trainer.max_epochs=1")  # fmt: skip
    return folder
