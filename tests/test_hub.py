"""Files of the hub, in its local cache: no network is asked."""

import hashlib

import huggingface_hub.constants
import pytest

from lora_gpt2 import hub
from lora_gpt2.errors import UserError
from lora_gpt2.hub import fetch

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A repository of two revisions, laid out as huggingface_hub does."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--a--b"
    for name, commit in COMMITS.items():
        content = f"weights of {name}".encode()
        blob = place / "blobs" / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        (place / "snapshots" / commit).mkdir(parents=True)
        (place / "snapshots" / commit / "w.bin").symlink_to(blob)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / name).write_text(commit)
    return place


@pytest.mark.parametrize(
    ("asked", "found"), [("a/b", "main"), ("a/b@main", "main"), ("a/b@v1", "v1"), (f"a/b@{'b' * 40}", "v1")]
)
def test_a_revision_is_that_which_was_named(cache, asked, found):
    assert fetch(asked, ["other", "w.bin"], "base", "do").read_text() == f"weights of {found}"


@pytest.mark.parametrize(("asked", "found"), [("a/b", "v1"), ("a/b@main", "main")])
def test_a_repository_whose_commit_is_known_is_of_that_commit(cache, monkeypatch, asked, found):
    monkeypatch.setitem(hub.PINNED, "a/b", COMMITS["v1"])
    assert fetch(asked, "w.bin", "base", "do").read_text() == f"weights of {found}"


def test_a_file_that_is_not_what_the_hub_holds_is_refused(cache):
    blob = (cache / "snapshots" / COMMITS["main"] / "w.bin").resolve()
    blob.write_bytes(blob.read_bytes()[:-1])
    with pytest.raises(UserError, match="is not what the hub holds: its SHA-256 differs; delete it"):
        fetch("a/b", "w.bin", "base", "do")
