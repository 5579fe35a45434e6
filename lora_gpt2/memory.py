"""What tensors and this process take of memory, in bytes."""

import contextlib
import ctypes
import os
import re
import resource
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts the bytes of all storages alive that operations under it have made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


def keep_freed() -> None:
    """Lets the C library keep what is freed for the next tensor, where it can be told (glibc).

    By default it gives large pieces back to the system and takes them anew at the next step, and the system
    clears every page of them again: a tenth of a training step and more.
    """
    trim_threshold, mmap_threshold = -1, -3  # by malloc.h
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)


def size_of(tensor: Tensor) -> int:
    """In bytes."""
    return tensor.numel() * tensor.element_size()


def installed() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resident() -> int:
    """Bytes of memory that this process holds now; where the system does not tell, the most it held."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return most_resident()
    return int(statm.read_text().split()[1]) * resource.getpagesize()


def forget_most_resident() -> None:
    """Lets the most start again from what is held now, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def most_resident() -> int:
    """The most bytes that this process held since the start, or since `forget_most_resident`."""
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return 1024 * int(found[1])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def peak(device: torch.device) -> int:
    """The most bytes that this process ever took on a GPU, or, elsewhere, of the machine's memory."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else most_resident()
