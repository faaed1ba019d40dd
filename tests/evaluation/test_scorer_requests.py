"""The Scorer's answers against transformers and the definitions, one request at a time, for many kinds of model."""

from __future__ import annotations

import pytest
import torch
from conftest import CONTEXT

from lightning_sft import (
    Generate,
    Item,
    LogLikelihood,
    Message,
    RollingLogLikelihood,
    Scorer,
    SFTError,
)
from lightning_sft.evaluation import scorer
from lightning_sft.evaluation.forward import Forward
from lightning_sft.evaluation.generation import Writer, _chosen
from lightning_sft.evaluation.sharing import Row, Target

FAMILIES = ["llama", "gpt2", "gemma2", "gemma3", "mistral", "cohere", "falcon", "bloom", "mamba"]
SHOTS = "the user asks and the assistant answers: " * 6
CONTEXTS = ["hello", f"{SHOTS}hello there", f"{SHOTS}how are", f"{SHOTS}how are you ", "", SHOTS * 6]
CONTINUATIONS = [" a", " the assistant", " the user asks", " there, how are you?"]
ASKED = [LogLikelihood(context, end) for context in CONTEXTS for end in CONTINUATIONS]


@pytest.fixture(scope="module")
def load(model_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = {}

    def loaded(family):
        if family not in made:
            folder = model_folder(family)
            model = AutoModelForCausalLM.from_pretrained(folder).eval()
            made[family] = model, AutoTokenizer.from_pretrained(folder)
        return made[family]

    return loaded


def ids_of(tokenizer, context: str, continuation: str) -> tuple[list[int], int]:
    """The definition: the context's own ids, then what all ids have beyond as many, cut at the left; and how many."""
    kept = context.rstrip()
    continuation, context = context[len(kept) :] + continuation, kept
    if not context:
        scored = tokenizer.encode(continuation, add_special_tokens=False)
        return [tokenizer.eos_token_id, *scored], len(scored)
    before = tokenizer.encode(context)
    scored = tokenizer.encode(context + continuation)[len(before) :]
    return [*before, *scored][-(CONTEXT + 1) :], len(scored)


@torch.no_grad()
def slow(model, ids: list[int], count: int) -> tuple[float, bool]:
    """The sum of log p over the last `count` ids, and whether each is the likeliest: the whole text in one pass."""
    log_p = model(input_ids=torch.tensor([ids[:-1]])).logits[0].float().log_softmax(-1)[-count:]
    wanted = torch.tensor(ids[-count:])
    return float(log_p.gather(1, wanted[:, None]).sum()), bool((log_p.argmax(-1) == wanted).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_log_likelihoods_are_those_of_each_request_alone(load, family):
    model, tokenizer = load(family)
    found = Scorer(model, tokenizer, context_length=CONTEXT).run(ASKED)
    for request, response in zip(ASKED, found, strict=True):
        ids, count = ids_of(tokenizer, request.context, request.continuation)
        total, greedy = slow(model, ids, count)
        assert response.log_likelihood == pytest.approx(total, rel=2e-5, abs=1e-4)
        assert (response.tokens, response.greedy) == (count, greedy)


@torch.no_grad()
def test_greedy_says_that_each_token_is_the_likeliest_not_only_the_last(load):
    """Continuations of two tokens whose second is the likeliest, after the likeliest first one and after others."""
    model, tokenizer = load("llama")
    requests, expected = [], []
    for context in CONTEXTS[:3]:
        before = tokenizer.encode(context)
        first = int(model(input_ids=torch.tensor([before])).logits[0, -1].argmax())
        for token in {first, *range(3, 100)}:
            second = int(model(input_ids=torch.tensor([[*before, token]])).logits[0, -1].argmax())
            text = tokenizer.decode([token, second])
            if tokenizer.encode(context + text) == [*before, token, second]:
                requests.append(LogLikelihood(context, text))
                expected.append(token == first)
    found = [response.greedy for response in Scorer(model, tokenizer, context_length=CONTEXT).run(requests)]
    assert found == expected
    assert {*found} == {True, False}


def test_continuations_that_fit_one_by_one_are_scored_in_the_last_positions_of_a_model(load):
    model, tokenizer = load("gpt2")  # learned positions: there is none beyond the context
    assert model.config.n_positions == CONTEXT
    requests = [LogLikelihood(" a" * n, end) for n in (CONTEXT - 6, CONTEXT - 30) for end in CONTINUATIONS]
    for request, response in zip(requests, Scorer(model, tokenizer).run(requests), strict=True):
        ids, count = ids_of(tokenizer, request.context, request.continuation)
        assert len(ids) <= CONTEXT
        assert response.log_likelihood == pytest.approx(slow(model, ids, count)[0], rel=2e-5, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_shared_depends_on_the_model(load, family):
    forward = Scorer(*load(family), context_length=CONTEXT)._forward
    shares = {"llama", "gpt2", "cohere", "falcon"}
    assert forward.shares == (family in shares)
    assert forward.branches == (family in shares)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_mlp_is_computed_where_something_is_read(load, family, monkeypatch):
    model, tokenizer = load(family)
    forward = Scorer(model, tokenizer, context_length=CONTEXT)._forward
    assert (forward._mlp is None) == (family in {"bloom", "mamba"})  # bloom's adds the residual itself
    if forward._mlp is None:
        return
    seen, call = [], forward._mlp.forward
    monkeypatch.setattr(forward._mlp, "forward", lambda x: seen.append(tuple(x.shape[:2])) or call(x))
    rows = [
        Row(ids, len(ids), targets=[Target(len(ids) - 1, token, token) for token in (3, 4)])
        for ids in (tuple(range(5, 25)), tuple(range(7, 16)))
    ]
    with torch.no_grad():
        found = forward.hidden(rows)
        monkeypatch.setattr(forward, "_mlp", None)
        torch.testing.assert_close(found, forward.hidden(rows), rtol=1e-5, atol=1e-5)
    assert seen == [(1, 2), (2, 20)]


def test_an_mlp_that_looks_at_other_positions_is_computed_whole(load, monkeypatch):
    model, tokenizer = load("llama")
    mlp = model.model.layers[-1].mlp
    call = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda x: call(x + x.cumsum(1)))
    assert Scorer(model, tokenizer)._forward._mlp is None


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_batches_order_and_padding_side_change_nothing(load, batch_tokens):
    from copy import deepcopy

    model, tokenizer = load("llama")
    requests = [
        *ASKED,
        RollingLogLikelihood(SHOTS * 9),
        Generate(SHOTS, max_new_tokens=6),
        Generate("hello", ("e",), 9),
    ]
    expected = Scorer(model, tokenizer).run(requests)
    order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(batch_tokens)).tolist()
    other = deepcopy(tokenizer)
    other.padding_side = other.truncation_side = "left" if tokenizer.padding_side == "right" else "right"
    found = Scorer(model, other, batch_tokens=batch_tokens).run([requests[n] for n in order])
    for number, response in zip(order, found, strict=True):
        if isinstance(requests[number], Generate):
            assert response == expected[number]
        else:
            assert response.log_likelihood == pytest.approx(expected[number].log_likelihood, rel=2e-6)
            assert response.greedy == expected[number].greedy


def test_a_model_in_bfloat16_gives_its_own_precision(load):
    model, tokenizer = load("llama")
    expected = Scorer(model, tokenizer).run(ASKED)
    from copy import deepcopy

    rounded = deepcopy(model).bfloat16()
    for one, other in zip(expected, Scorer(rounded, tokenizer).run(ASKED), strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=0.02, abs=0.3)
        assert one.log_likelihood != other.log_likelihood


@pytest.mark.parametrize("length", [3, CONTEXT - 1, CONTEXT, CONTEXT + 1, 3 * CONTEXT + 17])
def test_rolling_windows_score_each_token_once_with_the_last_window_full(load, length):
    model, tokenizer = load("llama")
    text = ("abcdefghijklmnopqrstuvwxyz!?" * 40)[:length]
    ids = tokenizer.encode(text)
    expected = 0.0
    for start in range(0, len(ids), CONTEXT):
        end = min(start + CONTEXT, len(ids))
        window = [tokenizer.eos_token_id, *ids[:end]] if start == 0 else ids[end - CONTEXT - 1 : end]
        expected += slow(model, window, end - start)[0]
    (found,) = Scorer(model, tokenizer).run([RollingLogLikelihood(text)])
    assert found.tokens == len(ids)
    assert found.log_likelihood == pytest.approx(expected, rel=1e-5)


def test_an_empty_text_has_no_tokens(load):
    (found,) = Scorer(*load("llama")).run([RollingLogLikelihood("")])
    assert (found.log_likelihood, found.tokens) == (0.0, 0)


def test_a_tokenizer_that_merges_across_the_boundary(load):
    model, tokenizer = load("llama")
    (token,) = tokenizer.encode(" the")
    assert [token] != tokenizer.encode(" t") + tokenizer.encode("he")
    with pytest.raises(SFTError, match="no tokens of its own"):
        Scorer(model, tokenizer).run([LogLikelihood(" t", "he")])
    before, (the, user, asks) = tokenizer.encode(" t"), tokenizer.encode(" the user asks")
    assert before not in (
        [the],
        [the, user],
    )  # " the user" took their place: only " asks" is left, after " t"
    (found,) = Scorer(model, tokenizer).run([LogLikelihood(" t", "he user asks")])
    assert found.log_likelihood == pytest.approx(slow(model, [*before, asks], 1)[0], rel=1e-5)


def test_a_context_of_one_token(load):
    model, tokenizer = load("llama")
    (found,) = Scorer(model, tokenizer, context_length=1).run([LogLikelihood("hello there", "!")])
    last = tokenizer.encode("hello there")[-1]
    assert found.log_likelihood == pytest.approx(slow(model, [last, *tokenizer.encode("!")], 1)[0], rel=1e-5)
    with pytest.raises(SFTError, match="has 2 tokens, the model's context is 1"):
        Scorer(model, tokenizer, context_length=1).run([LogLikelihood("hello", "!!")])


@pytest.mark.parametrize("context", ["hello", ""])
def test_an_empty_continuation_is_refused(load, context):
    with pytest.raises(SFTError, match="continuation is empty"):
        Scorer(*load("llama")).run([LogLikelihood(context, "")])


@torch.no_grad()
def written(model, tokenizer, ids: list[int], new: int, stops: tuple[str, ...] = ()) -> str:
    """The greedy answer, the slow obvious way: no cache, no padding, all decoded after each token."""
    found: list[int] = []
    while len(found) < new:
        token = int(model(input_ids=torch.tensor([ids + found])).logits[0, -1].argmax())
        if token in (tokenizer.eos_token_id, model.generation_config.eos_token_id):
            break
        found.append(token)
        text = tokenizer.decode(found)
        if any(stop in text for stop in stops):
            return min((text.split(stop)[0] for stop in stops), key=len)
    return tokenizer.decode(found, skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_each_prompt_alone(load, family):
    model, tokenizer = load(family)
    prompts = ["hello", f"{SHOTS}hello there", f"{SHOTS}how are", f"{SHOTS}you", SHOTS * 6]
    found = Scorer(model, tokenizer, context_length=CONTEXT).run(
        [Generate(p, max_new_tokens=9) for p in prompts]
    )
    for prompt, answer in zip(prompts, found, strict=True):
        ids = tokenizer.encode(prompt)[-(CONTEXT - 9) :]
        assert answer.text == written(model, tokenizer, ids, 9)


def test_each_answer_stops_by_itself(load):
    model, tokenizer = load("llama")
    prompts = [f"{SHOTS}{word}" for word in ("hello", "there", "how", "are", "you")]
    whole = [written(model, tokenizer, tokenizer.encode(p), 12) for p in prompts]
    stop = whole[0][3:5]
    requests = [Generate(p, (stop,), 12) for p in prompts]
    found = Scorer(model, tokenizer).run(requests)
    for prompt, full, answer in zip(prompts, whole, found, strict=True):
        assert answer.text == written(model, tokenizer, tokenizer.encode(prompt), 12, (stop,))
        assert answer.text == full.split(stop)[0]
    assert found[0].tokens < 12


def test_keys_and_values_of_answers_keep_to_their_room(load, monkeypatch):
    model, tokenizer = load("llama")
    config = model.config
    token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    requests = [
        Generate(f"{SHOTS}{word}", max_new_tokens=9) for word in ("hello", "there", "how", "are", "you")
    ]
    longest = max(len(tokenizer.encode(each.prompt)) for each in requests)
    expected = Scorer(model, tokenizer).run(requests)
    taken = []
    make = Writer._cache
    monkeypatch.setattr(
        Writer,
        "_cache",
        lambda self, rows, room, *rest: taken.append((rows, room)) or make(self, rows, room, *rest),
    )
    monkeypatch.setattr(scorer, "_CACHE_BYTES", 2 * (longest + 9) * token)
    assert Scorer(model, tokenizer).run(requests) == expected
    assert [rows for rows, _ in taken] == [2, 2, 1]
    assert all(room <= longest + 9 for _, room in taken)


def test_no_room_for_a_prompt_is_refused(load):
    with pytest.raises(SFTError, match=f"max_new_tokens is {CONTEXT}"):
        Scorer(*load("llama")).run([Generate("hello", max_new_tokens=CONTEXT)])


def test_drawn_answers_depend_on_the_request_alone(load):
    model, tokenizer = load("llama")
    requests = [Generate(f"{SHOTS}{word}", max_new_tokens=8, temperature=2.0) for word in ("a", "b", "c")]
    together = Scorer(model, tokenizer).run(requests)
    assert [Scorer(model, tokenizer).run([each])[0] for each in requests] == together
    assert len({answer.text for answer in together}) == 3
    greedy = Scorer(model, tokenizer).run([Generate(requests[0].prompt, max_new_tokens=8)])
    assert greedy[0].text != together[0].text


def test_messages_are_rendered_with_the_chat_template(load):
    model, tokenizer = load("llama")
    messages = (Message("user", "hello"),)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    one, other = Scorer(model, tokenizer).run([LogLikelihood(messages, "you"), LogLikelihood(text, "you")])
    assert one.tokens == 1 + other.tokens or one == other


def test_items_come_back_with_their_responses(load):
    items = [
        Item("t", 0, (LogLikelihood("hello", " a"), LogLikelihood("hello", " there"))),
        Item("t", 1, (Generate("hello", max_new_tokens=3),)),
    ]
    scorer = Scorer(*load("llama"))
    first, second = scorer.answer(items)
    assert first.log_likelihoods == [each.log_likelihood for each in scorer.run(items[0].requests)]
    assert second.text == scorer.run(items[1].requests)[0].text
    assert first.likeliest == first.log_likelihoods.index(max(first.log_likelihoods))
    assert items[0].key != items[1].key


@pytest.mark.parametrize(
    ("family", "option"),
    [
        ("llama", {"repetition_penalty": 1.6}),
        ("llama", {"no_repeat_ngram_size": 2}),
        ("mamba", {"repetition_penalty": 1.6}),
    ],
)
def test_penalties_of_the_model_s_generation_configuration_count_as_in_generate(load, family, option):
    from copy import deepcopy

    model, tokenizer = load(family)
    model = deepcopy(model)
    prompts = [f"{SHOTS}{word}" for word in ("hello", "there", "how are")]
    requests = [Generate(prompt, max_new_tokens=9) for prompt in prompts]
    plain = [answer.text for answer in Scorer(model, tokenizer).run(requests)]
    model.generation_config.update(**option)
    found = [answer.text for answer in Scorer(model, tokenizer).run(requests)]
    assert found != plain
    for prompt, text in zip(prompts, found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        whole = model.generate(**ids, max_new_tokens=9, do_sample=False, pad_token_id=0)[0]
        assert text == tokenizer.decode(whole[ids.input_ids.shape[1] :], skip_special_tokens=True)


def test_an_answer_ends_before_the_first_stop_text_also_where_one_token_holds_two(load):
    model, tokenizer = load("llama")
    ids = tokenizer.encode("hello")
    writer = Writer(Forward(model), tokenizer, frozenset())
    for stops, text in ((("l",), "he"), (("lo", "e"), "h"), (("", "x"), "hello")):
        answer = writer._begun(0, Generate("a", stops), (1,))
        answer.ids += ids
        assert writer._finished(answer).text == text


@pytest.mark.parametrize("heat", [0.5, 2.0])
def test_tokens_are_drawn_by_their_probabilities_at_a_temperature(load, heat):
    model, tokenizer = load("llama")
    request, logits = Generate("a", temperature=heat), torch.tensor([[2.0, 0.0, 1.0, -1.0]])
    answer = Writer(Forward(model), tokenizer, frozenset())._begun(0, request, (1,))
    drawn = torch.tensor([_chosen(logits, [answer], [request])[0] for _ in range(4000)])
    shares = drawn.bincount(minlength=4) / 4000
    torch.testing.assert_close(shares, (logits[0] / heat).softmax(0), rtol=0, atol=0.03)
