import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from lightning_sft import Meta, SFTError
from lightning_sft.data.sources import Source, read_hub, read_rows
from lightning_sft_formats.alpaca import Alpaca

ROWS = [{"q": "one", "n": 1}, {"q": "zwei – ü", "n": None}]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(path, **options):
    return list(read_rows(Source(str(path), **options)))


def values(path, **options):
    return [row for _, row in read(path, **options)]


def refusal(path, **options):
    with pytest.raises(SFTError) as error:
        read(path, **options)
    return error.value


class TestFiles:
    @pytest.mark.parametrize("indent", [None, 2])
    def test_json_is_a_list_of_rows_counted_from_one(self, tmp_path, indent):
        path = write(tmp_path / "a.json", json.dumps(ROWS, indent=indent))
        assert read(path) == [(Meta(path, 1), ROWS[0]), (Meta(path, 2), ROWS[1])]

    def test_jsonl_rows_are_numbered_by_their_lines(self, tmp_path):
        path = write(tmp_path / "a.jsonl", "\n" + jsonl(ROWS).replace("\n", "\r\n\n"))
        assert read(path) == [(Meta(path, 2), ROWS[0]), (Meta(path, 4), ROWS[1])]

    def test_a_json_file_that_is_really_json_lines_is_read_as_such(self, tmp_path):
        path = write(tmp_path / "a.json", jsonl(ROWS))
        assert read(path) == [(Meta(path, 1), ROWS[0]), (Meta(path, 2), ROWS[1])]

    def test_rows_keep_their_own_keys_and_key_order(self, tmp_path):
        rows = [{"call": {"z": 1, "a": [1, "x", None]}}, {"other": 1}]
        read_back = values(write(tmp_path / "a.jsonl", jsonl(rows)))
        assert read_back == rows
        assert list(read_back[0]["call"]) == ["z", "a"]

    def test_a_line_separator_within_text_does_not_end_a_row(self, tmp_path):
        rows = [{"text": "a\u2028b\u0085c"}]
        assert values(write(tmp_path / "a.jsonl", jsonl(rows))) == rows

    @pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.txt"])
    def test_a_byte_order_mark_is_not_part_of_the_data(self, tmp_path, name):
        texts = {"a.json": '[{"text": "x"}]', "a.jsonl": '{"text": "x"}', "a.csv": "text\nx", "a.txt": "x"}
        assert values(write(tmp_path / name, b"\xef\xbb\xbf" + texts[name].encode())) == [{"text": "x"}]

    @pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t")])
    def test_tables_have_quoted_fields_with_delimiters_and_line_breaks(self, tmp_path, name, delimiter):
        text = f'q{delimiter}a\n"one{delimiter}\n ""two"""{delimiter}x\n\nthree{delimiter}\n'
        path = write(tmp_path / name, text)
        assert read(path) == [
            (Meta(path, 1), {"q": f'one{delimiter}\n "two"', "a": "x"}),
            (Meta(path, 2), {"q": "three", "a": ""}),
        ]

    def test_a_long_csv_field_is_read(self, tmp_path):
        assert values(write(tmp_path / "a.csv", "q\n" + "x" * 200_000)) == [{"q": "x" * 200_000}]

    def test_parquet(self, tmp_path):
        import pyarrow
        import pyarrow.parquet

        path = str(tmp_path / "a.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        assert read(path) == [(Meta(path, 1), ROWS[0]), (Meta(path, 2), ROWS[1])]

    def test_text_is_one_row_per_line_that_is_not_blank(self, tmp_path):
        path = write(tmp_path / "a.txt", " one \r\n\n  \ntwo")
        assert read(path) == [(Meta(path, 1), {"text": " one "}), (Meta(path, 4), {"text": "two"})]

    @pytest.mark.parametrize(("name", "text"), [("a.jsonl.gz", jsonl(ROWS)), ("a.json.gz", json.dumps(ROWS))])
    def test_gzipped_files(self, tmp_path, name, text):
        assert values(write(tmp_path / name, gzip.compress(text.encode()))) == ROWS

    def test_jsonl_is_streamed(self, tmp_path):
        rows = read_rows(Source(write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": 2}\nnot JSON')))
        assert [next(rows)[1], next(rows)[1]] == [{"a": 1}, {"a": 2}]
        with pytest.raises(SFTError):
            next(rows)

    def test_the_limit_ends_the_reading(self, tmp_path):
        path = write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": 2}\nnot JSON')
        assert values(path, limit=2) == [{"a": 1}, {"a": 2}]
        assert len(values(write(tmp_path / "b.json", json.dumps(ROWS)), limit=5)) == 2
        assert "limit is 0" in str(refusal(path, limit=0))


class TestFolders:
    def test_a_folder_is_its_data_files_in_order(self, tmp_path):
        folder = tmp_path / "data"
        second = write(folder / "b" / "x.jsonl", '{"n": 2}\n{"n": 3}')
        first = write(folder / "a.json", '[{"n": 1}]')
        for name in (".hidden.json", ".cache/x.json", "README.md"):
            write(folder / name, "not data")
        assert [(m.source, m.row, r["n"]) for m, r in read(folder)] == [
            (first, 1, 1),
            (second, 1, 2),
            (second, 2, 3),
        ]
        assert len(read(folder, limit=2)) == 2

    def test_a_hidden_folder_that_is_asked_for_is_read(self, tmp_path):
        write(tmp_path / ".data" / "a.json", '[{"n": 1}]')
        assert values(tmp_path / ".data") == [{"n": 1}]

    def test_a_folder_without_data_is_refused(self, tmp_path):
        write(tmp_path / "README.md", "x")
        assert "no data file" in refusal(tmp_path).what


class TestRefusals:
    def test_malformed_jsonl_is_placed_by_file_line_and_column(self, tmp_path):
        path = write(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a" 2}\n')
        error = refusal(path)
        assert error.where == f"{path}, row 3"
        assert "column 6" in error.what

    def test_malformed_json_is_placed_by_file_line_and_column(self, tmp_path):
        path = write(tmp_path / "a.json", '[\n{"a": 1},\n{"a" 2}\n]')
        error = refusal(path)
        assert error.where == path
        assert "line 3, column 6" in error.what

    def test_json_nested_too_deeply_is_an_error_and_not_a_crash(self, tmp_path):
        assert "can't be read" in refusal(write(tmp_path / "a.jsonl", "[" * 200_000)).what

    @pytest.mark.parametrize(("name", "text"), [("a.jsonl", '{"a": 1}\n[1]'), ("a.json", '[{"a": 1}, [1]]')])
    def test_a_row_that_is_not_an_object_is_named(self, tmp_path, name, text):
        path = write(tmp_path / name, text)
        error = refusal(path)
        assert error.where == f"{path}, row 2"
        assert "list" in error.what

    def test_a_json_object_instead_of_a_list_is_refused_with_its_keys(self, tmp_path):
        error = refusal(write(tmp_path / "a.json", json.dumps({"version": 1, "data": ROWS}, indent=1)))
        assert "'version', 'data'" in error.what

    @pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.txt"])
    def test_bytes_that_are_not_utf8_are_placed(self, tmp_path, name):
        path = write(tmp_path / name, b"{}\n" + "ü".encode("latin-1"))
        error = refusal(path)
        assert (error.where, "line 2 is not UTF-8" in error.what) == (path, True)

    @pytest.mark.parametrize(
        ("name", "text"), [("a.jsonl", '{"a": "ok"}\n%s'), ("a.json", '[{"a": "ok"},%s]')]
    )
    def test_half_an_emoji_is_refused_and_a_whole_one_is_not(self, tmp_path, name, text):
        whole = write(tmp_path / name, text % '{"a": "\\ud83d\\ude00"}')
        assert values(whole)[1] == {"a": "😀"}
        half = write(tmp_path / name, text % '{"a": "\\ud83d"}')
        error = refusal(half)
        assert (error.where, r"'\ud83d'" in error.what) == (f"{half}, row 2", True)

    @pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.txt"])
    @pytest.mark.parametrize("text", ["", "\n \n"])
    def test_a_file_without_rows_is_refused(self, tmp_path, name, text):
        path = write(tmp_path / name, text)
        error = refusal(path)
        assert (error.where, "no rows" in error.what) == (path, True)

    def test_a_list_or_a_table_without_rows_is_refused(self, tmp_path):
        assert "no rows" in refusal(write(tmp_path / "a.json", "[]")).what
        assert "no rows" in refusal(write(tmp_path / "a.csv", "a,b\n")).what

    @pytest.mark.parametrize("record", ["1", "1,2,3"])
    def test_a_table_row_of_another_length_is_refused(self, tmp_path, record):
        path = write(tmp_path / "a.csv", f"a,b\n1,2\n{record}\n")
        error = refusal(path)
        assert (error.where, "the header 2" in error.what) == (f"{path}, row 2", True)

    def test_an_open_quote_does_not_swallow_the_rest_of_a_table(self, tmp_path):
        assert "malformed" in refusal(write(tmp_path / "a.csv", 'a,b\n1,"2\n3,4\n')).what

    def test_a_column_name_that_occurs_twice_is_refused(self, tmp_path):
        assert "'a' more than once" in refusal(write(tmp_path / "a.csv", "a,b,a\n1,2,3\n")).what

    @pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz"])
    def test_a_broken_file_is_refused(self, tmp_path, name):
        path = write(tmp_path / name, "this is something else")
        error = refusal(path)
        assert (error.where, "can't be read" in error.what) == (path, True)

    def test_a_file_of_another_type_is_refused_with_the_types_that_are_read(self, tmp_path):
        error = refusal(write(tmp_path / "a.xml", "<a/>"))
        assert "'.xml'" in error.what
        assert ".jsonl" in error.fix

    def test_a_missing_file_is_refused_with_the_nearest_name(self, tmp_path):
        write(tmp_path / "alpaca.json", "[]")
        error = refusal(tmp_path / "alpca.json")
        assert error.what == "no such file"
        assert "alpaca.json" in error.fix

    def test_a_missing_folder_is_said_to_be_missing(self, tmp_path):
        assert "no folder" in refusal(tmp_path / "nowhere" / "a.json").fix

    def test_an_empty_path_does_not_mean_the_current_folder(self):
        assert "path is empty" in refusal("").what


class TestHub:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    @pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
    def test_a_dataset_folder_is_read_through_datasets(self, tmp_path, suffix):
        import pyarrow
        import pyarrow.parquet

        folder = tmp_path / "set"
        for split, rows in (("train", ROWS), ("test", ROWS[:1])):
            path = write(folder / f"{split}.{suffix}", jsonl(rows))
            if suffix == "parquet":
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        source = Source(str(folder))
        assert list(read_hub(source)) == [(Meta(str(folder), 1), ROWS[0]), (Meta(str(folder), 2), ROWS[1])]
        assert [row for _, row in read_hub(replace(source, split="test"))] == ROWS[:1]
        assert [row for _, row in read_rows(replace(source, split="test"))] == ROWS[:1]
        with pytest.raises(SFTError, match="can't be loaded") as error:
            list(read_hub(replace(source, split="validation")))
        assert error.value.where == str(folder)

    def test_offline_an_id_is_one_error_that_says_what_to_do(self, tmp_path):
        code = (
            "from lightning_sft import SFTError\n"
            "from lightning_sft.data.sources import Source, read_rows\n"
            "try: next(read_rows(Source('some-org/some-dataset')))\n"
            "except SFTError as error: print(error)\n"
        )
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert run.stdout.startswith("some-org/some-dataset: the dataset can't be loaded"), run.stderr
        assert "HF_TOKEN" in run.stdout
        assert "local file or folder" in run.stdout

    def test_a_local_folder_goes_before_a_hub_id(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        write(Path("org/name/a.json"), json.dumps(ROWS))
        assert values("org/name") == ROWS


def test_sources_are_parsed_from_yaml_with_a_formats_short_name():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--train", type=list[Source])
    text = """[{path: a.json, format: Alpaca, limit: 3}, {path: b.json},
        {path: c.json, format: {class_path: Alpaca, init_args: {output: answer}}}]"""
    first, second, third = parser.instantiate(parser.parse_args([f"--train={text}"])).train
    assert isinstance(first.format, Alpaca)
    assert (first.path, first.limit) == ("a.json", 3)
    assert second == Source("b.json", "auto")
    assert third.format.output == "answer"


def test_importing_sources_imports_nothing_heavy():
    code = (
        "import sys, lightning_sft.data.sources\n"
        "print({'torch', 'datasets', 'pyarrow', 'transformers', 'lightning'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
