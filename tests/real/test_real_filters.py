"""Filters on the real SFT files beside this checkout, against what plain Python finds."""

import json
from collections import Counter
from pathlib import Path

import pytest

from lightning_sft.data.conversion import convert_rows
from lightning_sft.data.filtering import Filters, Judge, numbered
from lightning_sft.data.sources import Source, read_rows
from lightning_sft_filters.duplicates import Duplicates
from lightning_sft_filters.length import Length
from lightning_sft_filters.near_duplicates import NearDuplicates
from lightning_sft_filters.overlap import Overlap
from lightning_sft_filters.refusals import Refusals
from lightning_sft_filters.repetition import Repetition
from lightning_sft_formats.alpaca import Alpaca
from lightning_sft_formats.sharegpt import ShareGPT

FOLDER = Path(__file__).parents[2].parent / "shared" / "real" / "sft"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the real SFT files are not beside this checkout")


def dropped(name: str, format, *filters) -> list:
    """What the filters drop of a file."""
    judge = Judge(Filters(filters))
    items = numbered(convert_rows(read_rows(Source(str(FOLDER / name))), format, ""))
    return [each for number, item in items if (each := judge(item, number))]


def test_lengths_and_duplicates_are_what_plain_python_finds():
    rows = json.loads((FOLDER / "alpaca_en_demo.json").read_text())
    found = dropped("alpaca_en_demo.json", Alpaca(), Length(least=4, most=200), Duplicates("response"))
    seen, expected = set(), []
    for number, row in enumerate(rows, 1):
        words = row["output"].split()
        if not 4 <= len(words) <= 200:
            expected.append((number, "Length"))
        elif (key := " ".join(words).casefold()) in seen:
            expected.append((number, "Duplicates"))
        else:
            seen.add(key)
    assert [(each.meta.row, each.filter) for each in found] == expected
    assert Counter(each.filter for each in found)["Length"] > 50


def test_near_duplicates_are_those_of_all_pairs():
    rows = json.loads((FOLDER / "identity.json").read_text())
    found = dropped("identity.json", Alpaca(), NearDuplicates(0.5, "response", 2))

    def shingles(text):
        words = text.casefold().split()
        return {tuple(words[at : at + 2]) for at in range(max(1, len(words) - 1))}

    left, expected = [], []
    for number, row in enumerate(rows, 1):
        mine = shingles(row["output"])
        if any(len(mine & other) / len(mine | other) >= 0.5 for other in left):
            expected.append(number)
        else:
            left.append(mine)
    assert len(expected) > 10
    assert [each.meta.row for each in found] == expected


def test_answers_of_a_model_that_says_so_are_found():
    found = dropped("alpaca_en_demo.json", Alpaca(), Refusals())
    rows = json.loads((FOLDER / "alpaca_en_demo.json").read_text())
    assert all(each.verdict.detail in rows[each.meta.row - 1]["output"].casefold() for each in found)
    assert len(found) == 28


def test_some_real_answers_repeat_themselves():
    assert len(dropped("alpaca_en_demo.json", Alpaca(), Repetition())) == 35
    assert len(dropped("glaive_toolcall_en_demo.json", ShareGPT(), Repetition())) == 48


def test_a_benchmark_that_was_mixed_in_is_found(tmp_path):
    rows = json.loads((FOLDER / "alpaca_en_demo.json").read_text())
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"text": rows[123]["output"]}) + "\n")
    found = dropped("alpaca_en_demo.json", Alpaca(), Overlap([str(tmp_path / "held_out.jsonl")]))
    assert [each.meta.row for each in found] == [124]
