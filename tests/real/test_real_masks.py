"""The law of the loss mask on real rows with real tokenizers and the phi-3 template as it comes."""

import re

import pytest
from chat_families import EOS, FAMILIES, as_dicts, law, template_ids, trained_turns
from chat_families_newer import NEWER
from test_rendering import CONVERSATIONS, can, imitations

from lightning_sft import Renderer, SFTError
from lightning_sft.data.conversion import convert_rows
from lightning_sft.data.sources import Source, read_rows
from lightning_sft_formats.alpaca import Alpaca
from lightning_sft_formats.sharegpt import ShareGPT

TOKENIZERS = {
    "phi-3-mini": ("tokenizers/phi-3-mini", None, "<|end|>"),
    "gpt2": ("tokenizers/gpt2", "plain", "<|endoftext|>"),
    "stories260k": ("models/stories260k", "plain", "</s>"),
}
FILES = {"alpaca_en_demo.json": Alpaca, "glaive_toolcall_en_demo.json": ShareGPT}


@pytest.fixture(scope="module")
def load(shared):
    """A function from a name to (renderer, the stop token)."""
    from transformers import AutoTokenizer

    def renderer(name):
        folder, template, stop = TOKENIZERS[name]
        return Renderer(AutoTokenizer.from_pretrained(shared / "real" / folder), template), stop

    return renderer


@pytest.fixture(scope="module")
def rows(shared):
    """A function from a file's name to the conversations of its first hundred rows."""

    def conversations(name):
        source = Source(str(shared / "real" / "sft" / name))
        return list(convert_rows(list(read_rows(source))[:100], FILES[name](), FILES[name].__name__))

    return conversations


def visible(tokenizer, text):
    """`text` as it is decoded: what phi-3's tokens swallow, and the space that Llama's put after them."""
    tokens = tokenizer.added_tokens_decoder.values()
    names = "|".join(re.escape(token.content) for token in tokens)
    swallowing = "|".join(re.escape(token.content) for token in tokens if token.rstrip)
    if swallowing:
        text = re.sub(f"({swallowing})\\s+", r"\1", text)
    after_eos = tokenizer(f"{tokenizer.eos_token}a", add_special_tokens=False).input_ids
    if tokenizer.decode(after_eos).endswith(" a"):
        text = re.sub(f"({names})(?!{names}|$)", r"\1 ", text)
    return text


def across_the_boundary(tokenizer, example, turns, expected):
    """The expected turns, each from the start of a token that reaches over the end of its prompt."""
    trained = example.weights > 0
    firsts = [n for n in range(len(trained)) if trained[n] and not trained[n - 1]]
    for first, (prompt, _), (lawful, through) in zip(firsts, turns, expected, strict=True):
        token = tokenizer.decode(example.input_ids[first : first + 1])
        merged = lawful.startswith(prompt) and 0 < len(lawful) - len(prompt) < len(token)
        yield (prompt if merged else lawful), through


def hold_against_the_law(renderer, stop, conversations, *, merging=False):
    tokenizer, template = renderer.tokenizer, renderer.chat_template
    for conversation, example in zip(conversations, renderer.render_all(conversations), strict=True):
        assert example.input_ids.tolist() == template_ids(tokenizer, conversation, template)
        turns = list(law(tokenizer, conversation, template, stop))
        expected = [(visible(tokenizer, p), visible(tokenizer, p + turn)) for p, turn in turns]
        found = trained_turns(tokenizer, example)
        if merging:
            expected = list(across_the_boundary(tokenizer, example, found, expected))
        assert [(p, p + turn) for p, turn in found] == expected
        assert len(turns) == sum(m["role"] == "assistant" for m in as_dicts(conversation))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_law_holds_on_alpaca_rows(name, load, rows):
    hold_against_the_law(*load(name), rows("alpaca_en_demo.json"))


@pytest.mark.parametrize("name", ["gpt2", "stories260k"])
def test_the_law_holds_on_rows_with_tools(name, load, rows):
    conversations = rows("glaive_toolcall_en_demo.json")
    assert sum(bool(m.tool_calls) for c in conversations for m in c.messages) > 50
    hold_against_the_law(*load(name), conversations)


def needs_tools(conversation):
    return bool(conversation.tools) or any(m.role == "tool" or m.tool_calls for m in conversation.messages)


def test_phi_3_has_no_place_for_tools(load, rows):
    renderer, stop = load("phi-3-mini")
    conversations = rows("glaive_toolcall_en_demo.json")
    refused = [c for c in conversations if needs_tools(c)]
    assert refused
    for conversation in refused:
        with pytest.raises(SFTError) as error:
            renderer.render(conversation)
        assert str(error.value).startswith(str(conversation.meta))
        assert "glaive_toolcall_en_demo.json, row" in str(error.value)
        assert "the chat template leaves out" in str(error.value) or "has tools, which" in str(error.value)
    assert len(refused) < len(conversations)
    hold_against_the_law(renderer, stop, [c for c in conversations if not needs_tools(c)])


def test_the_stop_tokens_of_phi_3_are_its_end_and_eos(load):
    renderer, stop = load("phi-3-mini")
    assert renderer.stop_token == stop
    assert renderer.tokenizer.convert_ids_to_tokens(renderer.stop_token_ids) == ["<|end|>", "<|endoftext|>"]


@pytest.mark.parametrize("family", [*FAMILIES, *NEWER])
@pytest.mark.parametrize("folder", ["gpt2", "phi-3-mini"])
def test_the_law_holds_for_every_family_with_real_tokenizers(folder, family, shared):
    from transformers import AddedToken, AutoTokenizer

    given = (FAMILIES | NEWER)[family]
    tokenizer = AutoTokenizer.from_pretrained(shared / "real" / "tokenizers" / folder)
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    missing = [token for token in given.added if token not in known]
    tokenizer.add_tokens([AddedToken(token, normalized=False, rstrip=given.rstrip) for token in missing])
    own = "{" in given.template
    if own:
        tokenizer.chat_template = given.template
    renderer = Renderer(tokenizer, None if own else given.template)
    stop = tokenizer.eos_token if given.stop == EOS else given.stop
    talks = [CONVERSATIONS[name] for name in CONVERSATIONS if can(given, name)]
    hold_against_the_law(renderer, stop, [*talks, *imitations(given)], merging=True)
