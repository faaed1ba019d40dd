"""Preparing on several processes gives what one process gives: results, order, accounts and errors."""

from __future__ import annotations

import json
import os
import signal
import time
from itertools import count

import pytest
from test_cache import accounts, chat, contents

from lightning_sft import DataFormat, Renderer, SFTError
from lightning_sft.data import prepare
from lightning_sft.data.sources import Source
from lightning_sft.data.workers import in_order
from lightning_sft_formats.messages import Messages


@pytest.fixture
def small_chunks(monkeypatch):
    """Processes start after one chunk of four rows."""
    monkeypatch.setattr(prepare, "_CHUNK", 4)
    monkeypatch.setattr(prepare, "_ALONE", 1)


def by_process(number: int) -> tuple[int, int]:
    time.sleep(0.02 if number == 3 else 0)  # others overtake it
    return number, os.getpid()


def test_results_come_in_order_and_from_other_processes():
    results = list(in_order(by_process, range(20), 2, alone=2))
    assert [number for number, _ in results] == list(range(20))
    processes = [process for _, process in results]
    assert processes[:2] == [os.getpid()] * 2
    assert os.getpid() not in processes[2:]


@pytest.mark.parametrize("workers", [0, 1])
def test_without_workers_there_is_no_other_process(workers):
    assert {process for _, process in in_order(by_process, range(9), workers, alone=2)} == {os.getpid()}


def test_few_items_start_no_process():
    assert {process for _, process in in_order(by_process, range(2), 2, alone=2)} == {os.getpid()}


def test_items_are_not_taken_far_ahead():
    taken = count()
    items = (next(taken) for _ in range(1000))
    results = in_order(abs, items, 2, alone=0)
    for _ in range(10):
        next(results)
    results.close()
    assert next(taken) <= 14


def test_an_error_is_raised_after_the_results_before_it_and_as_it_is():
    def work(number: int) -> int:
        if number >= 7:
            raise KeyError(number)
        return number

    results = in_order(work, range(20), 2, alone=2)
    assert [next(results) for _ in range(7)] == list(range(7))
    with pytest.raises(KeyError, match="7"):
        next(results)


def test_a_result_that_cannot_be_pickled_is_made_here():
    results = list(in_order(lambda number: (lambda: number) if number == 5 else number, range(9), 2, alone=1))
    assert [each() if callable(each) else each for each in results] == list(range(9))


def test_what_is_wrong_with_an_item_comes_before_an_error_of_reading_the_next():
    def items():
        yield from range(6)
        raise OSError("no more")

    def work(number: int) -> int:
        return 1 // (5 - number)

    with pytest.raises(ZeroDivisionError):
        list(in_order(work, items(), 2, alone=1))
    with pytest.raises(OSError, match="no more"):
        list(in_order(abs, items(), 2, alone=1))


def test_a_killed_worker_is_an_error_that_says_what_to_do():
    parent = os.getpid()

    def work(number: int) -> int:
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(SFTError, match="was killed") as caught:
        list(in_order(work, range(9), 2, alone=2))
    assert caught.value.where == "data.preparation_workers"


def made(path, tokenizer, workers: int, format="auto", **options):
    given = {"max_length": 60, "overlong": "truncate_right"} | options
    return prepare.prepare([Source(str(path), format)], Renderer(tokenizer), **given, workers=workers)


def test_several_processes_prepare_what_one_does(tmp_path, tokenizer, small_chunks):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(chat(f"q{n}", "b" * (1 + 5 * (n % 12)))) + "\n" for n in range(50)))
    serial, parallel = (made(path, tokenizer, workers) for workers in (0, 2))
    assert contents(parallel) == contents(serial)
    assert accounts(parallel) == accounts(serial)
    assert parallel.ledgers[0].truncated
    assert parallel.ledgers[0].rows == parallel.ledgers[0].gathered_rows == 50
    assert parallel.digest == serial.digest
    assert parallel.keys.tolist() == serial.keys.tolist()


class Failing(DataFormat):
    """Fails at a row without a text, the way a careless plug-in does."""

    def matches(self, columns):
        return False

    def convert(self, row):
        return Messages().convert(chat(row["text"], "b"))


@pytest.mark.parametrize(
    ("bad", "format", "says"),
    [
        ({"other": 1}, Failing(), "row 31: .*Failing failed: KeyError: 'text'"),
        ({"text": ""}, Failing(), "row 31"),
    ],
)
def test_an_error_in_a_worker_names_its_row_as_without(bad, format, says, tmp_path, tokenizer, small_chunks):
    rows = [{"text": "a"}] * 30 + [bad] + [{"text": "a"}] * 5 + [{"other": 1}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    errors = []
    for workers in (0, 2):
        with pytest.raises(SFTError, match=says) as caught:
            made(path, tokenizer, workers, format)
        errors.append((str(caught.value), type(caught.value.__cause__)))
    assert errors[0] == errors[1]


def test_ctrl_c_ends_the_workers():
    processes = set()

    def items():
        yield from range(40)
        raise KeyboardInterrupt

    results = (processes.add(process) for _, process in in_order(by_process, items(), 2, alone=1))
    with pytest.raises(KeyboardInterrupt):
        list(results)
    assert len(processes) > 1
    for process in processes - {os.getpid()}:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
