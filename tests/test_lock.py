"""requirements.lock and constraints.txt name the same versions, and these are what is asked for."""

import re
from importlib.metadata import requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT


def pins(name):
    """By package: what the file says of it, hashes and comments left out."""
    text = re.sub(r"#.*|\\\n|--hash=\S+", "", (ROOT / name).read_text())
    found: dict[str, list[Requirement]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        pin = Requirement(line)
        found.setdefault(canonicalize_name(pin.name), []).append(pin)
    return found


def test_each_pin_has_its_hashes_and_both_files_agree():
    entries = re.split(r"\n(?=\S)", (ROOT / "requirements.lock").read_text())
    of_packages = [entry for entry in entries if not entry.startswith("#")]
    assert len(of_packages) == sum(map(len, pins("requirements.lock").values())) > 100
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry) for entry in of_packages)
    assert pins("requirements.lock") == pins("constraints.txt")


def test_what_the_package_asks_for_is_pinned_within_its_ranges():
    pinned = pins("requirements.lock")
    for wanted in map(Requirement, requires("lora-gpt2")):
        name = canonicalize_name(wanted.name)
        if name == "lora-gpt2":  # an extra that takes others
            continue
        for pin in pinned[name]:
            (version,) = (one.version for one in pin.specifier)
            assert wanted.specifier.contains(version, prereleases=True), (wanted, pin)
