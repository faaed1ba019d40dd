"""Deliberate faults in the mask must not pass the checks that the other tests are made of."""

from dataclasses import replace

import numpy as np
import pytest
from chat_families import EOS, FAMILIES, META, build_tokenizer
from chat_families_newer import REWRITING
from test_rendering import CONVERSATIONS, chat, check, imitations
from test_rendering_families import check_turns

from lightning_sft import Segments
from lightning_sft.data.batch import flatten, pad
from lightning_sft.example import Reason
from lightning_sft.rendering import encode, layout

FAMILY = FAMILIES["chatml"]
TALKS = [CONVERSATIONS["multi-turn"], CONVERSATIONS["system"], *imitations(FAMILY)]


def masks(monkeypatch, change):
    """Changes the weights of every example; `change` takes (ids, weights, tokenizer)."""
    original = encode.Encoder.encode

    def changed(rendering, tokenizer):
        weights = change(rendering.example.input_ids, rendering.example.weights.copy(), tokenizer)
        reasons = np.where(weights > 0, Reason.TRAINED, Reason.CONTEXT).astype(np.uint8)
        return replace(rendering, example=replace(rendering.example, weights=weights, reasons=reasons))

    def mutant(self, layouts):
        return [changed(rendering, self.tokenizer) for rendering in original(self, layouts)]

    monkeypatch.setattr(encode.Encoder, "encode", mutant)


def without_eot(ids, weights, tokenizer):
    weights[ids == tokenizer.convert_tokens_to_ids("<|im_end|>")] = 0
    return weights


def by_token_id(ids, weights, tokenizer):
    """From each header of the assistant's to the next end of turn, wherever these tokens are from."""
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    out, inside = np.zeros_like(weights), False
    for n, token in enumerate(ids.tolist()):
        out[n] = inside
        if token == start:
            inside = tokenizer.decode(ids[n + 1 : n + 12]).startswith("assistant\n")
        elif token == end:
            inside = False
    return out


def pad_untrained(ids, weights, tokenizer):
    weights[ids == tokenizer.pad_token_id] = 0
    return weights


MUTANTS = {
    "one token late": lambda ids, weights, tokenizer: np.roll(weights, 1),
    "one token early": lambda ids, weights, tokenizer: np.roll(weights, -1),
    "end of turn untrained": without_eot,
    "by token id": by_token_id,
    "everything": lambda ids, weights, tokenizer: np.ones_like(weights),
}


def test_without_a_fault_the_checks_pass(monkeypatch):
    masks(monkeypatch, lambda ids, weights, tokenizer: weights)
    check(FAMILY, "bytes", TALKS)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_mask_fails(monkeypatch, mutant):
    masks(monkeypatch, MUTANTS[mutant])
    with pytest.raises(AssertionError):
        check(FAMILY, "bytes", TALKS)


def test_a_mask_of_padding_by_id_fails(monkeypatch):
    masks(monkeypatch, pad_untrained)
    with pytest.raises(AssertionError):
        check(FAMILIES["zephyr"], "bytes", TALKS[:1])


@pytest.mark.parametrize("faulty", ["_start", "_stop"])
@pytest.mark.parametrize("by", [-1, 1])
def test_a_boundary_that_is_off_by_a_character_fails(monkeypatch, faulty, by):
    original = getattr(layout._Rendered, faulty)

    def mutant(self, *arguments):
        found = original(self, *arguments)
        return found + by if faulty == "_start" else (found[0], found[0] if by < 0 else found[1] + by)

    monkeypatch.setattr(layout._Rendered, faulty, mutant)
    with pytest.raises(AssertionError):
        check(FAMILY, "bytes", TALKS)


def test_without_the_check_of_history_a_rewritten_one_would_pass(monkeypatch):
    family, talk = REWRITING["qwen3"], chat("hi", "one", "and?", "two")
    check_turns(family, "bytes", talk)
    monkeypatch.setattr(layout._Rendered, "_check_history_is_kept", lambda *arguments: None)
    with pytest.raises(AssertionError):
        check(family, "bytes", [talk])


def test_targets_are_the_next_tokens():
    """Position t predicts token t + 1: what a batch trains is what the example says, by hand."""
    from lightning_sft import Renderer

    tokenizer = build_tokenizer("bytes")
    example = Renderer(tokenizer).render(Segments((("ab", 0.0), ("cd", 1.0)), META))
    ids = example.input_ids.tolist()
    trained = [n for n, weight in enumerate(example.weights.tolist()) if weight > 0]
    assert tokenizer.decode([ids[n] for n in trained]) == f"cd{EOS}"
    for batch in (flatten([example], 3.0), pad([example, example], 6.0, pad_id=tokenizer.pad_token_id)):
        rows = len(batch.targets) // len(trained)
        assert batch.targets.tolist() == [ids[n] for n in trained] * rows
        assert batch.positions.tolist() == [row * len(ids) + n - 1 for row in range(rows) for n in trained]


def test_padding_that_is_the_end_of_turn_token_is_no_target():
    from lightning_sft import Renderer

    tokenizer = build_tokenizer("bytes")
    assert tokenizer.pad_token == EOS
    long, short = Renderer(tokenizer, "plain").render_all([chat("a", "a long answer"), chat("a", "b")])
    batch = pad([long, short], 1.0, pad_id=tokenizer.pad_token_id)
    trained = int((long.weights > 0).sum()), int((short.weights > 0).sum())
    assert len(batch.targets) == sum(trained)
    assert batch.targets.tolist().count(tokenizer.pad_token_id) == 2, "each row's own end, no padding"


def single_word():
    """A tokenizer that takes the end of a turn for its token only between spaces."""
    from tokenizers import AddedToken

    tokenizer = build_tokenizer.__wrapped__("bytes", FAMILY.added[:1])
    tokenizer.add_tokens([AddedToken("<|im_end|>", single_word=True, normalized=False, special=True)])
    return tokenizer


def doubled_bos():
    tokenizer = build_tokenizer("bytes", FAMILY.added)
    tokenizer.chat_template = "{{ bos_token + bos_token }}" + FAMILY.template
    return tokenizer


LINTS = {
    "an end of turn that is no token": (
        single_word,
        encode.Encoder,
        "_check_stop",
        r"of the end-of-turn token <\|im_end\|> here",
    ),
    "two BOS tokens": (doubled_bos, layout._Rendered, "_check_bos", "begins with two BOS tokens"),
}


@pytest.mark.parametrize("lint", LINTS)
def test_what_a_lint_refuses_passes_without_it(monkeypatch, lint):
    from lightning_sft import Renderer, SFTError

    make, owner, name, words = LINTS[lint]
    tokenizer = make()
    tokenizer.chat_template = tokenizer.chat_template or FAMILY.template.replace("<|im_end|>", "x<|im_end|>x")
    with pytest.raises(SFTError, match=words):
        Renderer(tokenizer).render(chat("hi", "one"))
    monkeypatch.setattr(owner, name, lambda *arguments: None)
    assert (Renderer(tokenizer).render(chat("hi", "one")).weights > 0).any()
