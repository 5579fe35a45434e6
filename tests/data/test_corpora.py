import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from lora_gpt2.data.corpora import dart, e2e, webnlg
from lora_gpt2.data.corpora.splits import split_of
from lora_gpt2.data.jsonl import TextRow
from lora_gpt2.errors import UserError

CSV = """mr,ref
"name[The Vaults], eatType[pub], priceRange[£20-25], familyFriendly[no], near[Café X]","It's £20-25
at The Vaults.  Isn't it 'family-friendly'?"
"name[Zizzi], customer rating[5 out of 5]",Zizzi is good
"""
ENTRIES = [
    ("Airport", [("Aarhus", "city", '"Aarhus, D & K"')], [("good", "Aarhus <is> in D."), ("toFix", "Bad.")]),
    ("Artist", [("A_B", "bornIn", "X"), ("X", "leaderOf", "Y")], [("good", "A, born in X."), ("good", "X.")]),
]
EXPECTED = [
    TextRow('Aarhus : city : "Aarhus, D & K"', "Aarhus <is> in D.", "seen"),
    TextRow("A_B : bornIn : X | X : leaderOf : Y", "A, born in X.", "unseen"),
    TextRow("A_B : bornIn : X | X : leaderOf : Y", "X.", "unseen"),
]


def as_xml(entries) -> str:
    from xml.sax.saxutils import escape

    lines = ["<?xml version='1.0' encoding='utf-8'?>", "<benchmark><entries>"]
    for category, triples, texts in entries:
        lines.append(
            f'<entry category="{category}" eid="Id1"><originaltripleset><otriple>o | o | o</otriple>'
        )
        lines.append("</originaltripleset><modifiedtripleset>")
        lines += [f"<mtriple>{escape(' | '.join(triple))}</mtriple>" for triple in triples]
        lines.append("</modifiedtripleset>")
        lines += [f'<lex comment="{comment}" lid="Id1">{escape(text)}</lex>' for comment, text in texts]
        lines.append("</entry>")
    return "\n".join([*lines, "</entries></benchmark>"])


def as_webnlg_json(entries) -> str:
    keys = ("subject", "property", "object")
    values = [
        {
            "category": category,
            "modifiedtripleset": [dict(zip(keys, triple, strict=True)) for triple in triples],
            "lexicalisations": [{"comment": comment, "lex": text} for comment, text in texts],
        }
        for category, triples, texts in entries
    ]
    return json.dumps({"entries": [{str(i): value} for i, value in enumerate(values, start=1)]})


def as_dart_json(entries) -> str:
    return json.dumps(
        [
            {"tripleset": triples, "annotations": [{"source": c, "text": text} for c, text in texts]}
            for _, triples, texts in entries
        ]
    )


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.txt", "train"),
        ("trainset.csv", "train"),
        ("devset.csv", "valid"),
        ("validation.json", "valid"),
        ("testset_w_refs.csv", "test"),
        ("testdata_with_lex.xml", "test"),
        ("dart-v1.1.1-full-dev.json", "valid"),
        ("README.md", None),
        ("latest.txt", None),
        ("strain.txt", None),
    ],
)
def test_the_split_is_told_from_the_name(name, split):
    assert split_of(Path(name)) == split


def test_splits_are_found_in_every_published_layout(tmp_path):
    for name in ("e2e/train.txt", "e2e/valid.txt", "e2e/test.txt", "e2e/README.md", "csv/trainset.csv",
                 "csv/devset.csv", "csv/testset.csv", "csv/testset_w_refs.csv", "xml/train/1triples/a.xml",
                 "xml/dev/a.xml", "dart/dart-full-dev.json", "dart/dart-full-test.xml", "json/train.json",
                 "json/train/1triples/a.xml"):  # fmt: skip
        written(tmp_path / name, "")

    def found(module, folder):
        splits = module.find_splits(tmp_path / folder)
        return {split: path.relative_to(tmp_path / folder).as_posix() for split, path in splits.items()}

    assert found(e2e, "e2e") == {"train": "train.txt", "valid": "valid.txt", "test": "test.txt"}
    assert found(e2e, "csv") == {"train": "trainset.csv", "valid": "devset.csv", "test": "testset_w_refs.csv"}
    assert found(webnlg, "xml") == {"train": "train", "valid": "dev"}
    assert found(webnlg, "json") == {"train": "train.json"}  # JSON before XML
    assert found(dart, "dart") == {"valid": "dart-full-dev.json", "test": "dart-full-test.xml"}
    assert e2e.find_splits(tmp_path / "e2e/test.txt") == {"test": tmp_path / "e2e/test.txt"}


@pytest.mark.parametrize("module", [e2e, webnlg, dart])
def test_a_missing_root_is_refused(tmp_path, module):
    with pytest.raises(UserError, match="there is no such file or folder"):
        module.find_splits(tmp_path / "nothing")


def test_e2e_lines_are_split_at_the_bars(tmp_path):
    path = written(tmp_path / "test.txt", "name : A | Type : pub||A is a pub . \nname : Bé||Bé ! \n")
    assert list(e2e.read(path)) == [
        TextRow("name : A | Type : pub", "A is a pub ."),
        TextRow("name : Bé", "Bé !"),
    ]


def test_e2e_csv_is_spelled_as_the_lines_are(tmp_path):
    assert list(e2e.read(written(tmp_path / "trainset.csv", CSV))) == [
        TextRow(
            "name : The Vaults | Type : pub | price : £ 20 - 25 | family friendly : no | near : Café X",
            "It 's £ 20 - 25 at The Vaults . Isn 't it ' family - friendly ' ?",
        ),
        TextRow("name : Zizzi | customer rating : 5 out of 5", "Zizzi is good"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "line", "message"),
    [
        ("a.txt", "name : A||A .\nname : A\n", 2, r"context\|\|completion was expected, not 'name : A"),
        ("a.txt", "name : A|| \n", 1, r"context\|\|completion was expected"),
        ("a.txt", "||A .\n", 1, r"context\|\|completion was expected"),
        ("a.txt", "name : A||A||B\n", 1, r"context\|\|completion was expected"),
        ("a.csv", "MR\nname[A]\n", 1, "the columns mr,ref were expected, not 'MR'"),
        ("a.csv", CSV + "name[A],\n", 5, "a meaning representation and a reference were expected"),
        ("a.csv", CSV + "name[A],A,B\n", 5, "a meaning representation and a reference were expected"),
        ("a.csv", CSV + "name(A),A.\n", 5, r"slot\[value\], slot\[value\] was expected, not 'name\(A\)'"),
        ("a.csv", CSV + '"name[A]', 5, "is not valid CSV"),
    ],
)
def test_a_bad_e2e_line_is_named(tmp_path, name, text, line, message):
    path = written(tmp_path / name, text)
    with pytest.raises(UserError, match=message) as caught:
        list(e2e.read(path))
    assert caught.value.where == f"{path}:{line}"


@pytest.mark.parametrize("name", ["train.txt", "train.csv"])
def test_e2e_in_another_encoding_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes("mr,ref\nname[Café]||A\n".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8 text"):
        list(e2e.read(tmp_path / name))


def test_webnlg_json_and_xml_give_the_same_rows(tmp_path):
    json_file = written(tmp_path / "test.json", as_webnlg_json(ENTRIES))
    xml_file = written(tmp_path / "test.xml", as_xml(ENTRIES))
    assert list(webnlg.read(json_file)) == list(webnlg.read(xml_file)) == EXPECTED


def test_webnlg_folders_are_read_by_number_of_triples_then_category(tmp_path):
    written(tmp_path / "train/2triples/a.xml", as_xml(ENTRIES[1:]))
    written(tmp_path / "train/1triples/z.xml", as_xml(ENTRIES[:1]))
    assert list(webnlg.read(tmp_path / "train")) == EXPECTED


def test_dart_takes_every_annotation_and_lowers_the_relation(tmp_path):
    entries = [
        ("MISC", [("Mars Hill", "JOINED_IN", "1973"), ("A", "[TITLE]", "B")], [("lily", "Mars."), ("x", "B")])
    ]
    expected = [TextRow("Mars Hill : joined_in : 1973 | A : [title] : B", text) for text in ("Mars.", "B")]
    assert list(dart.read(written(tmp_path / "dev.json", as_dart_json(entries)))) == expected
    assert list(dart.read(written(tmp_path / "dev.xml", as_xml(entries)))) == expected


@pytest.mark.parametrize("module", [webnlg, dart])
@pytest.mark.parametrize(
    ("name", "text", "line", "message"),
    [
        ("a.xml", "<benchmark>\n<entries>\n</benchmark>", 3, "is not valid XML"),
        ("a.json", '{\n"entries": [}', 2, "is not valid JSON"),
        (
            "a.xml",
            '<?xml version="1.0"?>\n<!DOCTYPE x [<!ENTITY a "aa"><!ENTITY b "&a;&a;">]>\n<x>&b;</x>',
            2,
            "declares a document type, which is not read for safety",
        ),
        (
            "a.xml",
            '<!DOCTYPE b [<!ENTITY a SYSTEM "file:///etc/hostname">]><benchmark>&a;</benchmark>',
            1,
            "declares a document type",
        ),
    ],
)
def test_malformed_and_unsafe_files_are_named_by_line(tmp_path, module, name, text, line, message):
    path = written(tmp_path / name, text)
    with pytest.raises(UserError, match=message) as caught:
        list(module.read(path))
    assert caught.value.where == f"{path}:{line}"


@pytest.mark.parametrize(("module", "text"), [(webnlg, as_webnlg_json), (dart, as_dart_json)])
def test_json_that_cannot_become_text_is_refused(tmp_path, module, text):
    path = written(tmp_path / "train.json", text(ENTRIES).replace("bornIn", r"born\ud83dIn"))
    with pytest.raises(UserError, match="half of a character"):
        list(module.read(path))
    with pytest.raises(UserError, match="nested too deep"):
        list(module.read(written(path, "[" * 100_000)))


def test_xml_that_is_not_a_benchmark_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no benchmark/entries/entry"):
        list(dart.read(written(tmp_path / "a.xml", "<html/>")))
    text = as_xml(ENTRIES).replace("bornIn | X", "bornIn")
    with pytest.raises(UserError, match=r"subject \| property \| object was expected") as caught:
        list(dart.read(written(tmp_path / "b.xml", text)))
    assert caught.value.where.endswith("b.xml: entry 2 (eid Id1)")
    text = re.sub("<mtriple>.*?</mtriple>", "", as_xml(ENTRIES))
    with pytest.raises(UserError, match="has no category or no modified triples"):
        list(dart.read(written(tmp_path / "c.xml", text)))


def test_an_empty_webnlg_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no XML file"):
        list(webnlg.read(tmp_path))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], 'the key "entries" with a list was expected'),
        ({"entries": [{"1": {}}]}, "entry 1: the key 'modifiedtripleset' is missing"),
        ({"entries": [3]}, "entry 1: an object around one entry was expected"),
        ({"entries": [{"1": 2, "2": 3}]}, "entry 1: an object around one entry was expected"),
        (
            {"entries": [{"1": {"category": "City", "modifiedtripleset": [], "lexicalisations": []}}]},
            "entry 1: at least one triple",
        ),
    ],
)
def test_webnlg_json_of_another_shape_is_refused(tmp_path, value, message):
    with pytest.raises(UserError, match=message):
        list(webnlg.read(written(tmp_path / "train.json", json.dumps(value))))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "a list of triplesets was expected"),
        ([{"annotations": []}], "entry 1: the key 'tripleset' is missing"),
        ([{"tripleset": [["a", "b"]], "annotations": []}], "entry 1: triples of three texts"),
        ([{"tripleset": [["a", "b", 3]], "annotations": []}], "entry 1: at least one triple, and text"),
        ([{"tripleset": [["a", "b", "c"]], "annotations": [{"text": None}]}], "entry 1: at least one triple"),
    ],
)
def test_dart_json_of_another_shape_is_refused(tmp_path, value, message):
    with pytest.raises(UserError, match=message):
        list(dart.read(written(tmp_path / "train.json", json.dumps(value))))


@pytest.fixture
def corpora() -> Path:
    folder = os.environ.get("LORA_GPT2_CORPORA")
    if not folder:
        pytest.fail("set LORA_GPT2_CORPORA to the folder of the real corpora")
    return Path(folder)


@pytest.mark.corpora
@pytest.mark.parametrize(
    ("module", "folder", "expected"),
    [
        (e2e, "e2e", {"train": (42061, 4862), "valid": (4672, 547), "test": (4693, 630)}),
        (e2e, "e2e_official", {"train": (42061, 4862), "valid": (4672, 547), "test": (4693, 630)}),
        (webnlg, "webnlg", {"train": (18025, 6888), "valid": (2258, 870), "test": (4928, 1862)}),
        (dart, "dart", {"valid": (6980, 2721), "test": (12552, 4159)}),
    ],
)
def test_the_real_corpora_have_the_published_sizes(corpora, module, folder, expected):
    rows = {split: list(module.read(path)) for split, path in module.find_splits(corpora / folder).items()}
    assert {split: (len(r), len({row.context for row in r})) for split, r in rows.items()} == expected


@pytest.mark.corpora
@pytest.mark.parametrize(
    ("lines", "table", "differing"),
    [("train", "trainset", 186), ("valid", "devset", 15), ("test", "testset_w_refs", 130)],
)
def test_the_published_e2e_table_gives_the_contexts_of_the_lines(corpora, lines, table, differing):
    ours = list(e2e.read(corpora / f"e2e_official/{table}.csv"))
    theirs = list(e2e.read(corpora / f"e2e/{lines}.txt"))
    assert [row.context for row in ours] == [row.context for row in theirs]
    assert sum(a.completion != b.completion for a, b in zip(ours, theirs, strict=True)) == differing
    assert all(
        a.completion.replace(" ", "") == b.completion.replace(" ", "")
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.corpora
@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_real_webnlg_json_and_xml_give_the_same_rows_in_the_same_order(corpora, split):
    rows = list(webnlg.read(corpora / f"webnlg/{split}.json"))
    assert rows == list(webnlg.read(corpora / f"webnlg/{split}"))
    expected = {"seen": 2495, "unseen": 2433} if split == "test" else {"seen": len(rows)}
    assert Counter(row.part for row in rows) == expected
