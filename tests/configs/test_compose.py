"""Every option of every group and every preset composes, resolves and means what the paper says."""

from pathlib import Path

import pytest
import yaml
from hydra.errors import HydraException

from lora_gpt2.gate import ConfigError
from tests.conftest import settings_of

ROOT = Path(__file__).parents[2]
ROOTED = {"e2e", "webnlg", "dart", "jsonl"}
"""Corpora that are read from files."""


def options(script: str) -> list[tuple[str, str]]:
    defaults = yaml.safe_load((ROOT / "configs" / f"{script}.yaml").read_text())["defaults"]
    groups = [next(iter(entry)) for entry in defaults if isinstance(entry, dict)]
    found = [(group, path.stem) for group in groups for path in (ROOT / "configs" / group).glob("*.yaml")]
    assert found
    return sorted(found)


def needed(group: str, option: str) -> list[str]:
    return ["data.root=somewhere"] if group == "data" and option in ROOTED else []


PRESETS = sorted(path.relative_to(ROOT / "conf_presets") for path in (ROOT / "conf_presets").rglob("*.yaml"))


@pytest.mark.parametrize(("group", "option"), options("train"))
def test_every_training_option_composes(group, option):
    settings_of("train", [f"{group}={option}", *needed(group, option)])


@pytest.mark.parametrize(("group", "option"), options("generate"))
def test_every_decoding_option_composes(group, option):
    settings_of("generate", ["base=somewhere", f"{group}={option}", *needed(group, option)])


@pytest.mark.parametrize("preset", PRESETS, ids=str)
def test_every_preset_composes_and_is_named_in_the_help(preset):
    choice = f"{preset.parent}={preset.stem}"
    settings_of("train", [choice, "data.root=somewhere"] if preset.parent.name != "demo" else [choice])
    assert choice in (ROOT / "configs" / "train.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("card", ["md", "lg"])
@pytest.mark.parametrize(
    ("corpus", "smoothing", "dropout", "decay"),
    [("e2e", 0.1, 0.1, 0.01), ("webnlg", 0.1, 0.1, 0.01), ("dart", 0.0, 0.0, 0.0)],
)
def test_the_papers_presets_hold_table_11(card, corpus, smoothing, dropout, decay):
    run = settings_of("train", [f"paper={corpus}_gpt2_{card}", "data.root=somewhere"])
    assert run.model.name == f"gpt2.{card}"
    assert run.base == {"md": "openai-community/gpt2-medium", "lg": "openai-community/gpt2-large"}[card]
    assert (run.lora.rank, run.lora.alpha, run.lora.dropout) == (4, 32, dropout)
    assert [target.value for target in run.lora.targets] == ["q", "v"]
    assert (run.optimizer.lr, run.optimizer.weight_decay, run.optimizer.warmup_steps) == (2e-4, decay, 500)
    assert (run.optimizer.schedule.value, tuple(run.optimizer.betas)) == ("linear", (0.9, 0.999))
    assert (run.data.batch_size, run.data.seq_len, run.trainer["max_epochs"]) == (8, 512, 5)
    assert run.label_smoothing == smoothing


def test_the_papers_decoding_is_the_default():
    decoding = settings_of("generate", ["base=x"]).decoding
    assert (decoding.beam_size, decoding.length_penalty, decoding.no_repeat_ngram_size) == (10, 0.9, 4)
    assert settings_of("generate", ["base=x", "decoding=webnlg"]).decoding.length_penalty == 0.8


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+papr=x", "papr: no such setting"),
        ("+lora.rnk=3", "lora.rnk: no such setting, did you mean lora.rank?"),
        ("+trainer.max_epoch=3", "trainer.max_epoch: no such argument of lightning.Trainer, did you mean"),
        ("+callbacks.progress.evry=3", "callbacks.progress.evry: no such argument of"),
        ("logger._target_=lora_gpt2.no.Logger", "logger._target_: Error loading 'lora_gpt2.no.Logger'"),
        (
            "logger._target_=no.Logger",
            "no.Logger is not trusted; if you wrote it, set LORA_GPT2_TARGETS=no.Logger",
        ),
        (
            "+callbacks.x={_target_: os.system, command: echo}",
            "callbacks.x._target_: os.system is not trusted",
        ),
        (
            "+trainer.plugins=[{_target_: os.system}]",
            r"trainer.plugins\[0\]._target_: os.system is not trusted",
        ),
        (
            "+callbacks.x={_target_: lora_gpt2.hub.fetch}",
            "callbacks.x._target_: lora_gpt2.hub.fetch is no class",
        ),
        (
            "+callbacks.x={_target_: lora_gpt2.weights.store.zipfile.ZipFile, file: a, mode: w}",
            "callbacks.x._target_: lora_gpt2.weights.store.zipfile.ZipFile is no trainer and no part of one",
        ),
        (
            r"+callbacks.x={_target_: lora_gpt2.training.callbacks.Progress, "
            r'every: "\${oc.create:{_target_: os.system}}"}',
            r"callbacks.x.every: \${oc.create:{_target_: os.system}} is not resolved",
        ),
        ("+callbacks.x={a: 1}", "callbacks.x: has no _target_, which names the class"),
        ("trainer._target_=[]", "trainer._target_"),
        ("label_smoothing=1.5", r"label_smoothing must be in \[0, 1\), not 1.5"),
        ("data.batch_size=0", "data.batch_size must be at least 1, not 0"),
        ("data=e2e", "data.root is missing"),
        ("optimizer.lr=-1", "optimizer.lr must be above 0"),
        ("optimizer.lr=inf", "optimizer.lr must be above 0, and finite, not inf"),
        ("optimizer.weight_decay=nan", "optimizer.weight_decay must be at least 0, and finite, not nan"),
        *(
            (f"trainer.accumulate_grad_batches={steps}", "must be a whole number of at least 1, not")
            for steps in (0, -2, 1.5, "true")
        ),
        ("seed=1e30", r"seed must be in \[0, 2\*\*32\), not 1000"),
        ("optimizer.lora_plus_ratio=0", "optimizer.lora_plus_ratio must be above 0, and finite, not 0"),
    ],
)
def test_a_wrong_setting_is_named(override, message):
    with pytest.raises(ConfigError, match=message):
        settings_of("train", [override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["precision=bfloat16"], "lora.rank is 0: set lora.rank, or trainer.precision=bf16-mixed"),
        (["precision=int8", "lora=qv"], "precision must be float32 or bfloat16 for training"),
        (
            ["precision=bfloat16", "lora=qv", "trainer.precision=bf16-mixed"],
            "trainer.precision bf16-mixed does not go with precision bfloat16",
        ),
        (["precision=bf16", "lora=qv"], "Error merging override precision=bf16"),
    ],
)
def test_a_wrong_precision_is_named(overrides, message):
    with pytest.raises((ConfigError, HydraException), match=message):
        settings_of("train", overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "neither adapter nor base is set"),
        (["base=x", "split=dev"], "split must be train, valid or test, not dev"),
        (["base=x", "limit=0"], "limit must be at least 1"),
        (["adapters={a:x,b:y}", "adapter=c"], "adapter c is none of adapters: a, b"),
        (["adapters={a:[x]}"], "adapters.a must be a run's folder or a file"),
        (["base=x", "decoding.beam_size=0"], "decoding.beam_size must be at least 1"),
        (["base=x", "decoding.end_tokens=[]"], "decoding.end_tokens must name at least one"),
    ],
)
def test_a_wrong_decoding_setting_is_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        settings_of("generate", overrides)
