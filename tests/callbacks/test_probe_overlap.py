"""Passages of probe texts in training rows, against comparing every run of words with every other."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer

from lightning_sft import Example, Meta, SFTDataModule, SFTModule
from lightning_sft_callbacks import overlap
from lightning_sft_callbacks.domains import Domain
from lightning_sft_callbacks.forgetting import ForgettingProbe
from lightning_sft_callbacks.overlap import Passage, overlaps, words_of


def example(ids, row: int) -> Example:
    size = len(ids)
    return Example(
        np.asarray(ids, np.int32), np.ones(size, np.float32), np.zeros(size, np.uint8), Meta("t", row)
    )


def encode(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def decode(ids) -> str:
    return " ".join(f"w{number}" for number in ids)


def slowly(passages: list[Passage], training: list[Example]) -> dict[str, str]:
    """Every run of every text in every row."""
    sizes = [len(words_of(passage.text)) for passage in passages]
    length = int(min(13, max(8, np.percentile(sizes, 5))))
    found: dict[str, str] = {}
    for row in training:
        trained = decode(row.input_ids).split()
        runs = [trained[n : n + length] for n in range(len(trained) - length + 1)]
        for passage in passages:
            words = passage.text.split()
            if any(words[n : n + length] in runs for n in range(len(words) - length + 1)):
                found.setdefault(passage.where, str(row.meta))
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([64, 1 << 20]))
def test_it_finds_what_comparing_everything_finds(seed, block):
    numbers = random.Random(seed)
    vocabulary = numbers.choice([2, 50, 30_000])
    texts = [[numbers.randrange(vocabulary) for _ in range(numbers.randrange(1, 40))] for _ in range(5)]
    rows = [[numbers.randrange(vocabulary) for _ in range(numbers.randrange(1, 40))] for _ in range(9)]
    for _ in range(4):  # plant passages of texts in rows
        text, row = numbers.choice(texts), numbers.randrange(len(rows))
        start, size = numbers.randrange(len(text)), numbers.randrange(5, 20)
        at = numbers.randrange(len(rows[row]) + 1)
        rows[row][at:at] = text[start : start + size]
    passages = [Passage("d", f"text {n}", decode(ids)) for n, ids in enumerate(texts)]
    training = [example(ids, n) for n, ids in enumerate(rows, 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "_BLOCK", block)
        found = overlaps(passages, training, encode, decode)
    assert {each.passage.where: each.row for each in found} == slowly(passages, training)
    for each in found:
        assert f" {each.words} " in f" {each.passage.text} "


def test_a_run_over_the_border_of_two_rows_is_none():
    passage = Passage("d", "a", decode(range(20)))
    assert overlaps([passage], [example(range(6), 1), example(range(6, 12), 2)], encode, decode) == []
    assert len(overlaps([passage], [example(range(14), 1)], encode, decode)) == 1


def test_words_have_no_case_and_no_punctuation():
    assert words_of("Hello,  “the” World's END… 3.5") == ["hello", "the", "world", "s", "end", "3", "5"]
    assert words_of("日本語 text") == ["日", "本", "語", "text"]


def test_a_passage_that_is_trained_on_is_told(tmp_path, model_folder, tokenizer):
    known = "the user asks the assistant about how you are there and the assistant answers hello to the user"
    other = "hello hello there there how how are are you you the the user user asks asks and and"
    rows = [
        {"instruction": "say 1", "output": "nothing of that"},
        {"instruction": "say 2", "output": f"it is said that {known}, again and again"},
    ]
    for name, content in (("train", rows), ("texts", [{"text": other}, {"text": f"Once {known}."}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    asked = [{"question": f"who says {known}?", "choices": ["a", "b"], "answer": 0}]
    (tmp_path / "asked.jsonl").write_text(json.dumps(asked[0]))
    domains = [
        Domain("texts", text=str(tmp_path / "texts.jsonl")),
        Domain("asked", questions=str(tmp_path / "asked.jsonl")),
    ]
    probe = ForgettingProbe(domains, every_n_steps=0)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, max_steps=1,
        enable_model_summary=False, callbacks=[probe], default_root_dir=tmp_path / "run",
    )  # fmt: skip
    module = SFTModule(base=str(model_folder("llama")))
    with pytest.warns(UserWarning, match="2 of 3 probe texts have a passage that is trained on") as caught:
        trainer.fit(module, SFTDataModule(train=str(tmp_path / "train.jsonl"), batch_size=2))
    (said,) = (str(each.message) for each in caught if "passage" in str(each.message))
    assert "texts.jsonl, row 2, in" in said
    assert "train.jsonl, row 2: “" in said
    kept = json.loads(Path(tmp_path / "run/forgetting.json").read_text())["overlaps"]
    assert [(each["domain"], each["row"].rpartition(" ")[2]) for each in kept] == [
        ("texts", "2"),
        ("asked", "2"),
    ]
    assert kept[0]["words"].split() == known.split()[: len(kept[0]["words"].split())]
