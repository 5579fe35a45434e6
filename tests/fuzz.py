"""Coverage-guided fuzzing of whatever reads a file that somebody else may have written.

    python -m tests.fuzz TARGET [--inputs N]      needs: pip install atheris

Each input ends in a result or in our own error, within five seconds and 4 GB; anything else is a crash, which
libFuzzer prints and leaves in a file. Without a TARGET all run, one after the other, and a table is printed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

INPUTS = 150_000
"""Of each target."""

_SLOW = {"command line": 20}
"""Of these one in so many: Hydra takes a tenth of a second for each."""

Read = Callable[[Path], object]


def _drain(read: Callable[[Path], Iterable[object]]) -> Read:
    return lambda path: sum(1 for _ in read(path))


def _compose(path: Path) -> object:
    """The settings that a line of the file each would override."""
    from lora_gpt2.gate import composed

    return composed(path.read_text(errors="replace").splitlines())


def _vocabulary(path: Path) -> object:
    """A tokenizer's, whose only merge is of a and b."""
    from lora_gpt2.data.tokenizer import load_tokenizer

    path.with_name("merges.txt").write_text("a b\n")
    return load_tokenizer(str(path.parent))


def targets() -> dict[str, tuple[str, Read, list[bytes]]]:
    """By name: how the file is called, what reads it, and valid ones to begin with."""
    import torch
    from safetensors.torch import save

    from lora_gpt2.data.corpora import dart, e2e, webnlg
    from lora_gpt2.data.jsonl import read_rows, read_text_rows
    from lora_gpt2.data.tokenizer import load_tokenizer, train_tokenizer
    from lora_gpt2.evaluation.text_files import read_predictions, read_references
    from lora_gpt2.files import read_json
    from lora_gpt2.jobs import Job
    from lora_gpt2.model.config import GPT2Config
    from lora_gpt2.sweeps import SWEEP_FILE, planned
    from lora_gpt2.weights.store import read_pickle, read_weights

    held = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(1, dtype=torch.bfloat16)}
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"state_dict": held, "epoch": 1}, f"{folder}/new")
        torch.save({"state_dict": held}, f"{folder}/old", _use_new_zipfile_serialization=False)
        zipped, legacy = (Path(folder, name).read_bytes() for name in ("new", "old"))
    sizes = GPT2Config(lora_attn_dim=4).to_dict()
    about = {"format": 1, "kind": "adapter", "card": "x", "config": sizes, "tokenizer": ""}
    described = save(held, {"lora-gpt2": json.dumps(about)})
    text = b'{"context": "name : Aromi", "completion": "Aromi is a pub .", "require": ["pub"]}\n'
    lex = b"<lex comment='good' lid='Id1'>A is in B .</lex>"
    triple = b"<modifiedtripleset><mtriple>A | place | B</mtriple></modifiedtripleset>"
    xml = (
        b"<benchmark><entries><entry category='X' eid='1' size='1'>"
        + triple
        + lex
        + b"</entry></entries></benchmark>"
    )
    tripleset = {"tripleset": [["A", "place", "B"]], "annotations": [{"source": "x", "text": "A is in B ."}]}
    tokenizer = train_tokenizer(["ab ab"], vocab_size=258)
    status = {"settings": {}, "state": "running", "started": ""}
    asked = {"task": ["seed=1,2", "lora.alpha=${lora.rank}"], "hydra": ["hydra.mode=MULTIRUN"]}
    sweep = {"overrides": asked, "runtime": {"cwd": "."}, "sweeper": {"params": {"lora.rank": "2,4"}},
             "sweep": {"subdir": "${hydra.job.num}"}}  # fmt: skip
    return {
        "rows": ("train.jsonl", _drain(lambda path: read_rows(path, 50257)),
                 [b'{"context": [1, 2], "completion": [3], "require": [[4]], "adapter": "a"}\n']),
        "text rows": ("train.jsonl", _drain(read_text_rows), [text]),
        "E2E": ("train.csv", _drain(e2e.read), [b'mr,ref\n"name[Aromi], food[Chinese]",Aromi is a pub\n']),
        "WebNLG": ("train.xml", _drain(webnlg.read), [xml]),
        "DART": ("train.json", _drain(dart.read), [json.dumps([tripleset]).encode()]),
        "safetensors": ("a.safetensors", read_weights, [described, save(held)]),
        "checkpoint": ("a.ckpt", read_pickle, [zipped, legacy]),
        "merges": ("merges.txt", lambda path: load_tokenizer(str(path.parent)),
                   [b"#version: 0.2\na b\nab c\n"]),
        "vocabulary": ("vocab.json", _vocabulary, [json.dumps(tokenizer.vocabulary).encode()]),
        "status": ("status.json", lambda path: Job.read(path.parent), [json.dumps(status).encode()]),
        "sweep": (SWEEP_FILE, lambda path: planned(path.parent), [json.dumps({"hydra": sweep}).encode()]),
        "settings": ("a.json", lambda path: read_json(path, "x"), [b'{"a": [1, 2.5, null, "b"]}']),
        "references": ("a.txt", read_references, [b"one\ntwo\n\nthree\n"]),
        "predictions": ("a.txt", read_predictions, [b"one\ntwo\n"]),
        "command line": ("a.txt", _compose,
                         [b"lora=qv\nlora.rank=4\n", b"model=gpt2.sm\n~callbacks.guards\nlora.targets=[q]\n",
                          b"optimizer.lr=1e-3\ndata.root='a b'\npoint={seed: 2}\nlora.rank=4\n"]),
    }  # fmt: skip


def fuzz(name: str, inputs: int) -> None:
    """Runs one target in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=["lora_gpt2"]):
        file, read, seeds = targets()[name]
    from lora_gpt2.errors import UserError

    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    path, corpus = folder / file, folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
        path.write_bytes(seed)
        read(path)  # whatever it imports is imported by then

    def one(data: bytes) -> None:
        path.write_bytes(data)
        with suppress(UserError):
            read(path)

    limits = ["-timeout=5", "-rss_limit_mb=4096", "-max_len=8192", "-seed=1", "-print_final_stats=1"]
    atheris.Setup(
        ["fuzz", f"-runs={inputs}", *limits, f"-artifact_prefix={os.getcwd()}/{name}-", str(corpus)], one
    )
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("target", nargs="?")
    parser.add_argument("--inputs", type=int, default=INPUTS)
    given = parser.parse_args()
    if given.target:
        fuzz(given.target, given.inputs)
        return
    crashed = 0
    print("| target | inputs | seconds | crashes |\n| --- | --- | --- | --- |", flush=True)
    for name in targets():
        inputs = given.inputs // _SLOW.get(name, 1)
        command = [sys.executable, "-m", "tests.fuzz", name, "--inputs", str(inputs)]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        found = re.search(r"Done (\d+) runs in (\d+) second", done.stdout)
        tried, seconds = found.groups() if found else ("?", "?")
        print(f"| {name} | {tried} | {seconds} | {int(done.returncode != 0)} |", flush=True)
        if done.returncode:
            crashed += 1
            print("\n".join(done.stdout.splitlines()[-40:]), flush=True)
    sys.exit(min(crashed, 1))


if __name__ == "__main__":
    main()
