"""Every rule warns where the mistake is made, and only there; none stops a run."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from lightning_sft import SFTDataModule, SFTError, SFTModule
from lightning_sft.training.advisor import RULES, Facts, advice
from lightning_sft_adapters.lora import LoRA


class Probe(Callback):
    measures_forgetting = True


GOOD = Facts(
    learning_rate=1e-5,
    trains_all=True,
    low_rank=False,
    attention_only=False,
    epochs=3,
    examples=128,
    callbacks=(Probe,),
)
LOW_RANK = replace(GOOD, trains_all=False, low_rank=True, learning_rate=2e-4, examples=32)
MISTAKES = {
    "full-rate": (replace(GOOD, learning_rate=2.1e-5), replace(GOOD, learning_rate=2e-5)),
    "lora-rate": (replace(LOW_RANK, learning_rate=4.9e-5), replace(LOW_RANK, learning_rate=5e-5)),
    "attention-only": (replace(LOW_RANK, attention_only=True), LOW_RANK),
    "epochs": (replace(GOOD, epochs=4), replace(GOOD, epochs=4, callbacks=(Probe, EarlyStopping))),
    "lora-batch": (replace(LOW_RANK, examples=33), replace(GOOD, examples=33)),
    "no-probe": (replace(GOOD, callbacks=(EarlyStopping,)), GOOD),
}


def names(facts, silenced=()):
    return [rule.name for rule, _ in advice(facts, silenced)]


def test_every_rule_is_tried():
    assert list(MISTAKES) == [rule.name for rule in RULES]
    assert names(GOOD) == names(LOW_RANK) == []


@pytest.mark.parametrize("name", MISTAKES)
def test_a_rule_warns_of_its_mistake_alone(name):
    wrong, right = MISTAKES[name]
    assert names(wrong) == [name]
    assert names(right) == []
    assert names(wrong, [name]) == names(wrong, ["all"]) == []


@pytest.mark.parametrize(
    ("adapter", "silenced", "expected"),
    [
        (LoRA(r=2, target_modules=["q_proj", "o_proj"]), (), {"attention-only", "no-probe", "epochs"}),
        (LoRA(r=2, target_modules=["q_proj", "up_proj"]), (), {"no-probe", "epochs"}),
        (None, ("no-probe",), {"full-rate", "epochs"}),
        (None, ("all",), set()),
    ],
)
def test_a_run_warns_once_and_goes_on(adapter, silenced, expected, model_folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"instruction": f"say {n}", "output": f"{n}"}) for n in range(4)))
    module = SFTModule(
        base=str(model_folder("llama")), adapter=adapter, learning_rate=1e-4, silenced_advice=silenced
    )
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, max_epochs=4
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, SFTDataModule(train=str(rows), batch_size=4))
    told = [str(each.message) for each in caught if str(each.message).startswith("Advice: ")]
    assert {text.rpartition("[")[2].partition("]")[0] for text in told} == expected
    assert len(told) == len(expected)
    assert trainer.global_step == 4


def test_an_unknown_name_is_refused():
    with pytest.raises(SFTError, match="no advice is named 'full_rate'"):
        SFTModule(base="tiny", silenced_advice=("full_rate",))
