"""Sweeps: jobs in one folder, begun again by what lies there and no more, and one table of all."""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from lora_gpt2 import cli, jobs, launch
from lora_gpt2.errors import UserError
from lora_gpt2.gate import register
from lora_gpt2.jobs import Job, State
from lora_gpt2.reporting import sweep
from lora_gpt2.sweeps import SWEEP_FILE, Sweep, planned
from tests.conftest import ROOT, settings_of, train


@pytest.fixture
def main(monkeypatch, capsys):
    """Runs train.py or the tools in this process, without METEOR; returns the exit code and what was said."""
    monkeypatch.setattr("lora_gpt2.evaluation.meteor.find_jar", lambda name: None)

    def call(function, *arguments: object) -> tuple[object, str]:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py"), *map(str, arguments)])
        code: object = 0
        try:
            function()
        except SystemExit as end:
            code = end.code or 0
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


def train_py() -> None:
    hydra.main(version_base="1.3", config_path="pkg://configs", config_name="train")(launch.launch)()


def test_a_sweep_is_trained_scored_resumed_and_compared(tmp_path, tiny, run, main):
    """Of six jobs two fail: PiSSA cannot start a rank that large."""
    arguments = [*tiny, "lora=qv", f"base={run / 'base'}", "trainer.max_epochs=1", "lora.init=pissa",
                 "logger=none", "score=valid", "limit=3", "decoding.eval_len=6", "decoding.beam_size=2",
                 "lora.rank=1,999,2", "seed=1,2", "lora.alpha=${lora.rank}",
                 f"hydra.sweep.dir={tmp_path}"]  # fmt: skip
    register()
    code, said = main(train_py, "-m", *arguments)
    assert code == 1
    assert "needs ranks of at most n_embd 16, not 999" in said
    states = {name: job.state.value for name, job in jobs.jobs(tmp_path).items()}
    assert list(states.values()) == ["finished"] * 2 + ["failed"] * 2 + ["finished"] * 2
    assert all((tmp_path / name / "scores.json").is_file() == (states[name] == "finished") for name in states)
    before = {name: (tmp_path / name / "status.json").stat().st_mtime_ns for name in "0145"}

    replace(Job.read(tmp_path / "5"), state=State.running, process=2**22 + 1).write(tmp_path / "5")
    (tmp_path / "4" / "status.json").unlink()
    _, listed = main(cli.main, "sweep", "status", tmp_path)
    assert ("cut off" in listed, "not begun" in listed, "2 of 6 are finished" in listed) == (True, True, True)
    _, said = main(cli.main, "sweep", "resume", tmp_path)
    assert said.count("finished already") == 2
    after = {name: (tmp_path / name / "status.json").stat().st_mtime_ns for name in "0145"}
    assert [name for name in before if before[name] != after[name]] == ["4", "5"]
    finished = [job.settings for job in jobs.jobs(tmp_path).values() if job.state is State.finished]
    assert [(one["lora.rank"], one["lora.alpha"]) for one in finished] == [(1, 1), (1, 1), (2, 2), (2, 2)]

    code, printed = main(cli.main, "sweep", "table", tmp_path, "--by", "valid_loss", "--json")
    assert code == 0
    found = json.loads(printed)
    assert sorted(point["settings"]["lora.rank"] for point in found) == [1, 2]
    assert found[0]["mean"]["valid_loss"] <= found[1]["mean"]["valid_loss"]
    assert all(len(values) == 2 for point in found for values in point["values"].values())
    assert {"valid_loss", "bleu", "nist", "rouge_l", "cider"} <= found[0]["values"].keys()
    _, shown = main(cli.main, "sweep", "table", tmp_path)
    assert "lora.rank" in shown
    assert "±" in shown


NUMBERED = "${hydra.job.num}"


def note_sweep(
    folder: Path, cwd: Path, hydra: Sequence[str] = (), task: Sequence[str] = (), subdir: str = NUMBERED
) -> None:
    """Hydra's own notes of a sweep, as far as they are read."""
    noted = {
        "overrides": {"hydra": list(hydra), "task": list(task)},
        "runtime": {"cwd": str(cwd)},
        "sweeper": {"params": None},
        "sweep": {"subdir": subdir},
    }
    (folder / SWEEP_FILE).write_text(json.dumps({"hydra": noted}))


@pytest.mark.parametrize(
    "override",
    [
        "+hydra.callbacks.x={_target_: lora_gpt2.launch.OwnFolder}",
        "hydra.launcher.setup=[touch]",
        "hydra.launcher._target_=os.system",
        "hydra.searchpath=[file:///elsewhere]",
        "hydra.launcher.partition='gpu\ntouch x\n#'",
        "hydra/launcher=../elsewhere",
        "--config-dir=elsewhere",
        "demo=../../elsewhere",
        "+lora=qv,/elsewhere",
        "demo@hydra.callbacks=base",
    ],
)
@pytest.mark.parametrize("place", ["hydra", "task"])
def test_what_a_sweep_s_folder_may_not_ask_for_is_refused(tmp_path, main, place, override):
    note_sweep(tmp_path, ROOT, **{place: [override]})
    told, _ = main(cli.main, "sweep", "resume", tmp_path)
    assert f"asks for {override}, which is not done at a file's word" in told


def test_what_a_sweep_is_asked_for_elsewhere_is_taken_from_its_folder(tmp_path, main, monkeypatch):
    harmless = ["hydra/launcher=basic", "hydra.launcher.partition='a b'", "hydra.sweeper.max_batch_size=1",
                "hydra.sweep.dir=outputs/sweeps/a", "hydra.mode=MULTIRUN"]  # fmt: skip
    task = ["model=gpt2.sm,gpt2.md", "~callbacks.guards", "demo=base", "base=../run", "data.root='/a b'",
            "point={seed:1},{seed:2}", "callbacks@callbacks=default"]  # fmt: skip
    note_sweep(tmp_path, ROOT, hydra=harmless, task=task[:-1])
    asked = []
    monkeypatch.setattr(launch, "main", lambda: asked.extend(sys.argv[1:]))
    assert main(cli.main, "sweep", "resume", tmp_path)[0] == 0
    assert asked == [*harmless, *task[:-1], f"hydra.sweep.dir='{tmp_path}'"]
    note_sweep(tmp_path, ROOT, task=task)
    assert "asks for callbacks@callbacks=default" in main(cli.main, "sweep", "resume", tmp_path)[0]


def test_jobs_whose_values_came_from_elsewhere_are_listed_once_begun(tmp_path):
    note_sweep(tmp_path, ROOT, task=["seed=${oc.env:SEEDS}"])
    for name in ("0", "10", "9", "of another kind"):
        (tmp_path / name / ".hydra").mkdir(parents=True)
        (tmp_path / name / ".hydra" / "overrides.yaml").write_text(f"[seed={name}]")
        Job({}, State.finished, "today").write(tmp_path / name)
    found = planned(tmp_path)
    assert list(found) == ["0", "9", "10", "of another kind"]
    assert (found["9"], found["10"]) == (["seed=9"], ["seed=10"])


@pytest.mark.parametrize("letter", ["s", ""], ids=["names", "other numbers"])
def test_jobs_that_have_names_are_listed_by_them_and_gone_on_with(tmp_path, main, letter):
    subdir = f"{letter}${{seed}}"
    asked = ["-m", "seed=1,2,3", f"hydra.sweep.subdir={subdir}", f"hydra.sweep.dir={tmp_path}"]
    note_sweep(tmp_path, ROOT, task=["seed=1,2,3"], subdir=subdir)
    for seed in (1, 2):
        place, work = tmp_path / f"{letter}{seed}", lambda *_: 1.5
        (place / ".hydra").mkdir(parents=True)
        (place / ".hydra" / "overrides.yaml").write_text(f"[seed={seed}]")
        jobs.run(settings_of("train", [f"seed={seed}"]), place, work, once=True)
    expected = {f"{letter}1": ["seed=1"], f"{letter}2": ["seed=2"], "#2": ["seed=3"]}
    assert planned(tmp_path) == expected
    code, said = main(launch.main, *asked, "lora=qv")
    assert code == 1
    assert f"holds 2 jobs, and this sweep of 3 has none that is {letter}" in said
    assert planned(tmp_path) == expected, "nothing was written"
    code, said = main(launch.main, *(one.replace("1,2,3", "2,1") for one in asked))
    assert (code, said.count("finished already")) == (0, 2), said


def test_a_sweep_goes_on_where_it_was_begun(tmp_path, main):
    """A file does not choose the folder from which Python would import."""
    note_sweep(tmp_path, tmp_path, task=["seed=1,2"])
    told, _ = main(cli.main, "sweep", "resume", tmp_path)
    assert f"was begun in {tmp_path}, from where its paths are meant; go there first" in told


@pytest.mark.parametrize(
    "text",
    ["", "[", "1", "[1]", "hydra: 1", "hydra: {}", "a: &a [*a]", "!!python/object:os.system x",
     "hydra: {overrides: {hydra: [], task: [1]}, runtime: {cwd: .}, sweeper: {params: }, sweep: {subdir: a}}",
     "hydra: {overrides: {hydra: [], task: []}, runtime: {cwd: .}, sweeper: {params: a}, sweep: {subdir: a}}",
     "hydra: {overrides: {hydra: [], task: []}, runtime: {cwd: .}, sweeper: {params: null}, sweep: []}",
     "a: !!set {b}", "a: !!timestamp 2020-01-01", 'a: "${"', "9" * 5000],
)  # fmt: skip
@pytest.mark.parametrize("asked", ["resume", "status"])
def test_a_file_that_tells_of_no_sweep_is_told(tmp_path, main, text, asked):
    (tmp_path / SWEEP_FILE).write_text(text)
    told, _ = main(cli.main, "sweep", asked, tmp_path)
    assert f"{tmp_path / SWEEP_FILE}: does not tell of a sweep" in told


@pytest.mark.parametrize("override", ["seed=[", "-x", "lora.rank=interval(1,2)"])
def test_overrides_that_are_none_are_told(tmp_path, main, override):
    note_sweep(tmp_path, ROOT, task=[override])
    told, _ = main(cli.main, "sweep", "status", tmp_path)
    assert f"{tmp_path / SWEEP_FILE}: does not tell of a sweep: " in told


def test_a_sweep_s_values_may_come_from_the_environment(monkeypatch):
    """Hydra's sweeper resolves them, and leaves the rest to the jobs."""
    monkeypatch.setenv("SEEDS", "1,2")
    noted = {
        "overrides": {"hydra": [], "task": ["lora=qv"]},
        "runtime": {"cwd": "."},
        "sweeper": {"params": {"seed": "${oc.env:SEEDS}"}},
        "sweep": {"subdir": NUMBERED},
    }
    asked = Sweep.composed(OmegaConf.create(noted)).jobs()
    assert asked == {"0": ["seed=1", "lora=qv"], "1": ["seed=2", "lora=qv"]}


def test_a_sweep_whose_settings_name_its_folders_is_given_again(tmp_path, main):
    for seed in (1, 2):
        (tmp_path / str(seed - 1)).mkdir()
        work = lambda *_: 1.5  # noqa: E731
        jobs.run(settings_of("train", [f"seed={seed}"]), tmp_path / str(seed - 1), work, once=True)
    own = "+trainer.default_root_dir=${hydra:runtime.output_dir}"
    asked = ["-m", "seed=1,2", "dry_run=true"]
    code, said = main(launch.main, *asked, own, f"hydra.sweep.dir={tmp_path}")
    assert (code, said.count("corpus demo")) == (0, 2), said


def test_a_refused_sweep_leaves_no_trace(tmp_path, main):
    asked = ["-m", "lora=qv", "seed=1,2", f"hydra.sweep.dir={tmp_path}"]
    for number, seed in enumerate((1, 2)):
        (tmp_path / str(number)).mkdir()
        jobs.run(
            settings_of("train", ["lora=qv", f"seed={seed}"]),
            tmp_path / str(number),
            lambda *_: 1.5,
            once=True,
        )
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for more, message in (
        (
            ["lora.rank=2"],
            "0: holds a job of other settings: lora.rank 4 (here 2); give another hydra.sweep.dir",
        ),
        (["score=none"], "score must be train, valid or test, or null, not none"),
        (["seed=1"], "holds 2 jobs, and this sweep of 1 has none that is 1"),
    ):
        code, said = main(launch.main, *asked, *more)
        assert code == 1
        assert message in said
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert main(launch.main, *asked)[0] == 0, "the same again is none of this"


def test_points_and_ratios():
    run = settings_of("train", ["lora=qv", "point={lora.rank:2,lora.alpha:8,optimizer.lr:0.1}"])
    assert (run.lora.rank, run.lora.alpha, run.optimizer.lr) == (2, 8, 0.1)
    assert settings_of("train", ["lora=qv", "lora.rank=8", "lora.alpha_ratio=2"]).lora.alpha == 16
    several = settings_of("train", ["lora=qv", "lora.rank=[1,4]", "lora.alpha_ratio=2"])
    assert [member.lora.alpha for member in several.members().values()] == [2, 8]


def test_several_adapters_at_once_are_points_too(tmp_path, tiny, run):
    arguments = [
        *tiny,
        "lora=qv",
        f"base={run / 'base'}",
        "lora.rank=[1,2]",
        "trainer.max_epochs=1",
        "logger=none",
    ]
    jobs.run(settings_of("train", arguments), tmp_path, lambda *_: train(tmp_path, *arguments), once=False)
    found = sweep.points({place: job.settings for place, job in jobs.adapters(tmp_path).items()})
    assert sorted(point.settings["lora.rank"] for point in found) == [1, 2]
    assert {point.settings["lora.rank"]: point.parameters for point in found}[2] == 2 * min(
        point.parameters for point in found
    )
    with pytest.raises(UserError, match="no run has meteor; there are valid_loss"):
        sweep.points({place: job.settings for place, job in jobs.adapters(tmp_path).items()}, "meteor")


@pytest.mark.parametrize(
    ("change", "beside"),
    [({}, 0.7038), ({"score": "valid"}, None), ({"limit": 100}, None), ({"model.name": "gpt2.sm"}, None)],
    ids=str,
)
def test_the_papers_figures_stand_beside_its_own_model_corpus_and_test_set(swept, change, beside):
    ours = {"model.name": "gpt2.md", "data.corpus": "e2e", "score": "test", "limit": None, "lora.rank": 4}
    (point,) = sweep.points({swept / "0": {**ours, **change}})
    assert (point.paper or {}).get("bleu") == beside


def test_figures_that_are_not_finite_are_none(swept, tmp_path):
    shutil.copytree(swept / "0", tmp_path / "0")
    scores = json.loads((tmp_path / "0" / "scores.json").read_text())
    (tmp_path / "0" / "scores.json").write_text(json.dumps({**scores, "bleu": float("nan")}))
    found = sweep.metrics(tmp_path / "0")
    assert "bleu" not in found
    assert "nist" in found
    assert sweep.deciding([found, {"bleu": 1.0, "valid_loss": 2.0}]) == "valid_loss"
