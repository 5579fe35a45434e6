"""An adapter's analysis on the screen, as JSON and as a picture."""

import pytest
import torch

from lora_gpt2.errors import UserError
from lora_gpt2.reporting import inspection
from lora_gpt2.weights.analysis import Analysis

ANALYSES = [
    Analysis("h.0.attn.c_attn", "q", torch.tensor([4.0, 3.0]), 0.5, 2.25),
    Analysis("h.0.mlp.c_fc", "", torch.tensor([1.0, 1.0, 1.0]), None, None),
]
OVERLAPS = {("h.0.attn.c_attn", "q"): torch.tensor([[0.25, 0.5], [0.125, 0.75]])}


def test_the_table_has_a_line_for_each_projection(capsys):
    inspection.table(ANALYSES, 1, OVERLAPS)
    said = capsys.readouterr().out
    first, second = (line.split() for line in said.splitlines() if line.startswith(" h.0"))
    assert first == ["h.0.attn.c_attn", "q", "2", "5", "0.5", "2.25", "1.98", "4", "3", "64.0", "%", "0.75"]
    assert second == ["h.0.mlp.c_fc", "3", "1.73", "n/a", "n/a", "3.00", "1", "1", "33.3", "%", "n/a"]
    assert max(map(len, said.splitlines())) <= 90


def test_json_holds_the_whole_spectrum():
    first, second = inspection.as_json(ANALYSES, OVERLAPS)
    assert first["singular_values"] == [4.0, 3.0]
    assert first["similarity"] == [[0.25, 0.5], [0.125, 0.75]]
    assert second["similarity"] is None
    assert "similarity" not in inspection.as_json(ANALYSES, None)[0]


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
@pytest.mark.parametrize("overlaps", [None, OVERLAPS])
def test_the_picture_is_drawn_the_same_each_time(tmp_path, name, start, overlaps):
    for folder in ("one", "two"):
        inspection.picture(tmp_path / folder / name, ANALYSES, overlaps)
    one, two = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
    assert one.startswith(start)
    assert one == two


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"the picture is a .png or a .svg"):
        inspection.picture(tmp_path / "a.pdf", ANALYSES, None)
