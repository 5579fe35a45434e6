"""Beam search side by side: lora-gpt2, transformers and CTranslate2 on the same weights and contexts.

    python benchmarks/decoding.py                              gpt2.sm's size, random weights and contexts
    python benchmarks/decoding.py --model FOLDER --contexts FILE.jsonl --ends 0
                                 what `lora-gpt2 merge` wrote, and each different context of a BPE JSONL file

Every measurement is a process of its own that first decodes two contexts to warm up; programs take turns.
Prints medians over the repeats, ratios to the best peer, and peak memory. Without `--ends` nothing ends
early. `--scores` compares the outputs: the share that differs from the first program's, and the five scores,
for contexts that `lora-gpt2 encode` wrote. `--output FOLDER` keeps figures and outputs.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cards import SIZES
from decoding_programs import OPENERS, Contexts
from machine import machine, peak_memory

CPU_PROGRAMS = [
    "ours:float32:16",
    "ours:bfloat16:16",
    "ours:int8:16",
    "transformers:float32:16",
    "transformers:bfloat16:16",
    "ctranslate2:float32:8",
    "ctranslate2:int8:8",
]
GPU_PROGRAMS = ["ours:bfloat16:64", "transformers:bfloat16:64", "transformers-static:bfloat16:64"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gpt2.sm", help=f"{', '.join(SIZES)}, or a folder")
    parser.add_argument("--contexts", type=Path, help="BPE JSONL")
    parser.add_argument("--count", type=int, default=32, help="contexts; 0: all")
    parser.add_argument("--ends", type=int, nargs="*", default=[], help="tokens that end an output")
    parser.add_argument("--programs", nargs="*", metavar="NAME:TYPE:BATCH")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--beams", type=int, default=10)
    parser.add_argument("--eval-len", type=int, default=64)
    parser.add_argument("--ngram", type=int, default=4)
    parser.add_argument("--length-penalty", type=float, default=0.9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scores", action="store_true", help="needs --contexts")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.scores and options.contexts is None:
        parser.error("--scores needs --contexts")
    if options.one:
        measure(options, *options.one)
        return
    with tempfile.TemporaryDirectory() as folder:
        results = compare(options, Path(folder))
        report(options, results, quality(options, list(results), Path(folder)) if options.scores else {})


def compare(options: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Each program's measurements."""
    programs = options.programs or (CPU_PROGRAMS if options.device == "cpu" else GPU_PROGRAMS)
    model = model_folder(options.model, folder)
    contexts = read_contexts(options.contexts, model, options.count)
    (folder / "contexts.json").write_text(json.dumps(contexts))
    if any(program.startswith("ctranslate2") for program in programs):
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(str(model)).convert(str(folder / "ctranslate2"))
    results: dict[str, list[dict[str, Any]]] = {program: [] for program in programs}
    for repeat in range(options.repeats):
        for program in programs:
            arguments = [*sys.argv[1:], "--one", program, str(model), str(folder)]
            done = subprocess.run(
                [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True
            )
            found = json.loads(done.stdout.splitlines()[-1])
            results[program].append(found)
            speed = len(contexts) / found["seconds"]
            print(
                f"run {repeat + 1}  {program:<28} {speed:8.3f} contexts/s  {found['peak_gb']:.2f} GB",
                flush=True,
            )
    return results


def model_folder(model: str, folder: Path) -> Path:
    """The model in transformers' form; a card's with random weights."""
    if model not in SIZES:
        return Path(model).resolve()
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**SIZES[model])).save_pretrained(folder / "model")
    vocabulary = {f"t{i}": i for i in range(50256)} | {"<|endoftext|>": 50256}  # CTranslate2 asks for one
    (folder / "model" / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "model" / "merges.txt").write_text("#version: 0.2\n")
    return folder / "model"


def read_contexts(path: Path | None, model: Path, count: int) -> Contexts:
    """The file's different contexts in order, or random ones as long as those of E2E."""
    if path is None:
        vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
        rng = random.Random(0)
        return [[rng.randrange(vocabulary) for _ in range(rng.randint(20, 60))] for _ in range(count or 32)]
    rows = (tuple(json.loads(line)["context"]) for line in path.read_text().splitlines())
    different = [list(context) for context in dict.fromkeys(rows)]
    if not count or count >= len(different):
        return different
    return [different[i * len(different) // count] for i in range(count)]


def measure(options: argparse.Namespace, program: str, model: str, folder: str) -> None:
    """Prints seconds and peak memory of one program as JSON; its outputs go to a file."""
    name, dtype, batch = program.split(":")
    contexts = json.loads((Path(folder) / "contexts.json").read_text())
    opened = OPENERS[name](options, dtype, int(batch), Path(model), Path(folder))
    opened(contexts[:2])
    start = time.perf_counter()
    outputs = opened(contexts)
    seconds = time.perf_counter() - start
    lines = [json.dumps({"id": i, "predict": tokens}) + "\n" for i, tokens in enumerate(outputs)]
    for place in filter(None, (Path(folder), options.output)):
        place.mkdir(parents=True, exist_ok=True)
        (place / kept(program)).write_text("".join(lines))
    print(json.dumps({"seconds": seconds, "peak_gb": peak_memory(options.device)}))


def kept(program: str) -> str:
    """The file of a program's outputs."""
    return f"{program.replace(':', '-')}.jsonl"


def quality(options: argparse.Namespace, programs: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Of each program's outputs, the share that differs from the first one's, and the scores."""
    from lora_gpt2.data.jsonl import read_text_rows
    from lora_gpt2.data.tokenizer import load_tokenizer
    from lora_gpt2.evaluation.scorer import score_e2e, scores_as_dict

    clean = load_tokenizer(str(model_folder(options.model, folder))).clean
    contexts = [tuple(json.loads(line)["context"]) for line in options.contexts.read_text().splitlines()]
    asked = map(tuple, json.loads((folder / "contexts.json").read_text()))
    references: dict[tuple[int, ...], list[str]] = {context: [] for context in asked}
    for context, row in zip(
        contexts, read_text_rows(options.contexts.with_suffix(".text.jsonl")), strict=True
    ):
        references.get(context, []).append(row.completion)
    outputs = {
        program: [json.loads(line)["predict"] for line in (folder / kept(program)).read_text().splitlines()]
        for program in programs
    }
    found: dict[str, dict[str, Any]] = {}
    for program, own in outputs.items():
        texts = [clean(tokens) for tokens in own]
        pairs = zip(texts, map(clean, outputs[programs[0]]), strict=True)
        differ = sum(text != other for text, other in pairs) / len(texts)
        scores = scores_as_dict(score_e2e(texts, list(references.values())))
        numbers = {name: value for name, value in scores.items() if isinstance(value, float)}
        found[program] = {"differ": differ, **numbers}
        print(f"{program:<30} {differ:.1%} differ " + "".join(f" {k} {v:.4f}" for k, v in numbers.items()))
    return found


def report(
    options: argparse.Namespace, results: dict[str, list[dict[str, Any]]], scores: dict[str, Any]
) -> None:
    """Prints the table and keeps it."""
    medians = {
        program: statistics.median(run["seconds"] for run in runs) for program, runs in results.items()
    }
    peers = [seconds for program, seconds in medians.items() if not program.startswith("ours")]
    print(f"\n{'program':<30} {'seconds':>9} {'spread':>15} {'peak GB':>8} {'x best peer':>12}")
    for program, runs in results.items():
        seconds = [run["seconds"] for run in runs]
        ratio = f"{min(peers) / medians[program]:.2f}" if peers else "n/a"
        spread = f"{min(seconds):.1f}-{max(seconds):.1f}"
        memory = max(run["peak_gb"] for run in runs)
        print(f"{program:<30} {medians[program]:>9.1f} {spread:>15} {memory:>8.2f} {ratio:>12}")
    if options.output:
        contexts = options.contexts and options.contexts.name
        named = {**vars(options), "model": Path(options.model).name, "contexts": contexts}
        settings = {name: str(value) for name, value in named.items() if name not in ("output", "one")}
        about = {"settings": settings, **machine(), "runs": results}
        about |= {"scores": scores} if scores else {}
        (options.output / "results.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
