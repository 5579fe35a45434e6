import errno
import hashlib
import os

import pytest

from lora_gpt2 import cli
from lora_gpt2.errors import UserError
from lora_gpt2.files import brief, locked, read_json, read_text, replacing, sha256, write_json
from lora_gpt2.gate import told_in_a_line


def half(path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("broken")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"ü": 1})
    assert read_json(path, "") == {"ü": 1}
    with pytest.raises(RuntimeError, match="broken"):
        half(path)
    assert read_json(path, "") == {"ü": 1}
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no such file; do this"), (b"\xff", r"is not UTF-8 text \(byte 0\)"),
     (b'{\n"a": }', "a.json:2: is not valid JSON"), (b"[" * 100_000, "a.json: is JSON nested too deep to be"),
     (b"9" * 5000, "a.json: is JSON with a number of too many digits to be read; do this"),
     (rb'["\ud83d\ude00", "\ud83d"]', r"a.json: holds half of a character \(the lone surrogate '.ud83d'\)")],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_a_users_error(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_json(tmp_path / "a.json", "do this")


def test_whole_characters_and_letters_that_look_like_halves_are_read(tmp_path):
    (tmp_path / "a.json").write_bytes(rb'["\ud83d\ude00", "\\ud83d"]')
    assert read_json(tmp_path / "a.json", "") == ["\U0001f600", r"\ud83d"]


@pytest.mark.parametrize(
    ("name", "message"), [("", "there is no such file"), ("a" * 300, "cannot be read .File name too long")]
)
def test_what_is_no_file_is_no_text(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        read_text(tmp_path / name, "do this")


def test_a_value_of_any_depth_is_shown_in_brief():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert brief(deep) == "[" * 37 + "..."
    assert brief({"ü": [1, None]}) == '{"ü": [1, null]}'


def test_the_hash_is_that_of_all_bytes(tmp_path):
    (tmp_path / "a").write_bytes(bytes(3_000_000))
    assert sha256(tmp_path / "a") == hashlib.sha256(bytes(3_000_000)).hexdigest()


def test_a_fault_of_the_disk_is_a_line_wherever_it_happens(monkeypatch, capsys):
    """Also where Hydra, or a library, was writing."""
    monkeypatch.setenv("LORA_GPT2_IN_A_LINE", "1")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(SystemExit), told_in_a_line("train"):
        raise OSError(errno.ENOSPC, "No space left on device", "/a/b")
    assert capsys.readouterr().err == "/a/b: No space left on device; make room\n"
    with pytest.raises(FileNotFoundError), told_in_a_line("train"):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/a/b")
    with pytest.raises(SystemExit, match="130"), told_in_a_line("train"):  # Ctrl-C before there is anything
        raise KeyboardInterrupt
    monkeypatch.setattr(cli, "app", lambda: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    with pytest.raises(SystemExit, match="lora-gpt2: a file: No space left on device; make room"):
        cli.main()


def test_what_a_killed_run_left_half_written_goes_with_the_next(tmp_path):
    with replacing(tmp_path / "checkpoints" / "last.ckpt") as temporary:
        temporary.write_text("whole")
    temporary.write_text("half")
    (kept := temporary.with_name(".of-the-user.tmp")).write_text("whole")
    with locked(tmp_path):
        assert {path.name for path in temporary.parent.iterdir()} == {"last.ckpt", kept.name}
