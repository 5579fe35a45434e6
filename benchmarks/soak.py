"""Long and large runs: does memory stay flat, and how soon does a corpus of any size start?

    python benchmarks/soak.py steps --count 5000
    python benchmarks/soak.py rows --count 10000000 --folder FOLDER      needs 6 GB of disk
    python benchmarks/soak.py predictions --count 100000 --folder FOLDER

Each is a process of its own, ``train.py`` or ``generate.py``, whose memory is read from outside twice a
second: RSS, and the part of it that is not a file's pages (those the system takes back when it needs room).
Linux only.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
from machine import machine

from lora_gpt2.data.encode import FORMAT, META
from lora_gpt2.data.jsonl import TextRow, write_text_rows
from lora_gpt2.data.tokenizer import load_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[1]
MODEL = ["model.n_layer=2", "model.n_embd=64", "model.n_head=2"]
SMALL = [*MODEL, "lora=qv", "logger=none", "callbacks.progress.every=0"]
_BLOCK = 100_000
"""So many different rows; a larger corpus repeats them, each time with another number before them."""


class Sample(NamedTuple):
    seconds: float
    step: int
    resident: int
    own: int
    """Of `resident`, in bytes: what is not a file's pages."""


def watch(script: str, arguments: list[str]) -> list[Sample]:
    """The memory of a run from its start to its end, and how many steps or contexts were done."""
    command = [sys.executable, str(ROOT / script), *arguments]
    start, samples = time.monotonic(), []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdout is not None
        last = 0.0
        for line in process.stdout:
            if found := re.match(r"  (?:step|decoded) (\d+)/", line):
                step = int(found[1])
                now = time.monotonic() - start
                if now - last > 0.5 or step <= 1:
                    samples.append(Sample(now, step, *_memory(process.pid)))
                    last = now
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return samples


def _memory(pid: int) -> tuple[int, int]:
    held = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return tuple(1024 * int(held[name].split()[0]) for name in ("VmRSS", "RssAnon"))  # type: ignore[return-value]


def steps(count: int) -> dict[str, Any]:
    """Memory over many steps, with a validation every thousand."""
    samples = watch("train.py", [*SMALL, "data=demo", f"trainer.max_steps={count}", "trainer.max_epochs=-1",
                                 "trainer.val_check_interval=1000", "trainer.check_val_every_n_epoch=null",
                                 "callbacks.last.every_n_train_steps=500"])  # fmt: skip
    return {"steps": samples[-1].step, **_growth(samples, count)}


def _growth(samples: list[Sample], count: int) -> dict[str, float]:
    """From a fifth of the way on, when all that is kept has been made once."""
    settled = [one for one in samples if one.step > count // 5]
    slope = np.polyfit([one.step for one in settled], [one.own for one in settled], 1)[0]
    return {
        "seconds": round(samples[-1].seconds, 1),
        "resident_mb_at_a_fifth": round(settled[0].resident / 1e6, 1),
        "resident_mb_at_the_end": round(settled[-1].resident / 1e6, 1),
        "own_mb_at_a_fifth": round(settled[0].own / 1e6, 1),
        "own_mb_at_the_end": round(settled[-1].own / 1e6, 1),
        "own_kb_per_thousand": round(float(slope), 1),
    }


def predictions(count: int, folder: Path) -> dict[str, Any]:
    """Memory while `count` different contexts are decoded, and how many come out."""
    if not (folder / META).is_file():
        _write_corpus(count, folder)
        texts = (TextRow(f"row {number}", "a text") for number in range(count))
        write_text_rows(folder / "train.text.jsonl", texts)  # what is decoded is scored
    data = ["data=jsonl", f"data.root={folder}", f"data.cache={folder / 'cache'}", "data.seq_len=64"]
    base, run = folder / "base", folder / "run"
    training = ["logger=none", "trainer.max_steps=20", "trainer.limit_val_batches=0"]
    watch("train.py", [*MODEL, *data, *training, "callbacks.progress.every=0", f"hydra.run.dir={base}"])
    decoding = ["decoding.beam_size=2", "decoding.eval_len=8", "decoding.batch_size=64"]
    samples = watch("generate.py", [*data, *decoding, "split=train", f"base={base}", f"hydra.run.dir={run}",
                                    "callbacks.progress.every=0.2"])  # fmt: skip
    with open(run / "predictions.jsonl", "rb") as written:
        return {"rows": count, "predictions": sum(1 for _ in written), **_growth(samples, count)}


def rows(count: int, folder: Path) -> dict[str, Any]:
    """Start and memory of a corpus of `count` rows, the first time and again."""
    if not (folder / META).is_file():
        _write_corpus(count, folder)
    where = ["data=jsonl", f"data.root={folder}", f"data.cache={folder / 'cache'}", "data.seq_len=64"]
    arguments = [*SMALL, *where, "trainer.max_steps=20", "trainer.limit_val_batches=0"]
    found: dict[str, Any] = {
        "rows": count,
        "jsonl_gb": round((folder / "train.jsonl").stat().st_size / 1e9, 2),
    }
    for name in ("first", "again"):
        samples = watch("train.py", arguments)
        found[name] = {
            "seconds_to_the_first_step": round(samples[0].seconds, 1),
            "most_own_mb": round(max(one.own for one in samples) / 1e6, 1),
            "most_resident_mb": round(max(one.resident for one in samples) / 1e6, 1),
        }
    return found


def _write_corpus(count: int, folder: Path) -> None:
    random = Random(0)
    words = ["name", "food", "area", "river", "cheap", "pub", "coffee", "near", "family", "rated"]
    tokenizer = train_tokenizer([" ".join(random.choices(words, k=2000))], 300)
    tokenizer.save(folder / "tokenizer")
    about = load_tokenizer(str(folder / "tokenizer"))
    end = about.end_token
    block = []
    for _ in range(min(_BLOCK, count)):
        context, completion = (random.choices(range(end), k=random.randint(8, 30)) for _ in range(2))
        block.append(f'{[*context, end]}, "completion": {[*completion, end]}}}\n'.removeprefix("["))
    for split, size in (("train", count), ("valid", 100)):
        with open(folder / f"{split}.jsonl", "w") as file:
            for number in range(size):
                file.write(f'{{"context": [{number // _BLOCK % end}, {block[number % len(block)]}')
    source = {"source": "soak", "vocab_size": about.vocab_size, "end_token": end, "sha256": about.sha256}
    split = {"rows": count, "contexts": count, "context_tokens": 20, "completion_tokens": 20, "longest": 62}
    meta = {"format": FORMAT, "corpus": "jsonl", "tokenizer": source, "splits": {"train": split}}
    (folder / META).write_text(json.dumps(meta))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["steps", "rows", "predictions"])
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--output", type=Path, help="Where the result is kept as JSON.")
    given = parser.parse_args()
    if given.kind != "steps" and given.folder is None:
        parser.error(f"{given.kind} needs a --folder")
    if given.kind == "steps":
        found = steps(given.count)
    else:
        found = {"rows": rows, "predictions": predictions}[given.kind](given.count, given.folder)
    told = json.dumps({**found, "machine": machine()}, indent=2)
    print(told)
    if given.output:
        given.output.write_text(told + "\n")


if __name__ == "__main__":
    main()
