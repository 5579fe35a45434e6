"""What several tests share: a tiny corpus, and what was trained on it."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

os.environ.setdefault("OMP_NUM_THREADS", "1")  # models are tiny, and workers as many as cores

import hypothesis
import pytest
from hydra import compose, initialize_config_module

from lora_gpt2 import experiment, gate, jobs, settings
from lora_gpt2.data.jsonl import TextRow, write_text_rows
from lora_gpt2.playground import server
from lora_gpt2.playground.models import Playground, open_playground

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.register_profile(  # for make mutants: that it fails is enough
    "unshrunk", deadline=None, derandomize=True, phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate]
)
hypothesis.settings.load_profile("repeatable")

needs_compiler = pytest.mark.skipif(
    not shutil.which("g++"), reason="compile=true on a CPU needs a C++ compiler, which pip cannot install"
)

ROOT = Path(__file__).parents[1]
TINY = ["model.n_layer=2", "model.n_embd=16", "model.n_head=2", "model.n_positions=64", "data.seq_len=64"]


def settings_of(script: str, overrides: list[str]) -> Any:
    """The settings that ``python SCRIPT.py OVERRIDES`` would run with."""
    gate.register()
    with initialize_config_module("configs", version_base="1.3"):
        cfg = compose(script, overrides=overrides)
    schema = settings.TrainSettings if script == "train" else settings.GenerateSettings
    return gate.resolve(cfg, schema)


def train(folder: Path, *overrides: str) -> float | None:
    folder.mkdir(parents=True, exist_ok=True)
    return experiment.train(settings_of("train", list(overrides)), folder)


def generate(folder: Path, *overrides: str, meteor: bool = False) -> dict[str, Any] | None:
    """`meteor`: scored by METEOR too, whose start takes ten seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        if not meteor:
            patch.setattr("lora_gpt2.evaluation.meteor.find_jar", lambda name: None)
        return experiment.generate(settings_of("generate", list(overrides)), folder)


def script(name: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """``python NAME.py ARGUMENTS``, with these variables and none that W&B would read."""
    return _ran([str(ROOT / f"{name}.py"), *map(str, arguments)], variables)


def cli(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """``lora-gpt2 ARGUMENTS``, likewise."""
    return _ran(["-m", "lora_gpt2.cli", *map(str, arguments)], variables)


def _ran(arguments: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return subprocess.run(
        command, env={**clean, **variables}, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory):
    """Encoded corpora of tests are kept for the session, away from the user's. Our callbacks may be built."""
    cache = str(tmp_path_factory.getbasetemp() / "cache")
    with mock.patch.dict(os.environ, LORA_GPT2_CACHE=cache, LORA_GPT2_TARGETS="tests."):
        yield


@pytest.fixture(autouse=True)
def _environment_as_it_was():
    """What a test leaves there goes with the test."""
    with mock.patch.dict(os.environ):
        yield


def tiny_rows(count: int, seed: int) -> list[TextRow]:
    """Rows of 1 to 4 words and their repetition; two rows for most contexts."""
    random = Random(seed)
    words = ["red", "green", "blue", "old", "new", "small", "large", "cat", "dog", "fox", "bird", "tree"]
    contexts = [" ".join(random.choices(words, k=random.randint(1, 4))) for _ in range((count + 1) // 2)]
    return [TextRow(contexts[i // 2], f"{contexts[i // 2]} !" + " ?" * (i % 2)) for i in range(count)]


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> Path:
    """A folder of text rows: 41 train, 9 valid, 7 test."""
    folder = tmp_path_factory.mktemp("corpus")
    for seed, (split, count) in enumerate({"train": 41, "valid": 9, "test": 7}.items()):
        write_text_rows(folder / f"{split}.jsonl", tiny_rows(count, seed))
    return folder


@pytest.fixture
def tiny(tiny_corpus) -> list[str]:
    """Overrides for training a tiny model on the tiny corpus: 6 steps an epoch."""
    return [*TINY, "data=jsonl", f"data.root={tiny_corpus}", "data.tokenizer=corpus:280", "data.batch_size=7",
            "optimizer.warmup_steps=2", "optimizer.lr=1e-2", "trainer.max_epochs=3"]  # fmt: skip


@pytest.fixture(scope="session")
def run(tmp_path_factory, tiny_corpus) -> Path:
    """A base that has learned to repeat its input, and two adapters over it."""
    folder = tmp_path_factory.mktemp("run")
    common = [
        *TINY,
        "data=jsonl",
        f"data.root={tiny_corpus}",
        "optimizer.lr=1e-2",
        "optimizer.warmup_steps=2",
    ]
    train(folder / "base", *common, "data.tokenizer=corpus:280", "trainer.max_epochs=20")
    over = [*common, "lora=qv", f"base={folder / 'base'}", "trainer.max_epochs=1"]
    train(folder / "adapter", *over)
    strong = ["optimizer.lr=5e-2", "trainer.max_epochs=4", "keep=last", "data.objective=jlm"]
    train(folder / "other", *over, *strong, "lora.rank=2", "lora.targets=[q,k,mlp_c_fc]")
    return folder


@pytest.fixture(scope="session")
def swept(tmp_path_factory, run, tiny_corpus):
    """A sweep of two ranks, each decoded and scored, without METEOR."""
    folder = tmp_path_factory.mktemp("swept")
    common = [*TINY,
              "data=jsonl", f"data.root={tiny_corpus}", "lora=qv", f"base={run / 'base'}", "score=valid",
              "decoding.eval_len=16", "decoding.beam_size=2", "trainer.max_epochs=2",
              "trainer.log_every_n_steps=1"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_gpt2.evaluation.meteor.find_jar", lambda name: None)
        for name, rank in (("0", 1), ("1", 2)):
            overrides = [*common, f"lora.rank={rank}"]
            (folder / name).mkdir()
            work = lambda settings, place, given=overrides: train(place, *given)  # noqa: E731
            jobs.run(settings_of("train", overrides), folder / name, work, once=True)
    return folder


@pytest.fixture(scope="session")
def playground(run) -> Playground:
    return open_playground([str(run / name) for name in ("adapter", "other", "base")])


@pytest.fixture(scope="session")
def address(playground) -> str:
    """Of a server on a free port."""
    told: list[str] = []
    there = threading.Event()

    def tell(where: str) -> None:
        told.append(where)
        there.set()

    threading.Thread(target=server.serve, args=(playground, 0, tell), daemon=True).start()
    assert there.wait(30)
    assert urlsplit(told[0]).hostname == "127.0.0.1"
    return told[0]
