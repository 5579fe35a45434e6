"""Every command and every line of Python that the README and the pages under docs/ show runs."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_gpt2.data.corpora import demo
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


PAGES = [
    (ROOT / "docs" / name).read_text(encoding="utf-8")
    for name in (
        "adapters.md",
        "decoding.md",
        "performance.md",
        "playground.md",
        "reliability.md",
        "sweeps.md",
    )
]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if not line.startswith("make ")]
ON_PAGES = [line for page in PAGES for block in blocks("bash", page) for line in block.splitlines()]
SMALL = ["model.n_layer=1", "model.n_embd=16", "model.n_head=2", "trainer.max_steps=2", "data.batch_size=2",
         "data.eval_batch_size=2"]  # fmt: skip
"""What makes any training of the README a matter of seconds."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the commands run: E2E and WEBNLG in small, and a file of hypotheses and one of references."""
    here = tmp_path_factory.mktemp("readme")
    (here / "E2E").mkdir()
    (here / "WEBNLG").mkdir()
    for split in ("train", "valid", "test"):
        rows = demo.rows("demo_base", split)[:12]
        (here / "E2E" / f"{split}.txt").write_text(
            "".join(f"{row.context}||{row.completion}\n" for row in rows), encoding="utf-8"
        )
    entry = (
        '<benchmark><entries><entry category="Airport" eid="1" size="1"><modifiedtripleset>'
        "<mtriple>Aarhus | leader | Jacob</mtriple></modifiedtripleset>"
        '<lex comment="good" lid="Id1">Jacob leads Aarhus.</lex></entry></entries></benchmark>'
    )
    (here / "WEBNLG" / "train.xml").write_text(entry, encoding="utf-8")
    (here / "hypotheses.txt").write_text("a dog ran .\n", encoding="utf-8")
    (here / "references.txt").write_text("a dog ran away .\n\n", encoding="utf-8")
    return here


def small(command: str) -> list[str]:
    """The command with this interpreter, and with a small model from random weights where it trains one."""
    program, *arguments = shlex.split(command)
    if program == "lora-gpt2":
        if arguments[:2] == ["sweep", "search"]:
            kept = [argument for argument in arguments if not argument.startswith("base=")]
            short = [*SMALL, "trainer.val_check_interval=1"]
            arguments = [*kept[: kept.index("--trials")], *short, "--trials", "1"]
        if arguments[0] == "verify-resume":
            arguments = [arguments[0], *SMALL, "--kills", "1", *arguments[-2:]]
        arguments += SMALL if arguments[0] == "plan" else []
        return [sys.executable, "-m", "lora_gpt2.cli", *arguments]
    script, *arguments = arguments
    assert program == "python"
    if script == "train.py" and "--help" not in arguments:
        scratch = "scratch=e2e" in arguments
        arguments = [argument for argument in arguments if not argument.startswith(("base=", "score="))]
        arguments += [*SMALL, *(["data.tokenizer=corpus:300"] if scratch else ["base=null"])]
    if script == "generate.py":
        arguments += ["decoding.eval_len=4", "decoding.beam_size=2"]
    return [sys.executable, str(ROOT / script), *arguments]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs(command, folder):
    done = subprocess.run(
        small(command), cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def adapters(folder, run, tiny_corpus) -> Path:
    """The same place with a base and two adapters in outputs/, and ROWS, of which one chooses an adapter."""
    shutil.copytree(run, folder / "outputs", dirs_exist_ok=True)
    (folder / "ROWS").mkdir()
    shutil.copy(tiny_corpus / "valid.jsonl", folder / "ROWS")
    rows = [json.loads(line) for line in (tiny_corpus / "test.jsonl").read_text().splitlines()]
    rows[0]["adapter"] = "other"
    (folder / "ROWS" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("command", ON_PAGES)
def test_a_command_of_a_page_runs(command, adapters):
    """In the order of the pages; training as in the README, decoding shortened."""
    arguments = small(command)
    if "generate.py" in command:
        arguments += ["data.seq_len=64", "limit=2"]
    if "serve" in arguments:
        serves([*arguments, "--port", "0"], adapters)
        return
    done = subprocess.run(arguments, cwd=adapters, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def serves(arguments: list[str], folder: Path) -> None:
    with subprocess.Popen(arguments, cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = server.stdout.readline()
        server.kill()
    assert address.startswith("http://127.0.0.1:")


def test_the_makes_of_the_readme_exist():
    makes = re.findall(r"^make ([\w-]+)$", README, flags=re.MULTILINE)
    assert makes
    targets = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", targets, flags=re.MULTILINE) for target in makes)


def test_the_python_of_the_readme_runs():
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("word", re.findall(r"`((?:trainer|logger|paper|scratch|demo)=[\w.-]+)`", README))
def test_a_choice_named_in_the_readme_exists(word):
    group, option = word.split("=")
    assert (ROOT / "configs" / group / f"{option}.yaml").is_file()
