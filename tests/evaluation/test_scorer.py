"""The Scorer against transformers, one text at a time."""

from __future__ import annotations

import pytest
import torch

from lightning_sft import Generate, Message, Scorer, Segments, SFTModule
from lightning_sft.assets import HERE, MODEL

TEXTS = [
    (("Anna lives in", 0.0), (" Camden.", 1.0)),
    (("", 0.0), ("The cup is made of wood.", 1.0)),
    (
        ("The list: cup, lamp, spoon. The first is", 0.0),
        (" cup", 0.5),
        (". The last is", 0.0),
        (" spoon", 1.0),
    ),
]
ASKED = ["Hello, I am Anna.", "How are you today?", "I have a red cup. Anna went to Camden with a blue kite."]


@pytest.fixture(scope="module")
def module():
    module = SFTModule(base="tiny")
    module.configure_model()
    module.loaded.train()
    return module


@pytest.fixture(scope="module")
def plain():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(HERE / MODEL).eval()


@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
def test_log_likelihoods_are_those_of_each_text_alone(module, plain, batch_tokens):
    examples = module.renderer.render_all([Segments(segments) for segments in TEXTS])
    found = Scorer.of(module, batch_tokens=batch_tokens).negative_log_likelihoods(examples)
    for example, nll in zip(examples, found, strict=True):
        ids = torch.from_numpy(example.input_ids).long()[None]
        with torch.no_grad():
            log_p = plain(input_ids=ids).logits[0, :-1].log_softmax(-1)
        token = log_p.gather(1, ids[0, 1:, None])[:, 0]
        assert nll == pytest.approx(-float((token * torch.from_numpy(example.weights[1:])).sum()), rel=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
def test_answers_are_those_of_each_prompt_alone(module, plain, batch_tokens):
    prompts = [module.renderer.generation_prompt([Message("user", text)]) for text in ASKED]
    requests = [Generate((Message("user", text),), max_new_tokens=20) for text in ASKED]
    found = [answer.text for answer in Scorer.of(module, batch_tokens=batch_tokens).run(requests)]
    for prompt, answer in zip(prompts, found, strict=True):
        ids = module.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        length = ids.shape[1]
        with torch.no_grad():
            for _ in range(20):  # the slow obvious way: no cache, no padding
                token = plain(input_ids=ids).logits[0, -1].argmax()
                if int(token) in module.renderer.stop_token_ids:
                    break
                ids = torch.cat([ids, token.reshape(1, 1)], dim=1)
        assert answer == module.tokenizer.decode(ids[0, length:], skip_special_tokens=True)


def test_it_leaves_mode_and_random_numbers_as_they_were(module):
    state = torch.random.get_rng_state()
    scorer = Scorer.of(module)
    scorer.negative_log_likelihoods(module.renderer.render_all([Segments(TEXTS[0])]))
    scorer.run([Generate("Hello", max_new_tokens=2), Generate("Hello", max_new_tokens=2, temperature=1.0)])
    assert module.loaded.training
    assert torch.equal(state, torch.random.get_rng_state())
