import math

import pytest
import torch
from torch import nn

from lora_gpt2.training.config import OptimizerSettings, Schedule
from lora_gpt2.training.optimization import build_optimizer, rate_factor

TOTAL, WARMUP = 100, 10


def factor(schedule: str, step: int, warmup: int = WARMUP) -> float:
    settings = OptimizerSettings(schedule=Schedule(schedule), warmup_steps=warmup, cycle_steps=20)
    return rate_factor(step, TOTAL, settings)


@pytest.mark.parametrize("schedule", [schedule.value for schedule in Schedule])
@pytest.mark.parametrize("step", range(WARMUP))
def test_the_rate_rises_linearly_from_zero(schedule, step):
    assert factor(schedule, step) == pytest.approx(step / 10)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", {10: 1, 55: 0.5, 91: 0.1, 100: 0}),
        ("cosine", {10: 1, 40: 0.5 * (1 + math.cos(math.pi / 3)), 55: 0.5, 100: 0}),
        ("inverse_sqrt", {10: 1, 40: 0.5, 90: 1 / 3}),
        ("constant", {10: 1, 99: 1}),
        ("cyclic", {10: 1, 20: 0.5, 29: 0.05, 30: 1, 50: 1}),
        ("plateau", {10: 1, 99: 1}),
    ],
)
def test_a_schedule_takes_its_course(schedule, expected):
    assert {step: factor(schedule, step) for step in expected} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", [schedule.value for schedule in Schedule])
def test_without_warm_up_the_first_step_is_at_the_full_rate(schedule):
    assert factor(schedule, 0, warmup=0) == 1


def test_the_settings_reach_adamw_and_the_schedule_moves_the_rate():
    settings = OptimizerSettings(lr=0.5, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.3, warmup_steps=2)
    optimizer, schedule = build_optimizer([([("weight", nn.Parameter(torch.ones(2)))], settings)], total=4)
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.9), 1e-7, 0.3)
    rates = []
    for _ in range(4):
        rates.append(group["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0, 0.25, 0.5, 0.25])


def test_lora_plus_gives_b_a_rate_of_its_own_over_the_whole_schedule():
    settings = OptimizerSettings(lr=0.1, lora_plus_ratio=16, warmup_steps=2)
    named = [(name, nn.Parameter(torch.ones(2))) for name in ("h.0.lora_A", "h.0.lora_B", "h.0.lora_bias")]
    optimizer, schedule = build_optimizer([(named, settings)], total=4)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1]
    assert optimizer.param_groups[1]["params"][0] is named[1][1]
    for _ in range(4):
        slow, fast = (group["lr"] for group in optimizer.param_groups)
        assert fast == pytest.approx(16 * slow)
        optimizer.step()
        schedule.step()
