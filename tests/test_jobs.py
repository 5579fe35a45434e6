"""A job runs once to its end, whatever happens in between, and its folder tells how it stands."""

import json
import os
import signal
import socket
import time
from dataclasses import replace

import pytest
import torch

from lora_gpt2 import jobs
from lora_gpt2.errors import UserError
from lora_gpt2.jobs import Job, State
from lora_gpt2.settings import LAST_CHECKPOINT
from lora_gpt2.signals import Stopped
from tests.conftest import settings_of


class Work:
    """Counts its calls, and fails where it is told to."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error, self.resumed = error, []

    def __call__(self, settings, folder):
        self.resumed.append(settings.resume)
        if self.error is not None:
            raise self.error
        return 1.5


@pytest.fixture
def settings():
    return settings_of("train", ["lora=qv"])


@pytest.fixture
def looked_at(tmp_path, monkeypatch):
    """The folder of the job has a checkpoint; which one is looked at is noted."""
    (tmp_path / "checkpoints").mkdir()
    torch.save({}, tmp_path / LAST_CHECKPOINT)
    noted = []
    monkeypatch.setattr("lora_gpt2.runs.checkpoint_file", lambda settings: noted.append(settings.resume))
    return noted


def test_a_finished_job_is_not_done_again(tmp_path, settings, capsys):
    work = Work()
    assert [jobs.run(settings, tmp_path, work, once=True) for _ in range(2)] == [1.5, 1.5]
    assert work.resumed == [None]
    assert "finished already" in capsys.readouterr().out
    assert jobs.run(settings, tmp_path, work, once=False) == 1.5, "alone a run is done again"
    assert len(work.resumed) == 2


@pytest.mark.parametrize("error", [UserError("data", "is wrong", "mend it"), KeyboardInterrupt()], ids=repr)
def test_a_failed_job_says_why_and_is_done_again(tmp_path, settings, error):
    with pytest.raises(type(error)):
        jobs.run(settings, tmp_path, Work(error), once=True)
    job = Job.read(tmp_path)
    assert job.state is State.failed
    assert type(error).__name__ in job.error
    assert jobs.run(settings, tmp_path, Work(), once=True) == 1.5
    assert Job.read(tmp_path).error is None


def test_a_job_that_was_cut_off_goes_on_from_its_checkpoint(tmp_path, settings, looked_at):
    jobs.run(settings, tmp_path, Work(), once=True)
    job = Job.read(tmp_path)
    replace(job, state=State.running, process=2**22 + 1).write(tmp_path)  # no such process
    work = Work()
    jobs.run(settings, tmp_path, work, once=True)
    assert work.resumed == looked_at[1:] == [str(tmp_path)]
    (tmp_path / "status.json").unlink()
    jobs.run(settings, tmp_path, work, once=True)
    assert work.resumed[1:] == [str(tmp_path)], "the checkpoint itself says whose it is"


@pytest.mark.parametrize("host", [None, "another machine"])
def test_a_job_that_has_not_shown_itself_for_long_is_cut_off(tmp_path, settings, host):
    jobs.run(settings, tmp_path, Work(), once=True)
    job = Job.read(tmp_path)
    replace(job, state=State.running, process=os.getppid(), host=host or job.host).write(tmp_path)
    assert Job.read(tmp_path).alive
    long_ago = time.time() - 3600
    os.utime(tmp_path / "status.json", (long_ago, long_ago))
    assert Job.read(tmp_path).told()[0] == "cut off"
    assert jobs.run(settings, tmp_path, Work(), once=True) == 1.5


def test_a_running_job_shows_itself(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(jobs, "_BEAT", 0.01)
    seen = []

    def work(settings, folder):
        os.utime(folder / "status.json", (0, 0))
        time.sleep(0.3)
        seen.append(Job.read(folder).seen)

    jobs.run(settings, tmp_path, work, once=True)
    assert seen[0] > 0


def test_several_adapters_are_finished_before_their_run_is(tmp_path, monkeypatch):
    several = settings_of("train", ["lora=qv", "lora.rank=[1,2]"])
    order = []
    write = Job.write
    monkeypatch.setattr(
        Job, "write", lambda job, place: order.append((place.name, job.state)) or write(job, place)
    )
    for name in several.members():
        (tmp_path / name).mkdir()
    jobs.run(replace(several, resume=str(tmp_path)), tmp_path, Work(), once=False)
    assert all(Job.read(tmp_path / name).settings["resume"] is None for name in several.members())
    *_, first, second, last = order
    assert {state for _, state in (first, second, last)} == {State.finished}
    assert last[0] == tmp_path.name


def test_a_job_that_runs_and_one_of_other_settings_are_left_alone(tmp_path, settings):
    jobs.run(settings, tmp_path, Work(), once=True)
    other = settings_of("train", ["lora=qv", "lora.rank=2"])
    with pytest.raises(
        UserError, match=r"other settings: lora.rank 4 \(here 2\); give another hydra.sweep.dir"
    ):
        jobs.run(other, tmp_path, Work(), once=True)
    job = Job.read(tmp_path)
    replace(job, state=State.running, process=os.getppid()).write(tmp_path)
    with pytest.raises(UserError, match="is running already"):
        jobs.run(settings, tmp_path, Work(), once=True)


def test_what_does_not_decide_the_result_does_not_count(settings):
    other = settings_of("train", ["lora=qv", "logger=none", "callbacks.progress.every=7"])
    different = settings_of("train", ["lora=qv", "seed=7"])
    by_bleu = settings_of("train", ["lora=qv", "callbacks=best_bleu"])
    resumed = settings_of("train", ["lora=qv", "resume=elsewhere"])
    every = settings, other, different, by_bleu, resumed
    keys = [json.dumps(one.decisive()) for one in every]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4


def test_a_list_of_one_is_the_one():
    alone, listed = (settings_of("train", ["lora=qv", f"lora.rank={rank}"]) for rank in ("4", "[4]"))
    assert alone.decisive() == listed.decisive()
    listed.check_goes_on(alone.decisive())
    with pytest.raises(UserError, match=r"lora.rank 3 \(here 4\); leave these as they were"):
        listed.check_goes_on({**alone.decisive(), "lora.rank": 3})


def test_what_a_checkpoint_does_not_say_is_not_compared(settings):
    earlier = settings.decisive()
    del earlier["optimizer.lora_plus_ratio"]
    settings.check_goes_on({**earlier, "of another version": 1})


@pytest.mark.parametrize(
    "told",
    [
        {"state": 3},
        *({name: value} for name, value in [("seconds", "abc"), ("valid_loss", "x"), ("process", 1.5)]),
    ],
    ids=str,
)
def test_a_status_that_is_none_is_named(tmp_path, told):
    Job({}, State.running, "today").write(tmp_path)
    held = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps({**held, **told}))
    with pytest.raises(UserError, match=r"status.json: does not tell of a job; remove it"):
        Job.read(tmp_path)
    with pytest.raises(UserError, match="holds no jobs"):
        jobs.jobs(tmp_path / "elsewhere")


def test_a_job_that_came_to_its_end_while_its_parent_was_told_to_stop_is_finished(tmp_path):
    def train_apart(settings, folder):
        its_own = {**settings.decisive(), "point": "composed a moment later"}
        held = replace(Job.read(folder), settings=its_own, state=State.finished, valid_loss=1.5)
        replace(held, process=2**22 + 1).write(folder)
        raise SystemExit(143)

    settings = settings_of("train", [])
    with pytest.raises(SystemExit):
        jobs.run(settings, tmp_path, train_apart, once=True)
    job = Job.read(tmp_path)
    assert (job.state, job.valid_loss, job.error) == (State.finished, 1.5, None)
    assert job.settings == settings.decisive()


@pytest.mark.parametrize(
    ("how", "said"),
    [(Stopped(signal.SIGINT), "Stopped: SIGINT"), (KeyboardInterrupt(), "KeyboardInterrupt: ")],
    ids=str,
)
def test_a_job_that_was_told_to_stop_is_cut_off_and_has_not_failed(tmp_path, settings, how, said):
    with pytest.raises(type(how)):
        jobs.run(settings, tmp_path, Work(how), once=True)
    assert Job.read(tmp_path).told() == ["cut off", "", "", said]


def test_an_interrupted_run_is_not_begun_anew_but_has_other_processes(
    tmp_path, settings, looked_at, monkeypatch
):
    (tmp_path / "a" / "b").mkdir(parents=True)
    Job(settings.decisive(), State.running, "today").write(tmp_path)
    with pytest.raises(UserError, match="holds the checkpoint of a run that has not come to its end; go on"):
        jobs.check_unclaimed(tmp_path, settings)
    jobs.check_unclaimed(tmp_path, replace(settings, resume=str(tmp_path)))
    elsewhere = replace(settings, resume=str(tmp_path / "a" / "b"))
    with pytest.raises(UserError, match="holds a job of other settings: resume None"):
        jobs.check_unclaimed(tmp_path, elsewhere)
    monkeypatch.setenv("LOCAL_RANK", "1")
    jobs.check_unclaimed(tmp_path, settings)
    with pytest.raises(UserError, match="holds a job of other settings: resume None"):
        jobs.check_unclaimed(tmp_path, elsewhere)


def test_a_checkpoint_without_a_job_is_not_written_over(tmp_path, settings, looked_at):
    with pytest.raises(UserError, match="holds the checkpoint of a run; go on with resume="):
        jobs.check_unclaimed(tmp_path, settings)
    jobs.check_unclaimed(tmp_path, replace(settings, resume=str(tmp_path)))


@pytest.mark.parametrize("variable", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
@pytest.mark.parametrize("begun", [None, "elsewhere", "checkpoints/best.ckpt"])
@pytest.mark.parametrize("came_to_more", [False, True])
def test_what_a_scheduler_starts_again_goes_on(
    tmp_path, settings, looked_at, monkeypatch, begun, variable, came_to_more
):
    """Not from what it went back from, to an earlier checkpoint of its own."""
    asked = replace(settings, resume=begun and str(tmp_path / begun))
    Job(asked.decisive(), State.failed, "today").write(tmp_path)
    if came_to_more:
        torch.save({"begun": asked.resume}, tmp_path / LAST_CHECKPOINT)
    monkeypatch.setenv(variable, "1")
    jobs.check_unclaimed(tmp_path, asked)
    work = Work()
    jobs.run(asked, tmp_path, work, once=False)
    went_back = begun == "checkpoints/best.ckpt" and not came_to_more
    assert work.resumed == looked_at == [asked.resume if went_back else str(tmp_path)]


@pytest.mark.parametrize("begun", [None, "elsewhere"])
def test_a_job_that_goes_on_is_the_one_that_was_begun(tmp_path, settings, looked_at, begun):
    asked = replace(settings, resume=begun).decisive()
    Job(asked, State.failed, "today").write(tmp_path)
    wrong = replace(settings, resume=str(tmp_path), base="/nowhere")
    with pytest.raises(UserError):
        jobs.run(wrong, tmp_path, Work(UserError("base", "is not there", "give another")), once=False)
    job = Job.read(tmp_path)
    assert (job.settings, job.error) == (asked, "UserError: base: is not there; give another")
    jobs.run(replace(settings, resume=str(tmp_path)), tmp_path, Work(), once=False)
    assert Job.read(tmp_path).settings == asked


def test_a_job_of_a_sweep_goes_on_from_its_own_checkpoint_and_not_from_where_it_began(
    tmp_path, settings, looked_at
):
    begun = replace(settings, resume="elsewhere")
    work = Work()
    for _ in range(2):
        jobs.run(begun, tmp_path, work, once=True)
    assert work.resumed == looked_at == [str(tmp_path)], "once it is finished"


def test_no_process_has_a_number_that_large(tmp_path):
    Job({}, State.running, "today", process=10**30, host=socket.gethostname()).write(tmp_path)
    assert Job.read(tmp_path).told()[0] == "cut off"
