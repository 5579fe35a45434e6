# make demo: the whole way on the embedded corpus.  make test: lint, types and tests.
# PYTHON chooses the interpreter (3.10 to 3.13), PIP_ARGS goes to pip, e.g. for torch's CPU wheels:
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
INPUTS := pyproject.toml constraints.txt

.PHONY: demo test test-browser test-corpora test-slow coverage mutants lock clean

demo: .venv/installed
	$(BIN)/lora-gpt2 demo

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist loadfile

# The real corpora: LORA_GPT2_CORPORA=FOLDER make test-corpora
test-corpora: .venv/installed-test
	$(BIN)/pytest -m corpora

test-slow: .venv/installed-test
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable ".[fuzz]"
	$(BIN)/pytest -m slow

# The pages in Chromium; CHROMIUM=PATH where it is not found by itself.
test-browser: .venv/installed-test
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable ".[browser]"
	$(BIN)/pytest -m browser

# Lines of the package that the tests run, in their subprocesses too. Whether they pass, make test says: to
# Hydra coverage looks like a debugger, which raises what it would have told, and a full disk has no room for it.
coverage: .venv/installed-test
	$(BIN)/coverage erase
	-$(BIN)/coverage run -m pytest -n 2 --dist loadfile
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# Every small change of the loss, the adapter's arithmetic, the beam search and the scores: does a test notice?
mutants: .venv/installed-test
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable ".[mutants]"
	$(BIN)/mutmut run
	$(BIN)/mutmut results

# The versions that the tests have passed with: with hashes for pip --require-hashes, and without for an
# editable installation. Pins stay as they are while they fit; UPGRADE=--upgrade takes the newest.
UPGRADE ?=
LOCK := uv pip compile pyproject.toml --universal --python-version 3.10 --all-extras --quiet \
	--no-annotate --custom-compile-command "make lock" $(UPGRADE)

lock:
	$(LOCK) --generate-hashes --output-file requirements.lock
	$(LOCK) --output-file constraints.txt --constraint requirements.lock

.venv/bin/python:
	@echo "Making .venv with $$($(PYTHON) --version)"
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python $(INPUTS)
	@echo "Installing lora-gpt2 into .venv"
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable .
	@touch $@

.venv/installed-test: .venv/installed
	@echo "Installing what the tests need"
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable ".[test]"
	@touch $@

clean:
	rm -rf .venv .coverage* .pytest_cache .mypy_cache .ruff_cache mutants
