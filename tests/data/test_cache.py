"""Prepared data is kept from run to run: what is found is what would be made, and any change makes it anew."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stranger import install

import lightning_sft
from lightning_sft import Conversation, DataFormat, Message, Renderer, SFTError
from lightning_sft.data import cache, prepare
from lightning_sft.data.ledger import SourceLedger
from lightning_sft.data.prepare import Prepared
from lightning_sft.data.sources import Source
from lightning_sft_formats.alpaca import Alpaca
from lightning_sft_formats.columns import Columns
from lightning_sft_formats.messages import Messages


def chat(asked: str, *answers: str) -> dict[str, object]:
    pairs = [("user", asked), ("assistant", None)] * len(answers)
    texts = iter(answers)
    return {"messages": [{"role": role, "content": text or next(texts)} for role, text in pairs]}


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps(chat(f"question {n}", "answer " * (1 + n % 4))) + "\n" for n in range(9))
    )
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache"


def made(sources, renderer, folder: Path | None, *, max_length=None, overlong="drop", workers=0) -> Prepared:
    return prepare.prepare(
        sources, renderer, max_length=max_length, overlong=overlong, cache_folder=folder, workers=workers
    )


def contents(prepared: Prepared) -> list[object]:
    """All that is known of the examples, in types that compare."""
    return [
        [
            each.input_ids.tolist(),
            each.weights.tolist(),
            each.reasons.tolist(),
            each.meta,
            each.turn,
            each.notes,
        ]
        for each in prepared.examples
    ]


def accounts(prepared: Prepared) -> list[dict[str, object]]:
    return [ledger.as_json() for ledger in prepared.ledgers]


def entries(folder: Path) -> list[Path]:
    return [path for path in (folder / "prepared").iterdir() if path.name != "locks"]


questions = st.text("ab é", min_size=1, max_size=5).filter(str.strip)
talks = st.lists(
    st.tuples(questions, st.lists(st.integers(1, 9), min_size=1, max_size=3)), min_size=1, max_size=4
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    talks=talks,
    max_length=st.one_of(st.none(), st.integers(20, 90)),
    overlong=st.sampled_from(["drop", "truncate_right"]),
    split=st.booleans(),
    weight=st.sampled_from([1.0, 0.5]),
)
def test_what_is_found_is_what_was_made(
    talks, max_length, overlong, split, weight, tokenizer, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("found")
    path = folder / "rows.jsonl"
    path.write_text(
        "".join(json.dumps(chat(asked, *("b" * n for n in long))) + "\n" for asked, long in talks)
    )
    sources = [Source(str(path), weight=weight), Source(str(path), limit=1)]
    renderer = Renderer(tokenizer, split_turns=split, prompt_weight=0.3)
    options = {"max_length": max_length, "overlong": overlong}
    without = made(sources, renderer, None, **options)
    first, second = (made(sources, renderer, folder / "cache", **options) for _ in range(2))
    assert [each.from_cache for each in (without, first, second)] == [False, False, True]
    assert contents(without) == contents(first) == contents(second)
    assert accounts(without) == accounts(first) == accounts(second)
    assert without.digest == first.digest == second.digest
    for name in ("lengths", "weight_sums", "sources", "keys"):
        assert getattr(without, name).tolist() == getattr(second, name).tolist()


def test_the_arrays_agree_with_the_examples_one_by_one(data, tokenizer):
    prepared = made(
        [Source(str(data)), Source(str(data), limit=3)], Renderer(tokenizer, prompt_weight=0.3), None
    )
    examples = list(prepared.examples)
    assert prepared.lengths.tolist() == [len(each) for each in examples]
    assert prepared.weight_sums == pytest.approx([each.weights.sum(dtype=np.float64) for each in examples])
    assert prepared.trained_tokens == sum(int((each.weights > 0).sum()) for each in examples)
    assert prepared.sources.tolist() == [0] * 9 + [1] * 3
    assert prepared.keys.tolist()[:3] == prepared.keys.tolist()[9:]
    assert len(set(prepared.keys.tolist())) == 9
    part = prepared.part([11, 4, 0])
    assert contents(part) == [contents(prepared)[row] for row in (11, 4, 0)]
    assert part.part([2, 1]).lengths.tolist() == [len(examples[0]), len(examples[4])]
    assert (
        part.digest
        == made([Source(str(data))], Renderer(tokenizer, prompt_weight=0.3), None).part([2, 4, 0]).digest
    )
    assert part.digest != prepared.part([0, 4, 11]).digest


def test_another_process_gets_the_place_of_the_files_and_no_copy(data, tokenizer):
    whole = made([Source(str(data))], Renderer(tokenizer), None)
    for prepared in (whole, whole.part([7, 2])):
        pickled = pickle.dumps(prepared.examples)
        assert len(pickled) < 1000
        there = Prepared(pickle.loads(pickled), [])
        assert contents(there) == contents(prepared)
        assert there.digest == prepared.digest


def test_a_second_start_reads_no_row_and_renders_none(data, folder, tokenizer, monkeypatch):
    before = made([Source(str(data))], Renderer(tokenizer), folder)

    def fail(*args: object, **options: object) -> None:
        raise AssertionError("a row was read or rendered")

    monkeypatch.setattr(Renderer, "render_each", fail)
    monkeypatch.setattr(prepare, "read_rows", fail)
    after = made([Source(str(data))], Renderer(tokenizer), folder)
    assert (before.from_cache, after.from_cache) == (False, True)
    assert contents(after) == contents(before)


def changed_byte_with_the_old_time(data: Path) -> None:
    times = data.stat()
    data.write_bytes(data.read_bytes().replace(b"question 3", b"question 4", 1))
    os.utime(data, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert data.stat().st_size == times.st_size


def test_a_changed_byte_of_the_data_counts_even_with_its_old_time(data, folder, tokenizer):
    before = made([Source(str(data))], Renderer(tokenizer), folder)
    changed_byte_with_the_old_time(data)
    after = made([Source(str(data))], Renderer(tokenizer), folder)
    assert not after.from_cache
    assert (
        contents(after) == contents(made([Source(str(data))], Renderer(tokenizer), None)) != contents(before)
    )


def with_token(tokenizer):
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens(["<|more|>"])
    return changed


def with_template(tokenizer):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = changed.chat_template.replace("message.role", "message['role']")
    return changed


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": with_token},
        {"tokenizer": with_template},
        {"policies": {"prompt_weight": 0.5}},
        {"policies": {"train_on_eot": "last"}},
        {"options": {"max_length": 200}},
        {"options": {"overlong": "truncate_right"}},
        {"source": {"limit": 8}},
        {"source": {"format": Messages()}},
    ],
    ids=["token", "template", "prompt_weight", "train_on_eot", "max_length", "overlong", "limit", "format"],
)
def test_a_change_of_tokenizer_template_or_option_makes_it_anew(change, data, folder, tokenizer):
    def again(*, tokenizer=tokenizer, policies=None, options=None, source=None) -> Prepared:
        renderer = Renderer(tokenizer, **(policies or {}))
        return made([Source(str(data), **(source or {}))], renderer, folder, **(options or {}))

    assert not again().from_cache
    assert again().from_cache
    changed = {key: value(tokenizer) if callable(value) else value for key, value in change.items()}
    assert not again(**changed).from_cache
    assert again(**changed).from_cache
    assert again().from_cache


def test_the_renderer_has_no_option_that_the_key_leaves_out():
    """Whoever adds one adds it to `renderer_facts`."""
    import inspect

    assert list(inspect.signature(Renderer.__init__).parameters) == [
        "self", "tokenizer", "chat_template", "chat_template_kwargs", "policies",
    ]  # fmt: skip


def test_how_often_a_source_is_seen_changes_nothing_of_what_is_kept(data, folder, tokenizer):
    made([Source(str(data), weight=2.0)], Renderer(tokenizer), folder)
    after = made([Source(str(data), weight=0.5)], Renderer(tokenizer), folder)
    assert after.from_cache
    assert [ledger.weight for ledger in after.ledgers] == [0.5]


def test_using_the_tokenizer_in_between_changes_nothing(data, folder, tokenizer):
    own = copy.deepcopy(tokenizer)
    made([Source(str(data))], Renderer(own), folder)
    own(["a", "a b c d"], padding=True, truncation=True, max_length=3)
    assert made([Source(str(data))], Renderer(own), folder).from_cache


def test_a_template_that_writes_the_date_counts_the_day(data, folder, tokenizer, monkeypatch):
    own = copy.deepcopy(tokenizer)
    own.chat_template = "{{ strftime_now('%Y') }}" + own.chat_template
    days = iter([date(2026, 1, 1), date(2026, 1, 1), date(2026, 1, 2)])
    monkeypatch.setattr(cache, "date", SimpleNamespace(today=lambda: next(days)))
    found = [made([Source(str(data))], Renderer(own), folder).from_cache for _ in range(3)]
    assert found == [False, True, False]


PLUGIN = """
from lightning_sft import Conversation, DataFormat, Message

class Shouting(DataFormat):
    def __init__(self, sign="!"):
        self.sign = sign

    def matches(self, columns):
        return "shout" in columns

    def convert(self, row):
        return [Conversation((Message("user", row["shout"]), Message("assistant", row["shout"] + self.sign)))]
"""


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("change", ["version", "code"])
def test_another_version_of_a_plugin_or_other_code_makes_it_anew(
    named, change, tmp_path, folder, tokenizer, monkeypatch
):
    def installed(version: str, source: str) -> None:
        shutil.rmtree(tmp_path / "site", ignore_errors=True)
        entry = {"lightning_sft.formats": {"Shouting": "shouting_mod:Shouting"}}
        install(tmp_path / "site", "stranger-formats", entry, {"shouting_mod": source}, version)
        monkeypatch.delitem(sys.modules, "shouting_mod", raising=False)

    def again() -> Prepared:
        format = __import__("shouting_mod").Shouting() if named else "auto"
        return made([Source(str(path), format)], Renderer(tokenizer), folder)

    path = tmp_path / "rows.jsonl"
    path.write_text('{"shout": "hello"}\n')
    installed("1.0", PLUGIN)
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert [again().from_cache, again().from_cache] == [False, True]
    installed(*(("1.1", PLUGIN) if change == "version" else ("1.0", PLUGIN + "# another line\n")))
    assert [again().from_cache, again().from_cache] == [False, True]


def test_another_version_of_the_package_makes_it_anew(data, folder, tokenizer, monkeypatch):
    made([Source(str(data))], Renderer(tokenizer), folder)
    real = cache._code
    monkeypatch.setattr(cache, "_code", lambda name: "another" if name == "lightning_sft" else real(name))
    assert not made([Source(str(data))], Renderer(tokenizer), folder).from_cache


@pytest.mark.parametrize("template", ["{{ a }}", "{{ b }}"])
def test_options_of_a_format_are_told_apart(template, tmp_path, folder, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "hello", "b": "how are you"}\n')
    made([Source(str(path), Columns("{{ a }} {{ b }}"))], Renderer(tokenizer), folder)
    other = Columns(template)
    assert not made([Source(str(path), other)], Renderer(tokenizer), folder).from_cache
    assert made([Source(str(path), Columns(template))], Renderer(tokenizer), folder).from_cache


class Opaque(DataFormat):
    """Keeps something that can't be compared."""

    def __init__(self) -> None:
        self.change = lambda text: text.upper()

    def matches(self, columns):
        return False

    def convert(self, row):
        return [Conversation((Message("user", "a"), Message("assistant", self.change("b"))))]


def test_a_format_that_cannot_be_compared_is_not_kept_and_says_so(data, folder, tokenizer):
    for _ in range(2):
        with pytest.warns(UserWarning, match="isn't kept for the next run.*Opaque holds a function"):
            assert not made([Source(str(data), Opaque())], Renderer(tokenizer), folder).from_cache


def test_a_broken_plugin_that_nobody_named_costs_nobody_the_cache(
    tmp_path, folder, data, tokenizer, monkeypatch
):
    install(tmp_path / "site", "broken", {"lightning_sft.formats": {"Gone": "gone_mod:Gone"}}, {})
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.warns(UserWarning, match="leaves out the format Gone"):
        made([Source(str(data))], Renderer(tokenizer), folder)
    assert made([Source(str(data))], Renderer(tokenizer), folder).from_cache


# --------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("name", ["input_ids", "weights", "reasons", "records", "contents"])
@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_damage_is_told_and_mended(name, damage, data, folder, tokenizer):
    before = contents(made([Source(str(data))], Renderer(tokenizer), folder))
    (entry,) = entries(folder)
    file = entry / name
    whole = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        middle = len(whole) // 2
        file.write_bytes(
            whole[:middle] + (b"" if damage == "cut" else bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        )
    with pytest.warns(UserWarning, match=f"damaged.*{name}.*prepared anew"):
        after = made([Source(str(data))], Renderer(tokenizer), folder)
    assert not after.from_cache
    assert contents(after) == before
    assert made([Source(str(data))], Renderer(tokenizer), folder).from_cache


def test_a_failure_leaves_nothing_behind(data, folder, tokenizer):
    with data.open("a") as file:
        file.write('{"messages": 1}\n')
    with pytest.raises(SFTError, match="row 10"):
        made([Source(str(data))], Renderer(tokenizer), folder)
    assert entries(folder) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from lightning_sft.data import cache

def fill(folder):
    (folder / "input_ids").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

cache.Cache(Path(sys.argv[1])).get(sys.argv[2], fill)
"""


def test_a_killed_writer_leaves_no_entry_and_the_next_one_tidies_up(data, folder, tokenizer):
    renderer, sources = Renderer(tokenizer), [Source(str(data))]
    options = {"max_length": None, "overlong": "drop", "filters": []}
    key = cache.digest(cache.facts(sources, renderer, options))
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), key], check=False)
    assert done.returncode == -9
    assert [path.name.startswith(f"{key}.partial-") for path in entries(folder)] == [True]
    assert not made(sources, renderer, folder).from_cache
    assert [path.name for path in entries(folder)] == [key]


def test_data_that_changes_while_it_is_read_is_refused(data, folder, tokenizer, monkeypatch):
    real = prepare.read_rows

    def meddled(source):
        rows = list(real(source))
        changed_byte_with_the_old_time(data)
        return iter(rows)

    monkeypatch.setattr(prepare, "read_rows", meddled)
    with pytest.raises(SFTError, match="changed while it was read"):
        made([Source(str(data))], Renderer(tokenizer), folder)
    assert entries(folder) == []


def test_of_processes_that_want_the_same_one_prepares_it(data, folder, tokenizer):
    """As the ranks of DDP do: the first one prepares, the others wait and read."""
    pids = []
    for _ in range(3):
        if not (pid := os.fork()):
            status = 1
            try:
                status = 10 + made([Source(str(data))], Renderer(tokenizer), folder).from_cache
            finally:
                os._exit(status)
        pids.append(pid)
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)
    assert codes == [10, 11, 11]


def test_a_folder_that_cannot_be_written_costs_the_cache_not_the_run(data, tmp_path, tokenizer):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="isn't kept for the next run"):
        assert len(made([Source(str(data))], Renderer(tokenizer), tmp_path / "file").examples) == 9


def test_the_longest_unused_go_when_there_is_too_much(data, folder, tokenizer, monkeypatch):
    def again(limit: int) -> bool:
        return made([Source(str(data))], Renderer(tokenizer), folder, max_length=100 + limit).from_cache

    for age, limit in ((300, 1), (200, 2), (100, 3)):
        again(limit)
        newest = max(entries(folder), key=lambda path: path.stat().st_mtime)
        os.utime(newest, (newest.stat().st_mtime - age,) * 2)
    assert again(1)  # used again, so it isn't the oldest any more
    size = sum(file.stat().st_size for entry in entries(folder) for file in entry.iterdir())
    monkeypatch.setattr(cache, "MOST_BYTES", size)
    again(4)
    monkeypatch.setattr(cache, "MOST_BYTES", 2**40)
    assert [again(limit) for limit in (1, 3, 4)] == [True, True, True]
    assert not again(2)


def test_without_a_cache_nothing_is_left(data, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    prepared = made([Source(str(data))], Renderer(tokenizer), None)
    part = prepared.part([1])
    assert len(list((tmp_path / "tmp").iterdir())) == 1
    del prepared
    assert part.examples[0].meta.row == 2
    assert len(list((tmp_path / "tmp").iterdir())) == 1
    del part
    assert list((tmp_path / "tmp").iterdir()) == []


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("LIGHTNING_SFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / "lightning-sft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.default_folder() == Path.home() / ".cache" / "lightning-sft"
    monkeypatch.setenv("LIGHTNING_SFT_CACHE", "~/own")
    assert cache.default_folder() == Path.home() / "own"


def test_a_dataset_folder_is_kept_by_its_bytes(tmp_path, folder, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    (tmp_path / "set").mkdir()
    file = tmp_path / "set" / "train.jsonl"
    file.write_text('{"instruction": "a", "input": "", "output": "b"}\n')

    def again() -> Prepared:
        return made([Source(str(tmp_path / "set"), Alpaca(), split="train")], Renderer(tokenizer), folder)

    assert [again().from_cache, again().from_cache] == [False, True]
    file.write_text('{"instruction": "a", "input": "", "output": "c"}\n')
    after = again()
    assert not after.from_cache
    assert tokenizer.decode(after.examples[0].input_ids).count("c")


def test_the_code_of_the_package_is_all_of_its_source(tmp_path, monkeypatch):
    (tmp_path / "some_package" / "inner").mkdir(parents=True)
    for name in ("__init__.py", "inner/__init__.py", "inner/deep.py"):
        (tmp_path / "some_package" / name).write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    before = cache._code("some_package")
    assert cache._code("some_package") == before
    (tmp_path / "some_package" / "inner" / "deep.py").write_text("x = 1\n")
    assert cache._code("some_package") != before
    assert cache._code(lightning_sft.__name__)


def test_accounts_survive_json(data, tokenizer):
    from lightning_sft.data import accounts as sums

    (ledger,) = made(
        [Source(str(data))], Renderer(tokenizer), None, max_length=25, overlong="truncate_right"
    ).ledgers
    assert ledger.truncated
    assert sums.from_json(SourceLedger, json.loads(json.dumps(asdict(ledger)))) == ledger
