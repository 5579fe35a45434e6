"""A search by Optuna: which settings it asks for, what it gives up, and that it goes on."""

import sys
from types import SimpleNamespace

import optuna
import psutil
import pytest

from lora_gpt2 import search as module
from lora_gpt2.errors import UserError
from lora_gpt2.files import locked
from lora_gpt2.jobs import Job, State
from lora_gpt2.search import _parsed, search
from lora_gpt2.signals import Stopped


class Trial:
    """Answers with the bounds it was asked for."""

    def suggest_int(self, name, low, high, step):
        return low, high, step

    def suggest_float(self, name, low, high, log):
        return low, high, log

    def suggest_categorical(self, name, choices):
        return choices


def test_spaces_are_written_as_hydras_sweeps():
    fixed, spaces = _parsed(
        ["lora=qv", "seed=3", "lora.rank=choice(1,2,4)", "lora.alpha=range(8,33,8)",
         "optimizer.lr=tag(log,interval(1e-5,1e-3))", "label_smoothing=interval(0,0.2)",
         "lora.targets=[q],[q,v]"]
    )  # fmt: skip
    assert fixed == ["lora=qv", "seed=3"]
    asked = {key: space.suggest(Trial()) for key, space in spaces.items()}
    assert asked["lora.rank"] == [1, 2, 4]
    assert asked["lora.alpha"] == (8, 32, 8), "the end of a range is not in it, as in a sweep"
    assert asked["optimizer.lr"] == (1e-5, 1e-3, True)
    assert asked["label_smoothing"] == (0.0, 0.2, False)
    assert asked["lora.targets"] == ["[q]", "[q,v]"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora=qv"], "nothing is to be searched"),
        (["lora.rank=range(1,2.5)"], "cannot be searched"),
        (["seed=range(8,1,-1)"], r"seed=range\(8,1,-1\): cannot be searched"),
        (["optimizer.lr=interval(3,1)"], "cannot be searched"),
        (["optimizer.lr=tag(log,interval(0,1))"], "cannot be searched"),
    ],
)
def test_what_cannot_be_searched_is_refused(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        search(tmp_path, overrides, 1)


def fake(losses, monkeypatch):
    """Trials that end with these losses; None: one that fails; a string: one that is given up."""
    given = iter(losses)
    told = []

    def train(place, overrides, folder, number):
        told.append(overrides)
        loss = next(given)
        state = {type(None): State.failed, str: State.pruned, float: State.finished}[type(loss)]
        job = Job({}, state, "")
        place.mkdir()
        job.write(place)
        monkeypatch.setitem(values, place, loss)

    values: dict = {}
    monkeypatch.setattr(module, "_train", train)
    monkeypatch.setattr(module.sweep, "metrics", lambda place: {"valid_loss": values[place]})
    return told


def test_a_search_counts_what_ended_and_goes_on(tmp_path, monkeypatch):
    overrides = ["lora=qv", "lora.rank=choice(1,2,4,8)"]
    told = fake([2.0, None, "given up", 1.5, 1.75], monkeypatch)
    study = search(tmp_path, overrides, 2)
    assert len(told) == 3, "one that failed does not count"
    assert all(given[0] == "lora=qv" and given[1].startswith("lora.rank=") for given in told)
    study = search(tmp_path, overrides, 4)
    names = [trial.state.name for trial in study.trials]
    assert names == ["COMPLETE", "FAIL", "PRUNED", "COMPLETE", "COMPLETE"]
    assert study.best_value == 1.5
    for other in (["lora=qv", "seed=choice(1,2)"], ["lora.rank=choice(1,2,4,8)"], [*overrides, "limit=3"]):
        with pytest.raises(UserError, match=r"by valid_loss with lora\.rank=choice\(1,2,4,8\) lora=qv"):
            search(tmp_path, other, 9)


def test_a_search_that_goes_on_does_not_ask_for_the_same_again(tmp_path, monkeypatch):
    told = fake([2.0, 1.5, 1.75], monkeypatch)
    for trials in (1, 2, 3):
        search(tmp_path, ["optimizer.lr=interval(0,1)"], trials)
    assert len({given[0] for given in told}) == 3


def test_a_search_whose_trials_all_fail_stops(tmp_path, monkeypatch):
    told = fake([None] * 9, monkeypatch)
    with pytest.raises(UserError, match="three trials in a row have failed"):
        search(tmp_path, ["lora.rank=choice(1,2)"], 9)
    assert len(told) == 3


def test_a_search_has_its_folder_alone_and_by_scores_needs_scores(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match="another run writes there"):
        search(tmp_path, ["lora.rank=choice(1,2)"], 1)
    with pytest.raises(UserError, match="--by: only a scored run has bleu; add score=valid"):
        search(tmp_path, ["lora.rank=choice(1,2)"], 1, by="bleu")


@pytest.mark.parametrize("by", ["valid_loss", "bleu"])
def test_the_trial_of_the_highest_loss_is_given_up(tmp_path, by):
    study = module._study(tmp_path, by)
    for value in (3.0, 3.1, 3.2):
        trial = study.ask()
        module.Pruning(str(tmp_path), trial.number).on_validation_end(at(5, value), None)
        study.tell(trial, value)
    good, bad = study.ask(), study.ask()
    module.Pruning(str(tmp_path), good.number).on_validation_end(at(5, 1.0), None)
    with pytest.raises(optuna.TrialPruned, match=r"validation loss 9\.0000 at step 5"):
        module.Pruning(str(tmp_path), bad.number).on_validation_end(at(5, 9.0), None)


def at(step, loss):
    """A trainer that has just validated."""
    strategy = SimpleNamespace(broadcast=lambda value: value)
    return SimpleNamespace(callback_metrics={"valid/loss": loss}, sanity_checking=False, is_global_zero=True,
                           global_step=step, strategy=strategy)  # fmt: skip


def test_a_trial_whose_process_was_lost_is_not_waited_for(tmp_path, monkeypatch):
    fake([2.0], monkeypatch)
    module._study(tmp_path).ask()
    study = search(tmp_path, ["lora.rank=choice(1,2)"], 1)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]


def test_a_search_that_is_told_to_stop_takes_its_trial_along(tmp_path, monkeypatch):
    code = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    monkeypatch.setattr(module.launch, "command", lambda overrides, place: [sys.executable, "-c", code])
    before = set(psutil.Process().children())  # such as multiprocessing's own
    with pytest.raises(Stopped, match="SIGTERM"):
        search(tmp_path, ["lora.rank=choice(1,2)"], 9)
    assert set(psutil.Process().children()) <= before


@pytest.mark.slow
def test_real_trials_train_and_those_that_fall_behind_are_given_up(tmp_path, tiny, capfd):
    overrides = [*tiny, "lora=qv", "logger=none", "optimizer.lr=choice(1e-2,1e-9)", "trainer.max_epochs=2"]
    study = search(tmp_path, overrides, 7)
    states = [trial.state.name for trial in study.trials]
    assert "PRUNED" in states
    assert states.count("COMPLETE") >= 3
    assert study.best_params == {"optimizer.lr": 0.01}
    assert Job.read(tmp_path / str(states.index("PRUNED"))).state is State.pruned
