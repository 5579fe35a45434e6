"""The one exception that a user sees without a traceback."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """A fault that the user can mend: where it is, what was expected and found, what to do.

    Printed as ``where: what; do``. The command line turns it into one message and exit code 1.
    """

    def __init__(self, where: str | Path, what: str, do: str) -> None:
        self.where, self.what, self.do = str(where), what, do
        super().__init__(f"{where}: {what}; {do}")

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, str, str]]:
        return type(self), (self.where, self.what, self.do)


def differences(theirs: Mapping[str, Any], here: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Those of the settings `names` that differ, each with both values, as a UserError tells them."""
    pairs = ((name, theirs.get(name), here.get(name)) for name in names)
    return [f"{name} {one} (here {other})" for name, one, other in pairs if one != other]
