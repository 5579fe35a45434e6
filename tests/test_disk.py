"""Disks that are full or may not be written: a tmpfs of a given size, in a mount namespace of its own."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, train

NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        subprocess.run([*NAMESPACE, "true"], check=False, capture_output=True).returncode != 0,
        reason="a tmpfs needs a mount namespace, which this system refuses to its users",
    ),
]

LINE = "cannot be written (No space left on device)"


@pytest.fixture
def on_disk(tmp_path, monkeypatch):
    """Runs lines of bash with a small disk at ./small; the python of the tests is $python."""
    (tmp_path / "small").mkdir()
    monkeypatch.chdir(tmp_path)

    def run(size, lines):
        mount = f"set -e; mount -t tmpfs -o size={size} none small\n"
        here = {**os.environ, "python": sys.executable, "repository": str(ROOT)}
        command = [*NAMESPACE, "bash", "-c", mount + lines]
        return subprocess.run(command, env=here, capture_output=True, text=True, check=False, timeout=300)

    return run


def arguments(overrides):
    return " ".join(f"'{one}'" for one in overrides)


@pytest.mark.parametrize("size", ["4k", "8k", "20k", "28k", "32k", "60k", "68k"])
def test_a_training_says_that_the_disk_is_full(on_disk, tiny, size):
    """From Hydra's own files over the first checkpoint to the last file of all."""
    more = ["lora=qv", "callbacks.last.every_n_train_steps=5", "hydra.run.dir=small/run"]
    done = on_disk(size, f"$python $repository/train.py {arguments([*tiny, *more])}")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "No space left on device" in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].endswith("; make room")


def test_a_training_goes_on_to_the_same_bits_when_there_is_room_again(on_disk, tiny, tmp_path):
    more = [*tiny, "lora=qv", "callbacks.last.every_n_train_steps=5"]
    train(tmp_path / "whole", *more)
    command = f"$python $repository/train.py {arguments([*more, 'hydra.run.dir=small/run'])}"
    lines = f"""
        if {command}; then exit 9; fi
        ls -A small/run/checkpoints >&2
        mount -o remount,size=9m small
        {command} resume=small/run
        cp small/run/adapter.safetensors resumed
    """
    done = on_disk("60k", lines)
    assert done.returncode == 0, done.stderr
    assert LINE in done.stderr
    assert ".tmp" not in done.stderr
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole/adapter.safetensors").read_bytes()


@pytest.mark.parametrize("size", ["4k", "12k", "16k"])
def test_an_encoding_says_so_and_leaves_nothing_that_looks_whole(on_disk, size, tiny_corpus):
    encode = f"encode jsonl --input {tiny_corpus} --tokenizer corpus:280 --output small/out"
    done = on_disk(size, f"$python -m lora_gpt2.cli {encode} || code=$?; find small >&2; exit $code")
    assert done.returncode == 1
    assert LINE in done.stderr
    assert "Traceback" not in done.stderr
    assert "meta.json" not in done.stderr
    assert ".tmp" not in done.stderr


def test_a_folder_that_may_not_be_written_is_named(on_disk, run, tiny):
    training = f"$python $repository/train.py {arguments([*tiny, 'hydra.run.dir=small/run'])}"
    merging = f"$python -m lora_gpt2.cli merge {run / 'adapter'} --output small/merged"
    for command in (training, merging):
        done = on_disk("1m", f"mount -o remount,ro small; {command}")
        assert done.returncode == 1
        assert "Read-only file system" in done.stderr
        assert done.stderr.splitlines()[-1].endswith("; give another folder")
        assert "Traceback" not in done.stderr
