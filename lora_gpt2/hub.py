"""One file of a repository on the model hub: from the local cache, else over the network, else an error."""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

from lora_gpt2.errors import UserError
from lora_gpt2.files import sha256

SECONDS = 5.0
"""How long the hub may take to answer."""

PINNED = {
    "openai-community/gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "openai-community/gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "openai-community/gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "openai-community/gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2",
}
"""The commits that are meant where none is named."""


def fetch(repository: str, names: str | Sequence[str], where: str, do: str) -> Path:
    """The local path of the file, the first of `names` that the repository has.

    `repository` may end in ``@`` and a commit, branch or tag; without one it is the commit in `PINNED`, else
    the newest. Raises UserError, with `where` and `do`, when none is had, or what is had is not what the hub
    holds.
    """
    repository, _, named = repository.partition("@")
    names = [names] if isinstance(names, str) else names
    path = _fetched(repository, names, where, do, named or PINNED.get(repository))
    told = path.resolve().name  # in the cache a large file is called by its SHA-256
    if re.fullmatch("[0-9a-f]{64}", told) and sha256(path) != told:
        raise UserError(
            path, "is not what the hub holds: its SHA-256 differs", "delete it, to fetch it again"
        )
    return path


def _fetched(repository: str, names: Sequence[str], where: str, do: str, revision: str | None) -> Path:
    import huggingface_hub as hub  # slow to import, and needed only without local files
    import huggingface_hub.errors

    try:
        for name in names:
            with contextlib.suppress(hub.errors.LocalEntryNotFoundError):
                return Path(hub.hf_hub_download(repository, name, revision=revision, local_files_only=True))
    except hub.errors.HFValidationError as error:
        raise UserError(where, f"is no name on the hub ({error})", do) from None
    name = names[0]
    try:
        # Asked first because this asks once, where the download would retry for half a minute.
        hub.get_hf_file_metadata(hub.hf_hub_url(repository, name, revision=revision), timeout=SECONDS)
        return Path(hub.hf_hub_download(repository, name, revision=revision, etag_timeout=SECONDS))
    except hub.errors.LocalEntryNotFoundError as error:  # the download broke off
        raise UserError(where, f"{name} of {repository} could not be fetched ({error})", do) from None
    except hub.errors.EntryNotFoundError:
        if len(names) > 1:
            return _fetched(repository, names[1:], where, do, revision)
        raise UserError(where, f"the repository {repository} has no {name}", do) from None
    except Exception as error:
        if not _comes_from_the_hub(error):
            raise
        first_line = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        what = f"{name} of {repository} is not in the local cache and the hub gave {first_line}"
        raise UserError(where, what, do) from None


def _comes_from_the_hub(error: Exception) -> bool:
    """Whether it is a fault of the network or the repository, not of the program."""
    libraries = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3")  # httpx2 as well
    return isinstance(error, OSError) or type(error).__module__.startswith(libraries)
