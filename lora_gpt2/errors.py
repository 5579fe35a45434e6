"""The one exception that a user sees without a traceback."""

from pathlib import Path


class UserError(ValueError):
    """A fault that the user can mend: where it is, what was expected and found, what to do.

    Printed as ``where: what; do``. The command line turns it into one message and exit code 1.
    """

    def __init__(self, where: str | Path, what: str, do: str) -> None:
        self.where, self.what, self.do = str(where), what, do
        super().__init__(f"{where}: {what}; {do}")

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, str, str]]:
        return type(self), (self.where, self.what, self.do)
