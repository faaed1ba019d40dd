"""The embedded model and its data are what they claim to be."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.assets import HERE, MODEL, build, data_path
from lightning_sft.assets.corpus import corpus
from lightning_sft.assets.world import facts, probed
from lightning_sft_callbacks import overlap
from lightning_sft_callbacks.overlap import Passage, words_of

RECORD = HERE / "record.json"


def rows(name: str) -> list[dict]:
    path = data_path(f"tiny:{name}")
    assert path is not None
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class TestData:
    def test_it_is_what_its_scripts_write(self, tmp_path):
        build.write_data(tmp_path)
        for path in tmp_path.iterdir():
            assert path.read_bytes() == (HERE / "data" / path.name).read_bytes(), path.name

    def test_there_is_enough_of_it(self):
        assert len(rows("train")) >= 1000
        assert len(rows("held_out")) == 200
        assert len(rows("facts")) == 200
        assert {len(row["choices"]) for row in rows("facts")} == {4}

    def test_no_held_out_question_was_trained(self):
        trained = {(row["instruction"], row["input"]) for row in rows("train")}
        assert not trained & {(row["instruction"], row["input"]) for row in rows("held_out")}

    def test_remembering_the_nearest_training_row_is_of_little_use(self):
        def words(row: dict) -> frozenset[str]:
            return frozenset(re.findall(r"\w+", f"{row['instruction']} {row['input']}"))

        known = [(words(row), row["output"]) for row in rows("train")]
        right = 0
        for row in rows("held_out"):
            asked = words(row)
            _, answer = max(known, key=lambda pair: len(asked & pair[0]) / len(asked | pair[0]))
            right += answer == row["output"]
        assert right / len(rows("held_out")) <= 0.3

    @pytest.mark.parametrize("name", ["replay", "general"])
    def test_replay_and_general_text_keep_the_probed_facts_out(self, name):
        text = "\n".join(row["text"] for row in rows(name))
        stated = [statement for fact in probed() for statement in fact.statements if statement in text]
        assert stated == []
        assert any(statement in text for fact in facts() for statement in fact.statements)

    def test_no_passage_of_general_text_is_in_replay_or_training_text(self):
        def said(name: str) -> list[tuple[str, str]]:
            return [(str(n), " ".join(map(str, row.values()))) for n, row in enumerate(rows(name))]

        passages = [Passage("general", where, text) for where, text in said("general")]
        runs = overlap._runs(passages)
        assert {len(run) for run in runs} == {13}
        for name in ("replay", "train"):
            for where, text in said(name):
                words = words_of(text)
                found = [tuple(words[n : n + 13]) for n in range(len(words) - 12)]
                assert runs.keys().isdisjoint(found), (name, where)
        assert len(rows("replay")) == build.DOCUMENTS["replay"]

    def test_the_base_was_told_the_probed_facts_and_never_asked_for_them(self):
        text = "\n".join(corpus(build.SEEDS["corpus"], build.DOCUMENTS["corpus"]))
        for fact in probed():
            assert f"Question: {fact.question}" not in text
            assert any(statement in text for statement in fact.statements)

    def test_the_right_choice_is_in_no_favoured_place(self):
        places = Counter(row["answer"] for row in rows("facts"))
        assert max(places.values()) <= 0.35 * 200


class TestModel:
    def test_it_is_a_small_llama_with_a_chat_template(self):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(HERE / MODEL)
        tokenizer = AutoTokenizer.from_pretrained(HERE / MODEL)
        assert type(model).__name__ == "LlamaForCausalLM"
        assert 300_000 <= model.num_parameters() <= 1_500_000
        assert sum(path.stat().st_size for path in (HERE / MODEL).iterdir()) <= 4_000_000
        assert (HERE / MODEL / "model.safetensors").is_file()
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True
        )
        assert text == "<s><|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.eos_token == "</s>"

    def test_the_record_says_how_it_was_made(self):
        record = json.loads(RECORD.read_text())
        assert record["seeds"] == build.SEEDS
        assert record["documents"] == build.DOCUMENTS
        assert Path(record["config"]).name == "tiny_base.yaml"

    def test_the_base_knows_the_facts_and_follows_no_instruction(self):
        from lightning.pytorch import Trainer

        from lightning_sft_callbacks.before_after import BeforeAfter

        module, data = SFTModule(base="tiny"), SFTDataModule(val="tiny:held_out")
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
        )
        trainer.validate(module, data, verbose=False)
        measured = BeforeAfter("tiny:held_out", "tiny:general", "tiny:facts").measure(module)
        recorded = json.loads(RECORD.read_text())["scores"]
        assert measured.accuracy >= 0.7
        assert measured.exact_match <= 0.05
        assert measured.accuracy == pytest.approx(recorded["accuracy"], abs=0.02)
        assert measured.general_loss == pytest.approx(recorded["general_loss"], rel=1e-3)
