"""Real conversations with tools in a small context, under every policy for longer examples."""

import pytest
from chat_families import template_ids

from lightning_sft import Conversation, Renderer
from lightning_sft.data.conversion import convert_rows
from lightning_sft.data.ledger import SourceLedger
from lightning_sft.data.sources import Source, read_rows
from lightning_sft.data.truncation import fit
from lightning_sft_formats.sharegpt import ShareGPT

LIMIT = 400


@pytest.fixture(scope="module")
def rendered(shared):
    """A renderer, and a hundred conversations with their renderings."""
    from transformers import AutoTokenizer

    renderer = Renderer(AutoTokenizer.from_pretrained(shared / "real" / "tokenizers" / "phi-3-mini"), "plain")
    source = Source(str(shared / "real" / "sft" / "glaive_toolcall_en_demo.json"), limit=100)
    talks = list(convert_rows(read_rows(source), ShareGPT(), "ShareGPT"))
    return renderer, talks, [one for (one,) in renderer.explain(talks)]


@pytest.mark.parametrize(
    ("overlong", "examples", "truncated", "split", "dropped"),
    [
        ("drop", 41, 0, 0, 59),
        ("truncate_right", 99, 58, 0, 1),
        ("truncate_left", 98, 57, 0, 2),
        ("drop_oldest_turns", 91, 50, 0, 9),
        ("split", 184, 28, 57, 0),
    ],
)
def test_real_conversations_are_fitted_and_add_up(rendered, overlong, examples, truncated, split, dropped):
    renderer, talks, renderings = rendered
    ledger = SourceLedger("glaive", "", rows=100, gathered_rows=100, conversations=100)
    kept = 0
    for talk, whole in zip(talks, renderings, strict=True):
        out = fit(renderer, talk, whole, max_length=LIMIT, overlong=overlong)
        ledger.count(out)
        for piece in out.kept:
            ids = piece.example.input_ids.tolist()
            kept += len(ids)
            assert len(ids) <= LIMIT
            if overlong != "truncate_left":
                part = Conversation(tuple(talk.messages[n] for n in piece.part.messages), talk.tools)
                assert ids == template_ids(renderer.tokenizer, part, renderer.chat_template)[:LIMIT]
    ledger.check()
    if overlong == "drop":
        assert dropped == sum(len(whole.example) > LIMIT for whole in renderings)
    assert ledger.tokens == sum(
        len(template_ids(renderer.tokenizer, talk, renderer.chat_template)) for talk in talks
    )
    lost = sum(loss.tokens for loss in ledger.lost)
    assert ledger.tokens + ledger.split.repeated_tokens == kept + lost
    gone = sum(loss.examples for loss in ledger.dropped.values())
    assert (ledger.examples, ledger.truncated_examples, ledger.split.examples, gone) == (
        examples,
        truncated,
        split,
        dropped,
    )
