import codecs
import copy
import csv
import gc
import json
import math
import multiprocessing
import os
import pickle
import sys
import warnings
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from svdd import GuidedDiffusion, UserError
from svdd.__main__ import main
from svdd.rewards.brightness import Brightness
from svdd.runs.bounds import check_images
from svdd.runs.prompt_files import open_source
from svdd.runs.prompts import Prompt, PromptDataModule, PromptDataset, PromptError, keeping_prompts
from svdd.runs.rows import RESERVED_COLUMNS, ResultRow, result_row
from svdd.samplers.svdd import SVDD
from tests.memory import peak_bytes

REAL_FILES = Path(__file__).parents[2] / "shared" / "data"
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n"
ROWS = [
    {"prompt": "a red apple", "negative_prompt": "blur", "seed": 7, "tag": "fruit"},
    {"prompt": "ein süßer Hund 🐕", "negative_prompt": None, "seed": None, "tag": "a, b"},
    {"prompt": 'a "quoted" word', "negative_prompt": None, "seed": 2**63 - 1, "tag": ""},
]
EXPECTED = [
    Prompt(i, r["prompt"], r["negative_prompt"], r["seed"], {"tag": r["tag"]})  # type: ignore[arg-type]
    for i, r in enumerate(ROWS)
]


@pytest.fixture
def write(tmp_path):
    """Writes bytes or text (UTF-8, unchanged) to a file and returns its path."""

    def write_file(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write_file


def write_table(path, rows, delimiter):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_rows(path, rows):
    suffix = path.suffix
    if suffix == ".txt":
        path.write_text("\n".join(row["prompt"] for row in rows), encoding="utf-8")
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    elif suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    elif suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        write_table(path, rows, "\t" if suffix == ".tsv" else ",")


def texts(source, **arguments):
    return [prompt.text for prompt in PromptDataset(source, **arguments)]


def message(source, **arguments):
    """Returns the one-line message of the error that a source raises."""
    with pytest.raises(PromptError) as caught:
        PromptDataset(source, **arguments)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.__cause__ is None
    return text


# Formats


def rows_of(path, **options):
    """The prompts of a file, each of which states the file's folder."""
    rows = list(PromptDataset(path, **options))
    assert {row.folder for row in rows} == {str(Path(path).parent)}
    return [row._replace(folder=None) for row in rows]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet", "CSV"])
def test_every_column_survives_in_every_format(tmp_path, suffix):
    path = tmp_path / f"prompts.{suffix}"
    write_rows(Path(str(path).lower()), ROWS)
    if suffix.isupper():
        Path(str(path).lower()).rename(path)
    assert rows_of(str(path)) == EXPECTED


def test_txt_has_one_prompt_a_line(write):
    assert rows_of(write("p.txt", "a red apple\na blue cup, on a table")) == [
        Prompt(0, "a red apple", None, None, {}),
        Prompt(1, "a blue cup, on a table", None, None, {}),
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("bom", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("p.txt", ["über", "b"]),
        ("p.csv", ["prompt", "über", "b"]),
        ("p.tsv", ["prompt\tseed", "über\t1", "b\t"]),
        ("p.json", ['["über",', '"b"]']),
        ("p.jsonl", ['"über"', '{"prompt": "b"}']),
    ],
)
def test_line_ends_final_newline_and_bom(write, name, lines, end, final, bom):
    content = bom + (end.join(lines) + end * final).encode()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert texts(write(name, content)) == ["über", "b"]


def test_json_may_be_an_object_of_prompts(write):
    assert texts(write("p.json", '{"prompts": ["a", {"prompt": "b"}]}')) == ["a", "b"]


def test_json_values_are_preserved(write):
    extra = {"include": [{"class": "bench", "count": 1}], "weight": 0.5, "none": None, "yes": True, "": "ü\u2028"}
    path = write("p.jsonl", json.dumps({"prompt": "a", **extra}))
    assert PromptDataset(path)[0].extra == extra


def test_parquet_values_are_preserved(tmp_path):
    rows = [{"prompt": None, "n": 1, "tags": ["a"]}, {"prompt": "b", "n": None, "tags": ["x"]}]
    write_rows(tmp_path / "p.parquet", rows)
    with pytest.warns(UserWarning, match="skipped a blank prompt, the first at row 1"):
        assert rows_of(str(tmp_path / "p.parquet")) == [Prompt(0, "b", None, None, {"n": None, "tags": ["x"]})]


def test_quoted_fields_may_hold_newlines_and_delimiters(write):
    path = write("p.csv", 'id,prompt\r\n1,"a cat,\r\na dog"\r\n2,"say ""hi"""\r\n')
    assert texts(path) == ["a cat, a dog", 'say "hi"']


def test_whitespace_is_collapsed_and_stripped():
    with pytest.warns(UserWarning, match="item 1: holds a tab, which becomes a space; a table needs a name ending in"):
        assert texts([" a\tb\r\n\r\nc\u2028d \n"]) == ["a b c d"]
    assert texts(["a\x0bb\x0cc\x85d\x1ee\u2029f"]) == ["a b c d e f"]


def test_prompt_column(write):
    path = write("p.csv", "caption,seed\nx,3\n")
    assert rows_of(path, prompt_column="caption") == [Prompt(0, "x", None, 3, {})]
    assert texts(["inline is unaffected"], prompt_column="caption") == ["inline is unaffected"]


def test_blank_negative_prompt_and_seed_are_none(write):
    path = write("p.csv", "prompt,negative_prompt,seed\na, ,  \nb,x, 5 \n")
    assert [(p.negative_prompt, p.seed) for p in PromptDataset(path)] == [(None, None), ("x", 5)]


def test_home_directory_is_expanded(write, tmp_path, monkeypatch):
    write("p.txt", "a")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts("~/p.txt") == ["a"]


def test_limit_keeps_the_first_and_reads_no_further(write):
    path = write("p.jsonl", '"a"\n\n"b"\n{broken')
    with pytest.warns(UserWarning, match="skipped a blank prompt, the first at line 2"):
        assert texts(path, limit=2) == ["a", "b"]
    assert texts(["a", "b"], limit=5) == ["a", "b"]


def test_indexing(tmp_path):
    dataset = PromptDataset(["a", "b"])
    assert (len(dataset), dataset[-1].text, dataset[torch.tensor(1)].index) == (2, "b", 1)
    for index in (2, -3):
        with pytest.raises(IndexError):
            dataset[index]


# Blank prompts


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("p.txt", "\na\n  \nb\n\n", "line 1"),
        ("p.jsonl", '"a"\n\n""\n{"prompt": null}\n"b"', "line 2"),
        ("p.csv", "prompt,x\na,1\n,2\n\n ,3\nb,4\n", "line 3"),
        ("p.json", '["a", " ", "\\n", {"prompt": ""}, "b"]', "item 2"),
    ],
)
def test_blank_prompts_are_skipped_with_one_warning(write, name, content, where):
    path = write(name, content)
    with pytest.warns(UserWarning, match="skipped") as caught:
        dataset = PromptDataset(path)
    assert [(p.index, p.text) for p in dataset] == [(0, "a"), (1, "b")]
    assert [str(w.message) for w in caught] == [f"{path}: skipped 3 blank prompts, the first at {where}"]


def test_blank_inline_prompts_are_skipped():
    with pytest.warns(UserWarning, match="^prompts: skipped a blank prompt, the first at item 1$"):
        assert texts(["", "a"]) == ["a"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", ""),
        ("p.txt", codecs.BOM_UTF8),
        ("p.csv", ""),
        ("p.csv", "\n\n"),
        ("p.csv", "prompt\n"),
        ("p.tsv", "prompt\tseed\n"),
        ("p.json", ""),
        ("p.json", "[]"),
        ("p.json", '{"prompts": []}'),
        ("p.jsonl", ""),
    ],
)
def test_a_source_without_prompts(write, name, content):
    path = write(name, content)
    assert message(path) == f"{path}: holds no prompt, expected at least one"


def test_a_source_of_blank_prompts_only(write):
    path = write("p.txt", "\n \n")
    assert message(path) == f"{path}: holds no prompt (2 blank), expected at least one"
    assert message([]) == "prompts: holds no prompt, expected at least one"


def test_empty_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "p.parquet")
    assert message(str(tmp_path / "p.parquet")).endswith("holds no prompt, expected at least one")


# The source as a whole


def test_a_bare_prompt_gets_a_hint_to_use_a_list():
    assert message("a red apple") == (
        "prompts must be a list of prompts, 'emoji' (the shipped list) or a file ending in one of .txt, .csv, .tsv, "
        ".json, .jsonl, .parquet,"
        " got 'a red apple'; write a single prompt as a list: [\"a red apple\"]"
    )
    assert "as a list" in message("long " * 1000)
    assert "as a list" in message("")
    assert "as a list" in message("two\nlines")


def test_missing_directory_unknown_and_unreadable(write, tmp_path):
    missing = str(tmp_path / "nowhere.txt")
    assert message(missing) == f"{missing}: no such file, seen from {os.getcwd()}; check the path"
    assert "embedded null byte" in message("a\0b.txt")
    assert message(str(tmp_path)).startswith(f"{tmp_path}: is a directory, expected a file ending in one of .txt")
    (tmp_path / "folder.csv").mkdir()
    assert "is a directory" in message(str(tmp_path / "folder.csv"))
    assert "unknown kind of file, expected a name ending in one of .txt" in message(write("p.yaml", "a"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(write):
    path = write("p.txt", "a")
    os.chmod(path, 0)
    assert "cannot be read" in message(path)


def test_prompt_error_is_a_user_error():
    assert issubclass(PromptError, UserError)
    assert issubclass(PromptError, ValueError)


def test_parquet_without_pyarrow(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = write("p.parquet", b"PAR1")
    assert message(path) == (f"{path}: reading parquet needs pyarrow, which is missing: pip install 'svdd[parquet]'")


def test_broken_parquet(write):
    pytest.importorskip("pyarrow")
    assert "not a readable parquet file: " in message(write("p.parquet", b"not parquet at all"))


# Encoding and characters


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.json", "p.jsonl"])
def test_invalid_utf8_names_the_line(write, name):
    lines = {
        "p.txt": ["a", "b", "caf\xe9"],
        "p.csv": ["prompt", "b", "caf\xe9"],
        "p.json": ["[", '"b",', '"caf\xe9"]'],
        "p.jsonl": ['"a"', '"b"', '"caf\xe9"'],
    }[name]
    path, position = write(name, "\n".join(lines).encode("latin-1")), lines[2].index("\xe9") + 1
    expected = f"line 3: byte 0xe9 at position {position} is not UTF-8 text; save the file as UTF-8"
    assert message(path) == f"{path}: {expected}"


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.json", "p.jsonl"])
def test_utf16_without_a_mark_gets_a_hint_to_save_as_utf8(write, name, encoding):
    path = write(name, '["prompt"]\n'.encode(encoding))
    assert "line 1: byte 0x" in message(path)
    assert message(path).endswith("this looks like UTF-16 or a binary file; save the file as UTF-8")


@pytest.mark.parametrize("content", [b"a\xef", b"\xef\xbba", b"a\xf0\x9f", b"\xed\xa0\x80", b"\xc0\x80"])
def test_truncated_and_overlong_sequences(write, content):
    assert "line 1: byte 0x" in message(write("p.txt", content))


def test_an_overlong_line_is_refused(write):
    assert message(write("p.txt", b"x" * 2**24)).endswith(
        "line 1: is longer than 16777216 characters; is this a text file?"
    )


@pytest.mark.parametrize("character", ["\x01", "\x1b", "\x7f", "\x9f"])
def test_control_characters(write, character):
    path = write("p.txt", f"a\nb\nc {character}d\n")
    assert message(path) == (
        f"{path}: line 3: prompt holds the control character U+{ord(character):04X} at character 3; remove it"
    )


def test_control_characters_elsewhere(write):
    assert "prompts: item 2: prompt holds the control character U+0000" in message(["a", "\0"])
    path = write("p.jsonl", '{"prompt": "a", "negative_prompt": "\\u001b"}')
    assert "line 1: negative_prompt holds the control character U+001B" in message(path)
    assert "line 2: caption holds the control" in message(write("p.csv", "caption\n\x02"), prompt_column="caption")


def test_half_a_surrogate_pair(write):
    for content in ('"\\ud83d"', '{"prompt": "a", "x": ["\\ud83d"]}'):
        path = write("p.jsonl", '"a"\n' + content)
        assert message(path).startswith(f"{path}: line 2: holds half of a surrogate pair")
    assert message(["\udcff"]).startswith("prompts: item 1: holds half of a surrogate pair")


def test_length(write):
    assert texts(["x" * 2000 + " "]) == ["x" * 2000]
    expected = "has 2001 characters, expected at most 2000; shorten it or raise max_prompt_length"
    assert message(write("p.txt", "a\n" + "x" * 2001)).endswith(f"line 2: prompt {expected}")
    path = write("p.jsonl", json.dumps({"prompt": "a", "negative_prompt": "x" * 2001}))
    assert message(path).endswith(f"line 1: negative_prompt {expected}")
    assert texts(["x" * 2001], max_prompt_length=2001)
    assert "has 3 characters, expected at most 2" in message(["äöü"], max_prompt_length=2)


# JSON


def test_malformed_jsonl(write):
    path = write("p.jsonl", '"a"\n\n{"prompt": "b",}\n')
    assert message(path).startswith(f"{path}: line 3: not valid JSON: ")
    assert " at column 1" in message(path)


def test_malformed_json_names_the_line(write):
    assert "line 3: not valid JSON: Expecting" in message(write("p.json", '[\n"a"\n"b"]'))
    assert "line 1: not valid JSON: Extra data" in message(write("p.json", '["a"] ["b"]'))
    assert "line 1: not valid JSON" in message(write("p.json", "[" * 200_000))


@pytest.mark.parametrize("name", ["p.json", "p.jsonl"])
def test_numbers_outside_json(write, name):
    """Files written by Python have them; a missing value stays missing, an infinite one becomes text."""
    row = '{"prompt": "a", "x": [NaN, Infinity, -1e999, 1.5], "seed": NaN}'
    (prompt,) = PromptDataset(write(name, f"[{row}]" if name == "p.json" else row))
    assert (prompt.seed, prompt.extra) == (None, {"x": [None, "inf", "-inf", 1.5]})
    row = f'{{"prompt": "a", "x": {"1" * 5000}}}'
    assert "line 1: not valid JSON: " in message(write(name, f"[{row}]" if name == "p.json" else row))


@pytest.mark.parametrize(
    "content", ['{"prompt": "a"}', '"a"', "3", "null", '{"prompts": "a"}', '{"prompts": [], "data": []}']
)
def test_json_of_another_structure(write, content):
    assert 'expected an array of prompts or {"prompts": [...]}, got ' in message(write("p.json", content))


@pytest.mark.parametrize("item", ["3", "null", "true", '["a"]'])
def test_items_that_are_neither_string_nor_object(write, item):
    expected = "expected a prompt as a string or an object, got"
    assert f"item 2: {expected}" in message(write("p.json", f'["a", {item}]'))
    assert f"line 2: {expected}" in message(write("p.jsonl", f'"a"\n{item}'))


def test_inline_items_must_be_strings():
    assert message(["a", 3]) == "prompts: item 2: expected a prompt as a string or an object, got 3"


@pytest.mark.parametrize("value", ["3", "false", '["a"]', "{}"])
def test_a_prompt_of_another_type(write, value):
    assert "line 1: prompt must be a string, got " in message(write("p.jsonl", f'{{"prompt": {value}}}'))
    path = write("q.jsonl", f'{{"prompt": "a", "negative_prompt": {value}}}')
    assert "line 1: negative_prompt must be a string, got " in message(path)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True, False, "x", [1], 10**100, 1e300])
def test_bad_seeds_in_json(write, seed):
    path = write("p.jsonl", json.dumps({"prompt": "a", "seed": seed}))
    assert "line 1: seed must be an integer from 0 to 2**64 - 1 or empty, got " in message(path)
    assert len(message(path)) < len(path) + 160


# Tables


@pytest.mark.parametrize("seed", ["-1", str(2**64), "1.5", "1_000", "x", "٣", "9" * 6000, "1e99", "none at all"])
def test_bad_seeds_in_csv(write, seed):
    path = write("p.csv", f"prompt,seed\na,1\nb,{seed}\n")
    assert f"{path}: line 3: seed must be an integer from 0 to 2**64 - 1 or empty, got " in message(path)


def test_no_prompt_column(write):
    path = write("p.csv", "\nid,Promt,x\n1,a,b\n")
    assert message(path) == (
        f"{path}: line 2: no column 'prompt' among the columns 'id', 'Promt', 'x', did you mean 'Promt'?;"
        " say with prompt_column which one holds the prompts"
    )
    assert "did you mean" not in message(write("p.tsv", "id\ttitle\n1\ta\n"))
    path = write("p.jsonl", '{"prompt": "a"}\n{"text": "b"}')
    assert "line 2: no column 'prompt' among the columns 'text'" in message(path)
    assert "item 1: no column 'prompt' among the columns none;" in message(write("p.json", "[{}]"))
    many = ",".join(f"c{i}" for i in range(50))
    assert "'c19' and 30 more;" in message(write("p.csv", many + "\n"))


def test_no_prompt_column_in_parquet(tmp_path):
    write_rows(tmp_path / "p.parquet", [{"promts": "a"}])
    expected = "schema: no column 'prompt' among the columns 'promts', did you mean 'promts'?"
    assert expected in message(str(tmp_path / "p.parquet"))


def test_rows_of_another_width(write):
    path = write("p.csv", 'prompt,x\n"a\nb",1\na cat, a dog, 2\n')
    assert message(path) == (
        f'{path}: line 4: expected 2 fields as in the header, got 3; put "quotes" around a field that holds a comma'
    )
    assert "line 2: expected 2 fields" in message(write("p.tsv", "prompt\tx\na\n"))
    assert "a field that holds a tab" in message(write("p.tsv", "prompt\tx\na\n"))


def test_malformed_quotes_name_the_row_they_start_in(write):
    path = write("p.csv", 'prompt\na\n"b\nc\nd\n')
    assert f"{path}: line 3: malformed row: unexpected end of data; check the quotes" in message(path)
    assert "line 2: malformed row: ',' expected after '\"'" in message(write("p.csv", 'prompt\n"a"b\n'))
    assert "line 2: malformed row: field larger than" in message(write("p.csv", 'prompt\n"' + "x\n" * 100_000))


def test_repeated_columns(write, tmp_path):
    assert "line 1: column 'x' appears more than once; rename one of them" in message(write("p.csv", "prompt,x,x\n"))
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table([["a"], ["b"]], names=["prompt", "prompt"])
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "p.parquet")
    assert "schema: column 'prompt' appears more than once" in message(str(tmp_path / "p.parquet"))


@pytest.mark.parametrize("column", sorted(ResultRow.__annotations__.keys() - {"prompt", "negative_prompt", "seed"}))
def test_columns_with_the_name_of_a_result(write, column):
    expected = f"column '{column}' has the name of a result that svdd writes itself; rename the column"
    assert f"line 1: {expected}" in message(write("p.csv", f"prompt,{column}\na,b\n"))
    assert f"line 2: {expected}" in message(write("p.jsonl", f'"a"\n{{"prompt": "b", "{column}": 1}}'))
    assert texts(write("q.csv", f"{column}\na\n"), prompt_column=column) == ["a"]


def test_another_column_named_prompt_would_hide_the_prompt(write):
    path = write("p.csv", "caption,prompt\na,b\n")
    assert "column 'prompt' has the name of a result" in message(path, prompt_column="caption")


def test_values_that_json_cannot_hold_are_carried_as_text_or_left_out(tmp_path):
    day, price = datetime(2022, 8, 7, 22, 57), Decimal("1.50")
    row = {"prompt": "b", "nan": math.nan, "day": day, "price": price, "image": {"bytes": b"\x89"}, "seed": 2**32 - 1}
    expected = {"nan": None, "price": "1.50"}
    array = {"array": np.arange(2), "scalar": np.float32(1.5), "yes": np.bool_(True), "nested": ({1: day},)}
    with pytest.warns(UserWarning, match="column 'image' holds values that JSON lacks and is left out of the results"):
        (prompt,) = PromptDataset([row | array | {"seed": np.uint64(2**64 - 1)}])
    array = {"array": [0, 1], "scalar": 1.5, "yes": True, "nested": [{"1": str(day)}]}
    assert (prompt.seed, prompt.extra) == (2**64 - 1, expected | {"day": str(day)} | array)
    write_rows(tmp_path / "p.parquet", [row])
    with pytest.warns(UserWarning, match="column 'image' holds values that JSON lacks and is left out of the results"):
        (prompt,) = PromptDataset(str(tmp_path / "p.parquet"))
    assert prompt.extra.pop("day").startswith("2022-08-07 22:57:00")
    assert (prompt.seed, prompt.extra) == (2**32 - 1, expected)


def test_parquet_values_outside_of_python_are_left_out_and_whole_decimals_are_seeds(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {
        "prompt": ["a", "b"],
        "seed": [Decimal("7"), None],
        "time": pyarrow.array([2**58, 1], pyarrow.timestamp("us")),
        "day": pyarrow.array([10**8, 2], pyarrow.date32()),
        "days": pyarrow.array([[10**8], [2]], pyarrow.list_(pyarrow.date32())),
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "p.parquet")
    with pytest.warns(UserWarning, match="p.parquet: column '.*' holds dates or times that Python cannot") as caught:
        one, two = PromptDataset(str(tmp_path / "p.parquet"))
    assert len(caught) == 3
    assert (one.seed, one.extra) == (7, {"time": None, "day": None, "days": None})
    late = {"time": "1970-01-01 00:00:00.000001", "day": "1970-01-03", "days": ["1970-01-03"]}
    assert (two.seed, two.extra) == (None, late)


def test_no_column_overwrites_a_result():
    """The only reserved names that a source may use are prompt, negative prompt and seed."""
    allowed = {"negative_prompt", "seed"}
    assert ResultRow.__annotations__.keys() - allowed == RESERVED_COLUMNS
    assert {"path_kl_sample", "particle", "particle_weight", "selection"} < RESERVED_COLUMNS
    prompt = Prompt(3, "a", "b", 5, {"tag": "x"})
    known = {"particle": (1, 0.25), "path_kl_sample": 0.1, "selection": {"choices": 3}}
    row = result_row(prompt, 1, 2, 6, {"r": 0.5}, {"rows": 4}, **known)
    assert row.keys() | {"file", "sha256"} == ResultRow.__annotations__.keys() | {"tag"}
    order = ["prompt_index", "image_index", "num_images", "prompt", "negative_prompt", "tag", "seed"]
    assert list(row) == [*order, "particle", "particle_weight", "rewards", "path_kl_sample", "selection", "ledger"]


def test_seeds_of_images():
    assert Prompt(3, "a", None, None, {}).image_seeds(7, 2) == [13, 14]
    assert Prompt(3, "a", None, 5, {}).image_seeds(7, 2) == [5, 6]
    assert Prompt(0, "a", None, 2**64 - 1, {}).image_seeds(7, 2) == [2**64 - 1, 0]


# What people have on disk


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [  # each prompt as text|negative prompt|seed
        ("p.csv", "prompt,Seed,Negative Prompt\na,7,x\n", ["a|x|7"]),
        ("p.csv", "TEXT;SEED;negative-prompt;;\r\na, b;42.0;;;\r\n;;;;\r\nc;;x;;\r\n", ["a, b||42", "c|x|"]),
        ("p.csv", "sep=;\r\nprompt;seed\r\na;18446744073709551615\r\n", ["a||18446744073709551615"]),
        ("p.csv", "Prompt\tseed\na, b\t4.2e1\n", ["a, b||42"]),
        ("p.tsv", "caption,seed\na,3\n", ["a||3"]),
        ("p.csv", ',prompt,seed\n0,"a",5\n', ["a||5"]),  # the index of pandas
        ("p.csv", 'prompt, negative_prompt\n"a, b", "x, y"\n', ["a, b|x, y|"]),
        ("p.csv", 'prompts\na cat, a dog\n"b, c"\n', ["a cat, a dog||", "b, c||"]),
        ("p.csv", 'prompt,x\n"a\u2028b",1\n"c\rd",2\n', ["a b||", "c d||"]),
        ("p.csv", '\ufeff"prompt",seed\n"a",1\n\ufeff"prompt",seed\n"b",2\n', ["a||1", "b||2"]),
        ("p.jsonl", '\ufeff"a"\n\ufeff{"prompt": "b", "seed": "7"}\n', ["a||", "b||7"]),
        ("p.txt", "\u200b\na\n\ufeff\n\u200b\u200d\nb\u200b", ["a||", "b||"]),
        ("p.csv", "prompt;seed\nü;1\n".encode("utf-16"), ["ü||1"]),  # Excel's Unicode text
        ("p.json", '["ü"]'.encode("utf-32"), ["ü||"]),
        ("p.tsv", 'Prompt\tx\n"Hi" sign\tsay "x"\n"a b"\t12"\n"open\tx\n', ['"Hi" sign||', '"a b"||', '"open||']),
        ("p.tsv", '"prompt"\t"seed"\n"a ""b"" c"\t"1"\n', ['a "b" c||1']),
        ("p.tsv", 'prompt\tx\n"a ""b"""\t"c\nd"\ne\tf\n', ['a "b"||', "e||"]),
        ("p.json", '{"7": {"prompt": "a", "category": "x"}, "8": {"prompt": "b"}}', ["a||", "b||"]),  # MJHQ
        ("p.json", '{"images": [{}], "annotations": [{"id": 1, "caption": "a"}]}', ["a||"]),  # COCO
        ("p.json", '{"prompt": "a"}\n{"prompt": "b"}\n', ["a||", "b||"]),  # of the library datasets
        ("p.csv", "prompt,seed\na,NA\nb,nan\nc,null\nd,None\n", ["a||", "b||", "c||", "d||"]),
        ("p.jsonl", '{"Text": "a", "seed": 42.0}\n{"Text": "b", "seed": ""}\n', ["a||42", "b||"]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*skipped")
def test_files_as_they_are_found(write, name, content, expected):
    columns = ((prompt.text, prompt.negative_prompt, prompt.seed) for prompt in PromptDataset(write(name, content)))
    assert ["|".join("" if value is None else str(value) for value in row) for row in columns] == expected


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.csv", "prompt,Prompt\na,b\n", "line 1: columns 'prompt' and 'Prompt' could both be the prompt; rename one"),
        ("p.csv", "text,caption\na,b\n", "could both be the prompt; rename one, or name one with prompt_column"),
        ("p.csv", "prompt,seed,Seed\na,1,2\n", "columns 'seed' and 'Seed' could both be the seed; rename one"),
        ("p.csv", "prompt,seed\na,1.23457E+18\n", "line 2: seed '1.23457E+18' has lost digits as a decimal number"),
        ("p.jsonl", '{"prompt": "a", "prompt": "b"}', "line 1: not valid JSON: an object has the key 'prompt' twice"),
        ("p.txt", LFS_POINTER, "p.txt: is a Git LFS pointer, not the file itself; run `git lfs pull`"),
        ("p.csv", LFS_POINTER, "run `git lfs pull`"),
        ("p.jsonl", LFS_POINTER, "run `git lfs pull`"),
        ("p.parquet", LFS_POINTER, "run `git lfs pull`"),
        ("p.csv", "prompt\uff0cseed\na\uff0c1\n", "hold the fullwidth mark '\uff0c'; put ASCII commas"),
        ("p.csv", b"\x1f\x8b\x08\x00", "is a gzip archive, not text; unpack it"),
        ("p.csv", b"PK\x03\x04", "is a zip archive or an Excel file"),
        ("p.xlsx", b"PK\x03\x04", "; save the sheet as CSV (UTF-8)"),
        ("p.txt", "a".encode("utf-16") + b"x", "is not utf-16"),
        ("p.csv", "prompt\n红苹果\n".encode("gbk"), "line 2: byte 0xba at position 1 is not UTF-8 text"),
        ("p.csv", "prompt" + ",x" * 200_000, "line 1: columns: 200001 is above the limit of 1000; leave out"),
        ("p.jsonl", json.dumps(dict.fromkeys(map(str, range(200_000)), 1)), "columns: 200000 is above"),
        ("p.jsonl", '{"prompt": "a", "x": ' + "[" * 490 + "]" * 490 + "}", "depth of column 'x': 33 is above"),
        ("p.jsonl", json.dumps({"prompt": "a", "x": "x" * 2**20}), "a prompt with its columns: 1048601 is above"),
    ],
)
def test_files_that_cannot_be_used_are_refused(write, name, content, expected):
    assert expected in message(write(name, content))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.csv", "prompt,Seeds\na,1\n", "column 'Seeds' is only copied into the results, did you mean 'seed'?"),
        (
            "p.csv",
            "prompt,noise_seed\na,1\n",
            "column 'noise_seed' is only copied into the results, did you mean 'seed'?",
        ),
        ("p.csv", "prompt,negative\na,1\n", "column 'negative' is only copied .* did you mean 'negative_prompt'?"),
        ("p.txt", 'a\n--prompt "red" --seed 5\nx --ar 3:2\n', r"line 2 \(--prompt\) and others: options of another"),
        ("p.txt", "a\nb \u2014ar 3:2\n", r"line 2 \(\u2014ar\): options of another"),
        ("p.txt", '{"prompt": "a"}\n{"prompt": "b"}\n', r"line 1 and others: looks like JSON lines \(.jsonl\), but"),
        ("p.txt", '["a", "b"]\n', r"line 1: looks like a JSON list \(.json\), but a .txt file is read as one prompt"),
        ("p.txt", '[\n"a",\n"b"\n]\n', r"line 1: looks like JSON \(.json\)"),
        ("p.txt", "prompt,seed\na,1\n", r"line 1: looks like a table with a header \(.csv\)"),
        ("p.txt", '"a"\n"b, ""c"""\n', "line 1 and others: every line is in quotes"),
    ],
)
def test_what_looks_like_a_mistake_gives_one_warning(write, name, content, expected):
    with pytest.warns(UserWarning, match=expected) as caught:
        PromptDataset(write(name, content))
    assert len(caught) == 1


def test_ordinary_columns_and_dashes_give_no_warning(write):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PromptDataset(write("p.csv", "prompt,step,cfg,user_name,prompt_nsfw\na--b -- c - d,1,2,3,4\n"))
        lines = ['"to be"', "a, 'b'", "{a|b}", "[a:b:0.5]", "a \u2014no people\u2014 text, b", "text, logo, caption"]
        PromptDataset(write("p.txt", "\n".join(lines)))


def test_a_mistyped_list_is_shown_with_quotes():
    assert message("[red apple, 2024]").endswith('put quotes around every prompt of a list: ["red apple", "2024"]')


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize("suffix", ["txt", "csv", "json", "jsonl", "parquet"])
def test_a_fifo_named_like_a_prompt_file_is_refused_at_once(tmp_path, suffix):
    os.mkfifo(path := str(tmp_path / f"p.{suffix}"))
    assert message(path) == f"{path}: cannot be read: expected a regular file, found a FIFO"


def test_absurd_counts_are_refused_before_anything_is_made(tmp_path, capsys):
    for make in (
        lambda: GuidedDiffusion(Brightness(), images_per_prompt=10**9),
        lambda: check_images(10**6, 1000),
        lambda: SVDD(num_candidates=10**9),
        lambda: PromptDataModule(["a"], num_workers=10**6),
    ):
        with pytest.raises(UserError, match=r": 10+ is above the limit of 10*|: 1000000 is above the limit of 256"):
            make()
    words = ["predict", "--model.reward", "Brightness", "--data.prompts", "emoji", "--output", str(tmp_path / "run")]
    assert main([*words, "--model.images_per_prompt", "1000000000"]) == 2
    assert "images_per_prompt: 1000000000 is above the limit of 10000" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_full_or_missing_temporary_folder_is_one_line(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    assert "or copied to the temporary folder (TMPDIR): No such file" in message(["a"])


# The spool


def test_the_spool_is_unnamed_and_removed_on_close(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dataset = PromptDataset(["a"])
    assert dataset[0].text == "a"
    assert os.listdir(tmp_path) == []
    dataset.close()
    with pytest.raises(ValueError, match="closed"):
        dataset[0]


def test_a_failed_pass_leaves_no_descriptor_behind():
    gc.collect()  # objects left by other tests
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else pytest.skip("needs /proc")
    errors = []
    for _ in range(5):
        with pytest.raises(PromptError) as caught:
            PromptDataset(["a", "\0"])
        errors.append(caught.value)  # keeps the tracebacks, and so the frames, alive
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda dataset: pickle.loads(pickle.dumps(dataset))])
def test_a_copy_has_its_own_spool(clone):
    dataset = PromptDataset(["a", "ü"])
    cloned = clone(dataset)
    dataset.close()
    assert [prompt.text for prompt in cloned] == ["a", "ü"]
    assert [prompt.text for prompt in clone(cloned)] == ["a", "ü"]


def test_runs_of_one_process_read_a_file_once(tmp_path, monkeypatch):
    """A study does, unless the file changes; each run still skips for itself, and its end takes nothing from others."""
    read = []
    monkeypatch.setattr("svdd.runs.prompts.open_source", lambda *source: read.append(source[0]) or open_source(*source))
    path = tmp_path / "p.txt"
    path.write_text("a\nb\n")

    def run(**options):
        module = PromptDataModule(str(path), 1, **options)
        module.skip([0])
        seen = [prompt.text for batch in module.predict_dataloader() for prompt in batch]
        module.teardown()
        return seen

    with keeping_prompts():
        kept = PromptDataModule(str(path)).dataset
        assert [run(), run()] == [["b"], ["b"]]
        assert len(read) == 1
        assert run(limit=1) == []
        path.write_text("a\nb\nc\n")
        assert run() == ["b", "c"]
        assert len(read) == 3
        assert kept[1].text == "b"
    with pytest.raises(ValueError, match="closed"):
        kept[1]
    assert [run(), run()] == [["b", "c"]] * 2
    assert len(read) == 5


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_loading_with_forked_workers(workers):
    prompts = [f"prompt {i}" for i in range(103)]
    module = PromptDataModule(prompts, batch_size=4, num_workers=workers)
    module.skip(range(0, 50, 2))
    batches = list(module.predict_dataloader())
    assert [len(batch) for batch in batches] == [4] * 19 + [2]
    assert all(type(batch) is list and type(batch[0]) is Prompt for batch in batches)
    seen = [(prompt.index, prompt.text) for batch in batches for prompt in batch]
    assert seen == [(i, f"prompt {i}") for i in range(103) if i >= 50 or i % 2]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_loading_with_started_workers(method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    dataset = PromptDataset([f"prompt {i}" for i in range(9)])
    loader = DataLoader(dataset, 2, num_workers=1, collate_fn=list, multiprocessing_context=method)
    assert [prompt.index for batch in loader for prompt in batch] == list(range(9))


@pytest.mark.parametrize(
    "suffix", ["txt", pytest.param("csv", marks=pytest.mark.slow), pytest.param("jsonl", marks=pytest.mark.slow)]
)
def test_memory_does_not_grow_with_the_number_of_prompts(tmp_path, suffix):
    def read(count):
        path = tmp_path / f"{count}.{suffix}"
        text = "a photograph of a thing that has the number %d, on a table, in the evening light"
        with open(path, "w") as file:
            if suffix == "csv":
                file.write("prompt,tag\n")
            for i in range(count):
                line = text % i
                file.write(f'"{line}",t\n' if suffix == "csv" else f'"{line}"\n' if suffix == "jsonl" else f"{line}\n")
        module = PromptDataModule(str(path), batch_size=8)
        module.skip(range(0, count, 50))
        batches = iter(module.predict_dataloader())
        for _ in range(10):
            assert len(next(batches)) == 8
        assert len(module.dataset) == count

    read(100)  # fills imports and caches
    assert peak_bytes(lambda: read(20_000)) - peak_bytes(lambda: read(100)) < 600_000


# The data module


@pytest.mark.parametrize(
    ("name", "value", "minimum"),
    [("batch_size", 0, 1), ("batch_size", -4, 1), ("num_workers", -1, 0), ("limit", 0, 1), ("max_prompt_length", 0, 1)],
)
def test_numbers_out_of_range(name, value, minimum):
    with pytest.raises(ValueError, match=f"^{name} must be >= {minimum}, got {value}$"):
        PromptDataModule(["a"], **{name: value})


@pytest.mark.parametrize("column", ["seed", "negative_prompt", "Negative Prompt"])
def test_prompt_column_with_another_meaning(column):
    with pytest.raises(ValueError, match=f"prompt_column must name the column of the prompts, got '{column}'"):
        PromptDataModule(["a"], prompt_column=column)


def test_prompts_of_another_type(write):
    with pytest.raises(TypeError, match="prompts must be a list of strings or the path of a file, got 3"):
        PromptDataModule(3)
    assert len(PromptDataModule(Path(write("p.txt", "a"))).dataset) == 1


def test_arguments_reach_the_source(write):
    path = write("p.csv", "caption,x\nab,1\nc,2\nd,3\n")
    module = PromptDataModule(path, batch_size=1, prompt_column="caption", limit=2, max_prompt_length=2)
    assert len(module.dataset) == 2
    assert [batch[0].text for batch in module.predict_dataloader()] == ["ab", "c"]


def test_setup_reads_the_source_once(write):
    path = write("p.txt", "a\nb\n")
    module = PromptDataModule(path)
    module.setup("predict")
    os.remove(path)
    module.setup("predict")
    assert len(module.dataset) == 2
    module.teardown("predict")
    module.teardown("predict")
    with pytest.raises(PromptError, match="no such file"):
        module.setup("predict")


def test_skips_accumulate_and_teardown_resets_them():
    def left():
        return [prompt.index for batch in module.predict_dataloader() for prompt in batch]

    module = PromptDataModule(["a", "b", "c", "d"], batch_size=2)
    module.skip([])
    assert left() == [0, 1, 2, 3]
    module.skip({1})
    module.skip([1, 3, 99])
    assert left() == [0, 2]
    assert len(module.dataset) == 4
    module.skip(range(4))
    assert left() == []
    with pytest.raises(ValueError, match="indices of prompts must be >= 0, got -1"):
        module.skip([-1])
    module.teardown("predict")
    assert left() == [0, 1, 2, 3]


def trainer(**arguments):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return lightning.Trainer(accelerator="cpu", enable_model_summary=False, **quiet, **arguments)


class Echo(lightning.LightningModule):
    """Returns the prompts it is given."""

    def predict_step(self, batch, batch_idx):
        return [(prompt.index, prompt.text, prompt.extra) for prompt in batch]


class Record(lightning.Callback):
    """Records the prompts of a rank."""

    def __init__(self, folder):
        self.folder = folder

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        with open(self.folder / f"{trainer.global_rank}.txt", "a") as file:
            file.writelines(f"{prompt.index}\n" for prompt in batch)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_trainer_predict(write):
    path = write("p.jsonl", "\n".join(json.dumps({"prompt": f"p{i}", "x": {"y": [i]}}) for i in range(5)))
    module = PromptDataModule(path, batch_size=2)
    expected = [(i, f"p{i}", {"x": {"y": [i]}}) for i in range(5)]
    assert trainer().predict(Echo(), module) == [expected[:2], expected[2:4], expected[4:]]
    module.skip([0, 3])
    assert trainer().predict(Echo(), module) == [[expected[1], expected[2]], [expected[4]]]
    module.skip(range(5))
    assert not trainer().predict(Echo(), module)


def test_shares_differ_by_one_prompt_at_most_and_may_be_empty():
    module = PromptDataModule(["a", "b", "c", "d", "e"], batch_size=2)
    module.skip([1])

    def share(rank, world_size):
        module.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
        return [[prompt.text for prompt in batch] for batch in module.predict_dataloader()]

    assert share(0, 1) == [["a", "c"], ["d", "e"]]
    assert [share(rank, 3) for rank in range(3)] == [[["a", "e"]], [["c"]], [["d"]]]
    assert [share(rank, 6) for rank in range(6)] == [[["a"]], [["c"]], [["d"]], [["e"]], [], []]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_two_processes_share_the_prompts(tmp_path):
    module = PromptDataModule([f"p{i}" for i in range(7)], batch_size=2)
    module.skip([0])  # set up before the processes are spawned: the spool travels with the module
    run = trainer(devices=2, strategy="ddp_spawn", callbacks=[Record(tmp_path)])
    run.predict(Echo(), module, return_predictions=False)
    assert (tmp_path / "0.txt").read_text().split() == ["1", "3", "5"]
    assert (tmp_path / "1.txt").read_text().split() == ["2", "4", "6"]


# Real files


def real_file(name):
    path = REAL_FILES / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return str(path)


def test_hps_prompts():
    path = real_file("hps_v2_all.txt")
    with pytest.warns(UserWarning, match="skipped 2 blank prompts, the first at line 206"):
        dataset = PromptDataset(path)
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    assert len(dataset) == 750
    assert [prompt.text for prompt in dataset] == [line.strip() for line in lines if line]


def test_geneval_prompts():
    dataset = PromptDataset(real_file("geneval_metadata.jsonl"))
    assert len(dataset) == 553
    assert dataset[0].text == "a photo of a bench"
    assert dataset[0].extra == {"tag": "single_object", "include": [{"class": "bench", "count": 1}]}
    assert sum("exclude" in prompt.extra for prompt in dataset) == 80
