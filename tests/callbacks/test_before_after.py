"""BeforeAfter's figures against the slow obvious way."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.assets import HERE, MODEL, data_path


def first(name: str, n: int) -> list[dict]:
    path = data_path(f"tiny:{name}")
    assert path is not None
    return [json.loads(line) for line in path.read_text().splitlines()[:n]]


def write(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def base():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(HERE / MODEL).eval(), AutoTokenizer.from_pretrained(
        HERE / MODEL
    )


def log_p(base, ids: list[int]) -> torch.Tensor:
    """Log-probability of each token after the first."""
    with torch.no_grad():
        logits = base[0](input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, torch.tensor(ids)[1:, None])[:, 0]


@pytest.fixture(scope="module")
def run(tmp_path_factory, base):
    """One step of training on a handful of rows, two of which the base answers to the letter already."""
    from lightning_sft_callbacks.before_after import BeforeAfter

    folder = tmp_path_factory.mktemp("run")
    rows = first("held_out", 6)
    for row in rows[:2]:
        row["task"] = "known"
        asked = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
        prompt = base[1].apply_chat_template(
            [{"role": "user", "content": asked}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        stop = base[1].convert_tokens_to_ids("<|im_end|>")
        out = base[0].generate(
            prompt, max_new_tokens=48, do_sample=False, eos_token_id=stop, pad_token_id=stop
        )
        row["output"] = base[1].decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
    callback = BeforeAfter(
        write(folder / "rows.jsonl", rows),
        write(folder / "general.jsonl", first("general", 3)),
        write(folder / "facts.jsonl", first("facts", 12)),
        samples=2,
        gated=["known"],
    )
    module = SFTModule(base="tiny", learning_rate=1e-3)
    data = SFTDataModule(train="tiny:train", val=str(folder / "rows.jsonl"), batch_size=4)
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(module, data)
    return json.loads((folder / "before_after.json").read_text()), rows


def test_exact_match_counts_answers_that_are_right_to_the_letter(run):
    before = run[0]["before"]
    assert before["exact_match_by_task"]["known"] == 1.0
    assert before["exact_match"] == pytest.approx(2 / 6)


def test_accuracy_is_the_share_of_questions_whose_right_choice_is_likeliest(run, base):
    right = 0
    for row in first("facts", 12):
        scores = []
        asked = base[1](f"Question: {row['question']} Answer:").input_ids
        for choice in row["choices"]:
            answer = base[1](f" {choice}", add_special_tokens=False).input_ids
            scores.append(float(log_p(base, [*asked, *answer])[-len(answer) :].sum()))
        right += scores.index(max(scores)) == row["answer"]
    assert run[0]["before"]["accuracy"] == pytest.approx(right / 12)


def test_general_loss_is_per_token_with_the_end_of_text(run, base):
    each = [
        log_p(base, [*base[1](row["text"]).input_ids, base[1].eos_token_id]) for row in first("general", 3)
    ]
    together = torch.cat(each)
    assert run[0]["before"]["general_loss"] == pytest.approx(-float(together.mean()), rel=1e-5)


def test_training_shows_in_the_second_measurement(run):
    assert run[0]["after"]["validation_loss"] != run[0]["before"]["validation_loss"]
    assert len(run[0]["after"]["answers"]) == 2
