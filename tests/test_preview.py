"""The preview shows the very weights of training, the reason of each, and what would be refused."""

import json
import re
from html.parser import HTMLParser
from io import StringIO
from itertools import groupby

import pytest
from chat_families import CHATML, IM, META, build_tokenizer, conversation, make_renderer
from chat_families_newer import DEEPSEEK_R1, R1_TOKENS, SMOLLM
from rich.console import Console

from lightning_sft import Message, Segments
from lightning_sft.__main__ import main
from lightning_sft.preview import show
from lightning_sft.preview_html import page
from lightning_sft.preview_text import print_examples

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"hi {n} <b>"},
            {"role": "assistant", "content": f"hello\n{n} "},
        ]
    }
    for n in range(1, 8)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    """A model folder without any weights: a preview needs none."""
    from conftest import tiny_config

    folder = tmp_path_factory.mktemp("base")
    tiny_config("llama", len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path, base):
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    path = tmp_path / "my.yaml"
    path.write_text(
        f"seed_everything: 1\nmodel: {{base: {base}, adapter: LoRA}}\ndata: {{train: {data}}}\n"
        "trainer: {max_epochs: 1, callbacks: [{class_path: lightning.pytorch.callbacks.Timer}]}\n"
    )
    return path


def preview(capfd, *argv) -> str:
    assert main(["preview", *map(str, argv)]) == 0, capfd.readouterr().err
    return capfd.readouterr().out


def mistake(capfd, *argv) -> str:
    assert main(["preview", *map(str, argv)]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


def examples(capfd, *argv):
    return json.loads(preview(capfd, *argv, "--json"))


def test_the_tokens_are_those_of_the_renderer(capfd, config, tokenizer):
    from lightning_sft import Renderer

    shown = examples(capfd, "--config", config)
    assert [each["row"] for each in shown] == [1, 2, 3]
    example = Renderer(tokenizer).render(
        conversation(*((m["role"], m["content"]) for m in ROWS[1]["messages"]))
    )
    tokens = shown[1]["tokens"]
    assert [token["id"] for token in tokens] == example.input_ids.tolist()
    assert [token["weight"] for token in tokens] == example.weights.tolist()
    assert "".join(token["text"] for token in tokens) == tokenizer.decode(example.input_ids)
    trained = "".join(token["text"] for token in tokens if token["reason"] == "trained")
    assert trained == "hello\n2 <|im_end|>"
    origins = [key for key, _ in groupby(token["origin"] for token in tokens)]
    assert origins == ["template", "message 1 (user)", "template", "message 2 (assistant)", "template"]


def test_rows_are_chosen_by_number(capfd, config):
    assert [e["row"] for e in examples(capfd, "--config", config, "--rows", "5,2")] == [2, 5]
    assert [e["row"] for e in examples(capfd, "--config", config, "-n", "5")] == [1, 2, 3, 4, 5]
    assert "there is no row 9, 17\n  → the last row is 7" in mistake(
        capfd, "--config", config, "--rows", "9,2,17"
    )
    assert "'x' are no row numbers" in mistake(capfd, "--config", config, "--rows", "x")
    assert "--examples: it is 0" in mistake(capfd, "--config", config, "-n", "0")


def test_every_policy_of_the_config_is_shown(capfd, config):
    (one,) = examples(
        capfd, "--config", config, "-n", "1", "--model.render.train_on_eot=none", "--data.max_length=10"
    )
    assert any(token["reason"] == "not trained: end of turn" for token in one["tokens"])
    assert any("no end of a turn is trained" in warning for warning in one["warnings"])
    assert any(
        "tokens longer than max_length 10; data.overlong: drop" in warning for warning in one["warnings"]
    )


LONG = [
    ("drop", [None], "dropped, so nothing of this is trained"),
    ("truncate_right", [None], "('"),
    ("truncate_left", [None], "('"),
    ("drop_oldest_turns", [None], "tokens (messages 1-2) lost"),
    ("split", ["piece 1 of 2: messages 1-2", "piece 2 of 2: messages 3-4"], "data.overlong: split"),
]


@pytest.mark.parametrize(("overlong", "pieces", "said"), LONG, ids=[name for name, _, _ in LONG])
def test_what_is_left_of_a_long_example_is_shown_with_what_was_cut(capfd, config, overlong, pieces, said):
    twice = {"messages": [*ROWS[0]["messages"], *ROWS[1]["messages"]]}
    (config.parent / "rows.jsonl").write_text(json.dumps(twice), encoding="utf-8")
    (whole,) = examples(capfd, "--config", config)
    length = len(whole["tokens"])
    options = (f"--data.max_length={length - 1}", f"--data.overlong={overlong}")
    shown = examples(capfd, "--config", config, *options)
    assert [each.get("piece") for each in shown] == pieces
    for each in shown:
        assert any(f"1 tokens longer than max_length {length - 1}" in text for text in each["warnings"])
        assert any(said in text for text in each["warnings"])
        assert (len(each["tokens"]) < length) == (overlong != "drop")
    title = preview(capfd, "--config", config, *options).splitlines()[0]
    assert (pieces[0] or "row 1: ") in title


def test_mistakes_are_told_with_their_place(capfd, config, tmp_path):
    assert "no data is given for val" in mistake(capfd, "--config", config, "--part", "val")
    assert "no such config file" in mistake(capfd, "--config", tmp_path / "none.yaml")
    assert "the page can't be written" in mistake(capfd, "--config", config, "--html", tmp_path)
    assert f"{config}, model.render.train_on" in mistake(capfd, "--config", _with(config, "{train_on: x}"))


def _with(config, render):
    config.write_text(config.read_text().replace("adapter: LoRA", f"adapter: LoRA, render: {render}"))
    return config


def test_a_row_that_is_refused_stops_nothing(capfd, config):
    data = config.parent / "rows.jsonl"
    broken = [
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x"}]},
    ]
    data.write_text("\n".join(map(json.dumps, [*broken, ROWS[0]])), encoding="utf-8")
    first, second, third = examples(capfd, "--config", config)
    assert "unknown role 'wizard'" in first["error"]
    assert second["error"]
    assert third["tokens"]
    text = preview(capfd, "--config", config)
    assert "rows.jsonl, row 1: refused" in text


def shown(renderer, item):
    return list(show(item, renderer))


def printed(examples) -> str:
    out = StringIO()
    print_examples(examples, Console(file=out, width=200))
    return out.getvalue()


def test_the_terminal_tells_without_colour(capfd, config):
    text = preview(capfd, "--config", config, "-n", "1")
    assert "\x1b[" not in text
    lines = [re.sub(r"\s+", " ", line).strip() for line in text.splitlines()]
    assert (
        lines[0].endswith("rows.jsonl, row 1: 29 tokens, 9 trained, Σ weights 9")
        or "trained, Σ weights" in lines[0]
    )
    assert "· 0 message 1 (user) context hi 1 <b>" in lines
    assert "+ 1 message 2 (assistant) trained hello↵" in lines
    assert "1 ⟦<|im_end|>⟧" in lines
    assert lines[-1] == "+ trained · not trained ⟦special token⟧ ↵ newline ␣ space at an edge"


def test_what_cannot_be_seen_is_written_out():
    renderer = make_renderer(build_tokenizer("bytes", IM), CHATML)
    sneaky = conversation(("user", "a\x1b[31m\u202eb\t"), ("assistant", "  👩‍👧 x "))
    text = printed(shown(renderer, sneaky))
    assert "a\\u001b[31m\\u202eb" in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "␣␣👩‍👧 x ⟦<|im_end|>⟧" in text


def test_segments_and_weights():
    renderer = make_renderer(build_tokenizer("bytes", IM), CHATML)
    (each,) = shown(renderer, Segments((("asked ", 0.0), ("said", 0.5)), META))
    assert next((t.origin, t.reason) for t in each.tokens) == ("segment 1", "not trained: weight 0")
    assert (each.tokens[-1].text, each.tokens[-1].weight, each.tokens[-1].special) == ("</s>", 0.5, True)
    assert "Σ weights" in each.title


def test_split_turns_name_their_message():
    renderer = make_renderer(build_tokenizer("bytes", IM), CHATML)
    from lightning_sft import Renderer

    split = Renderer(renderer.tokenizer, split_turns=True)
    talk = conversation(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    first, second = shown(split, talk)
    assert "row 7, message 2: " in first.title
    assert "row 7, message 4: " in second.title
    assert "not trained: another turn" in printed([second])


def test_a_generation_prompt_that_opens_more_is_a_warning():
    renderer = make_renderer(build_tokenizer("bytes", R1_TOKENS), DEEPSEEK_R1)
    text = printed(shown(renderer, conversation(("user", "a"), ("assistant", "b"))))
    assert "warning: the generation prompt ends with '<think>\\n', which the rendered turn leaves out" in text


def test_generation_tags_that_disagree_are_a_warning():
    tokenizer = build_tokenizer("bytes", IM)
    talk = conversation(("user", "a"), ("assistant", "b"), ("user", "c"), Message("assistant", "d"))
    (agreeing,) = shown(make_renderer(tokenizer, SMOLLM), talk)
    assert agreeing.warnings == ()
    tags = SMOLLM.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|im_end|>' }}")
    (short,) = shown(make_renderer(tokenizer, tags), talk)
    assert (
        "hold 0 tokens that aren't trained, and leave out 2 that are (the first: '<|im_end|>')"
        in short.warnings[0]
    )
    untrained = conversation(("user", "a"), ("assistant", "b", 0.0), ("user", "c"), Message("assistant", "d"))
    (more,) = shown(make_renderer(tokenizer, SMOLLM), untrained)
    told = (
        "hold 2 tokens that aren't trained (1 not trained: weight 0, 1 context), and leave out 0 that are: "
    )
    assert told in more.warnings[0]


class _Tokens(HTMLParser):
    """The tokens of a page, as (classes, title, text)."""

    def __init__(self):
        super().__init__()
        self.open, self.tokens, self.sources, self.inside = [], [], [], False

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.sources += [attrs[name] for name in ("src", "href") if name in attrs]
        self.inside |= tag == "pre"
        if tag == "span" and self.inside and "title" in attrs:
            self.tokens.append([attrs["class"], attrs["title"], ""])
            self.open.append(self.tokens[-1])

    def handle_endtag(self, tag):
        self.inside &= tag != "pre"
        self.open.clear()

    def handle_data(self, data):
        if self.open:
            self.open[-1][2] += data


def test_the_page_holds_every_token_with_its_reason():
    tokenizer = build_tokenizer("bytes", IM)
    talk = conversation(("user", "<script>alert('x')</script> & $y"), ("assistant", "b\n", 0.5))
    (each,) = shown(make_renderer(tokenizer, CHATML), talk)
    text = page([each])
    parser = _Tokens()
    parser.feed(text)
    assert parser.sources == [], "a page that stands by itself"
    assert "<script" not in text
    assert len(parser.tokens) == len(each.tokens)
    assert "".join(t[2] for t in parser.tokens).replace("↵", "") == "".join(t.text for t in each.tokens)
    for (classes, title, _), token in zip(parser.tokens, each.tokens, strict=True):
        assert ("trained" in classes.split()) == (token.weight > 0)
        assert title.endswith(f"weight {token.weight:g}: {token.reason}\n{token.origin}")
        assert f"(id {token.id})" in title
    assert "⟨0.5 " in text


def test_the_page_is_written(capfd, config, tmp_path):
    target = tmp_path / "page.html"
    assert f"Written: {target}" in preview(capfd, "--config", config, "--html", target)
    assert target.read_text(encoding="utf-8").startswith("<!doctype html>")
