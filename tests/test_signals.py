"""What a process does that is told to stop, and one that waits for a child."""

import signal
import subprocess
import sys

import pytest

from lora_gpt2.signals import Stopped, wait_for

TELLING = "import os, signal, sys, time; tell = lambda number: os.kill(os.getppid(), number); "


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=str)
def test_a_child_that_saves_is_told_once_and_waited_for(tmp_path, number):
    saves = f"""
signal.signal({int(number)}, lambda *told: got.append(told[0]))
got = []
tell({int(number)})
time.sleep(1)
open(sys.argv[1], "w").write(str(len(got)))
"""
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped:
        wait_for([sys.executable, "-c", TELLING + saves, str(tmp_path / "got")])
    assert stopped.value.code == 128 + number
    assert (tmp_path / "got").read_text() == "1"
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("does", "code"),
    [
        ("tell(signal.SIGTERM); time.sleep(60)", 128 + signal.SIGTERM),
        ("os.kill(os.getpid(), signal.SIGTERM)", 128 + signal.SIGTERM),
        ("sys.exit(128 + signal.SIGUSR2)", 128 + signal.SIGUSR2),
    ],
)
def test_a_child_that_a_signal_ended_has_stopped(does, code):
    with pytest.raises(Stopped) as stopped:
        wait_for([sys.executable, "-c", TELLING + does])
    assert stopped.value.code == code


@pytest.mark.parametrize("code", [0, 1, 255])
def test_any_other_end_is_an_exit_code(code):
    assert wait_for([sys.executable, "-c", f"raise SystemExit({code})"]) == code


def test_a_child_that_the_system_killed_has_failed():
    assert wait_for([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == -signal.SIGKILL


@pytest.mark.parametrize(("seconds", "ended"), [(0, ""), (4, "SIGTERM")])
def test_a_second_signal_ends_a_process_at_once_unless_it_is_the_same_one_twice(seconds, ended):
    twice = f"""
import signal
from lora_gpt2 import signals
told = signals.Signals()
told.listen()
signal.raise_signal(signal.SIGTERM)
assert told.told == signal.SIGTERM
told._at -= {seconds}
signal.raise_signal(signal.SIGTERM)
"""
    code = subprocess.run([sys.executable, "-c", twice], check=False).returncode
    assert (signal.Signals(-code).name if code else "") == ended
