"""A search by Optuna: which settings it asks for, what it gives up, and that it goes on."""

import pytest

from lora_gpt2 import search as module
from lora_gpt2.errors import UserError
from lora_gpt2.jobs import Job, State
from lora_gpt2.search import _parsed, search


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
    asked = {key: suggest(Trial()) for key, suggest in spaces.items()}
    assert asked["lora.rank"] == [1, 2, 4]
    assert asked["lora.alpha"] == (8, 32, 8), "the end of a range is not in it, as in a sweep"
    assert asked["optimizer.lr"] == (1e-5, 1e-3, True)
    assert asked["label_smoothing"] == (0.0, 0.2, False)
    assert asked["lora.targets"] == ["[q]", "[q,v]"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [(["lora=qv"], "nothing is to be searched"), (["lora.rank=range(1,2.5)"], "cannot be searched")],
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
    study = search(tmp_path, overrides, 3)
    assert len(told) == 3
    assert all(given[0] == "lora=qv" and given[1].startswith("lora.rank=") for given in told)
    study = search(tmp_path, overrides, 5)
    names = [trial.state.name for trial in study.trials]
    assert names == ["COMPLETE", "FAIL", "PRUNED", "COMPLETE", "COMPLETE"]
    assert study.best_value == 1.5
    with pytest.raises(UserError, match=r"holds a search over lora\.rank by valid_loss"):
        search(tmp_path, ["seed=choice(1,2)"], 9)


def test_a_trial_whose_process_was_lost_is_not_waited_for(tmp_path, monkeypatch):
    fake([2.0], monkeypatch)
    module._study(tmp_path).ask()
    study = search(tmp_path, ["lora.rank=choice(1,2)"], 2)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]


@pytest.mark.slow
def test_real_trials_train_and_those_that_fall_behind_are_given_up(tmp_path, tiny, capfd):
    overrides = [*tiny, "lora=qv", "logger=none", "optimizer.lr=choice(1e-2,1e-9)", "trainer.max_epochs=2"]
    study = search(tmp_path, overrides, 7)
    states = [trial.state.name for trial in study.trials]
    assert "PRUNED" in states
    assert states.count("COMPLETE") >= 3
    assert study.best_params == {"optimizer.lr": 0.01}
    assert Job.read(tmp_path / str(states.index("PRUNED"))).state is State.pruned
