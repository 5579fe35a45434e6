"""Signals that ask a run to stop: noted, told to its other processes, obeyed, handed on to a child."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
]
"""Ask a run to stop: a terminal, a system that shuts down, a scheduler that needs the machine."""

_AGAIN = 3.0
"""Seconds within which several are one: a terminal tells all its processes, and the first hands it on."""

_FIRST = "LORA_GPT2_FIRST_PROCESS"
"""Its number, for those that it starts: it may be gone before they can ask who did."""

_KEY = "told to stop"
"""Where processes tell each other."""


class Stopped(SystemExit):
    """A signal ended the run. The exit code is 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name

    def __str__(self) -> str:
        return self.name


class Signals:
    """Notes the first of `SIGNALS`, to be obeyed where that is safe; a later one ends the process at once."""

    def __init__(self) -> None:
        self.told = 0
        """The signal that this process got; it may come at any moment."""
        self._at = self._asks = 0.0
        self._others = False
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """In place of Lightning's own handlers, until its trainer puts back what was there before them."""
        self._before = _given_to(self._tell)

    def heard(self) -> bool:
        """Whether this process was told, or another: they ask each other once a second, waiting for none."""
        from torch import distributed  # so late that a wrong setting is reported before torch is loaded

        now = time.monotonic()
        if (self.told or now > self._asks) and distributed.is_initialized():
            self._asks, store = now + 1, distributed.distributed_c10d._get_default_store()
            if self.told:
                store.set(_KEY, "")
            self._others = store.check([_KEY])
        return bool(self.told) or self._others

    def end(self, number: int, first: bool, where: str) -> SystemExit:
        """What ends this process, told or not. SIGUSR1 and SIGUSR2 go to whom they were for before, too.

        That is a scheduler's way to begin the job again.
        """
        stopped, before = Stopped(number), self._before.get(number)
        if first:
            print(f"{stopped}: stopped {where}", flush=True)
        if stopped.name.startswith("SIGUSR") and callable(before):
            before(number, None)
        # in peace on other processes: Lightning kills the first where another fails
        return stopped if first else SystemExit(0)

    def _tell(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.told:
            self.told, self._at = number, now
        elif now - self._at > _AGAIN:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def wait_for(command: Sequence[str], **how: Any) -> int:
    """The exit code of `command`, started as `how` says; each of `SIGNALS` is handed on to it.

    Raises Stopped, when it has ended, where this process or the command was told by one of them. Any other
    signal, as of a system without memory, is a failure of its own: the code is below 0.
    """
    told: list[int] = []
    begun: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        told.append(number)
        for process in begun:
            with suppress(ValueError):  # on Windows a terminal's has reached it by itself
                process.send_signal(number)

    with _handled(hand_on):
        begun.append(subprocess.Popen(command, **how))
        if told:  # before it could be handed on
            begun[0].send_signal(told[0])
        code = begun[0].wait()
    number = told[0] if told else -code if code < 0 else code - 128
    if number in SIGNALS:
        raise Stopped(number)
    return code


@contextmanager
def raised() -> Iterator[None]:
    """Each of `SIGNALS` raises Stopped, wherever the process is."""

    def stop(number: int, frame: FrameType | None) -> None:
        stopped = Stopped(number)
        print(f"{stopped}: stopped", flush=True)
        raise stopped

    with _handled(stop):
        yield


def end_together(first: bool) -> None:
    """The processes that Lightning starts end within a second of the first one, which starts them.

    Else they would wait for one that was killed: half an hour, where they had not met yet.
    """
    if first:
        os.environ[_FIRST] = str(os.getpid())
        return
    of_others = "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get("SLURM_PROCID", "0") != "0"
    parent = int(os.environ.get(_FIRST, 0))
    if of_others or not parent or os.name == "nt":  # there Python's own launcher may stand between the two
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = _given_to(handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _given_to(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Who had each of `SIGNALS` before."""
    with suppress(ValueError):  # not in the main thread: they are another's
        return {number: signal.signal(number, handler) for number in SIGNALS}
    return {}
