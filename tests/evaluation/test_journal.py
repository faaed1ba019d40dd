"""What an evaluation keeps of its responses: nothing is lost, and nothing is taken that another model gave."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch

from lightning_sft import Answered, Item, Likelihood, LogLikelihood, Scorer
from lightning_sft.evaluation.evaluation import _identity
from lightning_sft.evaluation.journal import Journal

ANSWERED = [
    (n, Answered(Item("t", n, (LogLikelihood("a", str(n)),)), (Likelihood(-1.0 - n, 1, False),)))
    for n in range(4)
]
KNOWN = {each.item.key: each.responses for _, each in ANSWERED}


def test_a_file_that_is_cut_off_anywhere_keeps_every_whole_line(tmp_path):
    journal = Journal(tmp_path, {"weights": 1})
    list(journal.write(ANSWERED))
    whole = journal.path.read_bytes()
    for end in range(len(whole)):
        journal.path.write_bytes(whole[:end])
        lines = max(0, whole[:end].count(b"\n") - 1)
        assert journal.known().items() >= dict(list(KNOWN.items())[:lines]).items()
    journal.path.write_bytes(whole[:-9])
    list(journal.write(ANSWERED[3:]))
    assert journal.known() == KNOWN


def test_what_was_answered_is_never_gone_while_the_file_is_made_anew(tmp_path, monkeypatch):
    journal = Journal(tmp_path, {"weights": 1})
    list(journal.write(ANSWERED))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            list(journal.write([]))
    assert journal.known() == KNOWN
    assert Journal(tmp_path, {"weights": 2}).known() == {}


@pytest.fixture(scope="module")
def asked(model_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_folder("llama")
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_the_same_model_is_known_again(asked):
    model, tokenizer = asked
    scorer = Scorer(deepcopy(model), deepcopy(tokenizer))
    scorer.run([LogLikelihood("hello", " you")])
    assert _identity(scorer, "32-true") == _identity(Scorer(model, tokenizer), "32-true")


def one_weight(model, tokenizer):
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 5] += 1e-3


def rope(model, tokenizer):
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 77.0}


def an_end(model, tokenizer):
    model.generation_config.eos_token_id = [0, 5]


def bos(model, tokenizer):
    from tokenizers import processors

    first = [(tokenizer.eos_token, tokenizer.eos_token_id)]
    template = processors.TemplateProcessing(single=f"{tokenizer.eos_token} $A", special_tokens=first)
    tokenizer.backend_tokenizer.post_processor = template


def template(model, tokenizer):
    tokenizer.chat_template = "{{ messages[0].content }}"


@pytest.mark.parametrize("change", [one_weight, rope, an_end, bos, template])
def test_another_model_isn_t_taken_for_it(asked, change):
    model, tokenizer = map(deepcopy, asked)
    before = _identity(Scorer(model, tokenizer), "32-true")
    change(model, tokenizer)
    assert _identity(Scorer(model, tokenizer), "32-true") != before


def test_another_precision_and_another_scale_of_an_adapter_aren_t_taken_for_it(asked):
    from peft import LoraConfig, get_peft_model

    adapted = [
        get_peft_model(deepcopy(asked[0]), LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"]))
        for alpha in (2, 4)
    ]
    adapted[1].load_state_dict(adapted[0].state_dict())
    first, second = (_identity(Scorer(each, asked[1]), "32-true") for each in adapted)
    assert first["weights"] == second["weights"]
    assert first != second
    assert first != _identity(Scorer(adapted[0], asked[1]), "bf16-mixed")
