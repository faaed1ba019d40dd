"""A judge behind an endpoint that misbehaves; verdicts, win rates and agreement by hand or by the slow way."""

from __future__ import annotations

import json
import math
import re
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import numpy as np
import pytest
import torch
from stub_endpoint import StubEndpoint

from lightning_sft import Answered, Converse, Conversed, Generate, Generated, Message, SFTError
from lightning_sft_evaluators import endpoint as endpoint_module
from lightning_sft_evaluators.endpoint import Asker, Endpoint
from lightning_sft_evaluators.judge import Judge
from lightning_sft_evaluators.verdicts import choice_in, kappa, length_controlled, rating_in

KEY = "a-secret-of-the-test"


def prefer_good(prompt: str) -> str:
    """The answer that is good wins; [[C]] if both are or none is."""
    first, second = re.findall(r"<answer_.>\n(.*?)\n</answer", prompt, re.DOTALL)
    better = {(True, False): "A", (False, True): "B"}.get(("good" in first, "good" in second), "C")
    return f"I don't say [[B]] lightly. [[{better}]]"


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("STUB_KEY", KEY)
    with StubEndpoint(prefer_good).serving() as stub:
        yield stub


@pytest.fixture
def waits(monkeypatch):
    """Seconds that were waited; none of them passes."""
    found: list[float] = []
    now = [0.0]

    def sleep(asker: Asker, seconds: float) -> bool:
        found.append(seconds)
        now[0] += seconds
        return False

    class Time:
        monotonic = staticmethod(lambda: now[0])

    monkeypatch.setattr(endpoint_module, "time", Time)
    monkeypatch.setattr(Asker, "_sleep", sleep)
    return found


def options(stub, tmp_path, **more) -> Endpoint:
    given = {"api_key_env": "STUB_KEY", "concurrency": 1, "timeout": 5.0, "cache": str(tmp_path / "cache")}
    return Endpoint(stub.url, "judge-1", **{**given, **more})


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ------------------------------------------------------------------------------------------------- the endpoint


def test_a_request_is_that_of_the_chat_completions_api(stub, tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_KEY", f"{KEY}\n")  # as from a file
    stub.judge = lambda prompt: f"reply to {prompt}"
    replies = Asker(options(stub, tmp_path, max_tokens=9), "Judge").ask(["one", "two", "one"])
    assert [reply.text for reply in replies] == ["reply to one", "reply to two", "reply to one"]
    assert len(stub.bodies) == 2
    assert stub.bodies[0] == {
        "model": "judge-1",
        "messages": [{"role": "user", "content": "one"}],
        "temperature": 0.0,
        "max_tokens": 9,
    }
    assert stub.headers[0]["path"] == "/v1/chat/completions"
    assert stub.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_fields_of_the_request_can_be_added_and_taken_out(stub, tmp_path):
    stub.judge = lambda prompt: "fine"
    Asker(options(stub, tmp_path), "Judge").ask(["one"])
    body = {"max_tokens": None, "max_completion_tokens": 9, "temperature": None}
    Asker(options(stub, tmp_path, body=body), "Judge").ask(["one"])  # another request, so not from the cache
    assert stub.bodies[1] == {
        "model": "judge-1",
        "messages": [{"role": "user", "content": "one"}],
        "max_completion_tokens": 9,
    }


def test_it_is_asked_again_after_any_misbehaviour(stub, tmp_path, waits):
    stub.judge = lambda prompt: "fine"
    stub.script = [500, b"{malformed", b'{"choices": []}', "cut", 503]
    (reply,) = Asker(options(stub, tmp_path, backoff=0.5), "Judge").ask(["one"])
    assert reply.text == "fine"
    assert len(stub.bodies) == 6
    assert waits == pytest.approx([0.5, 1, 2, 4, 8])


def test_retry_after_is_honoured(stub, tmp_path, waits):
    stub.judge = lambda prompt: "fine"
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    stub.script = [(429, {"Retry-After": "7"}), (429, {"Retry-After": date}), (429, {"Retry-After": "soon"})]
    (reply,) = Asker(options(stub, tmp_path), "Judge").ask(["one"])
    assert reply.text == "fine"
    assert waits[0] == 7
    assert 50 < waits[1] <= 60
    assert waits[2] == 4  # 1 s of backoff, doubled twice


def test_a_wait_of_hours_is_a_failure(stub, tmp_path, waits):
    stub.script = [(429, {"Retry-After": "7200"})]
    (reply,) = Asker(options(stub, tmp_path), "Judge").ask(["one"])
    assert (reply.text, reply.failure, waits) == (None, "status 429, 1 attempts", [])


def test_a_timeout_is_a_failure_like_others(stub, tmp_path, waits):
    stub.judge = lambda prompt: "fine"
    stub.script = ["slow"]
    (reply,) = Asker(options(stub, tmp_path, timeout=0.2), "Judge").ask(["one"])
    assert (reply.text, waits) == ("fine", [1.0])
    stub.script = ["slow"] * 2
    (reply,) = Asker(options(stub, tmp_path, timeout=0.2, retries=1), "Judge").ask(["two"])
    assert (reply.text, reply.failure) == (None, "ReadTimeout, 2 attempts")


def test_requests_keep_to_the_rate(stub, tmp_path, waits):
    Asker(options(stub, tmp_path, requests_per_minute=30), "Judge").estimate(["a"])
    stub.judge = lambda prompt: "fine"
    Asker(options(stub, tmp_path, requests_per_minute=30), "Judge").ask(["a", "b", "c"])
    assert waits == pytest.approx([2, 2])


def test_replies_are_kept_by_request_and_the_key_is_nowhere(stub, tmp_path, capsys):
    stub.judge = lambda prompt: "fine"
    Asker(options(stub, tmp_path), "Judge").ask(["one"])
    Asker(options(stub, tmp_path), "Judge").ask(["one"])
    assert len(stub.bodies) == 1
    for other in (
        {"model": "judge-2"},
        {"temperature": 0.5},
        {"max_tokens": 3},
        {"base_url": f"{stub.url}/"},
    ):
        given = options(stub, tmp_path)
        for name, value in other.items():
            setattr(given, name, value)
        Asker(given, "Judge").ask(["one"])
    assert len(stub.bodies) == 5
    Asker(options(stub, tmp_path, cache=None), "Judge").ask(["one"])
    assert len(stub.bodies) == 6
    kept = [path.read_text() for path in (tmp_path / "cache").rglob("*.json")]
    assert len(kept) == 5
    assert not any(KEY in text for text in kept)
    assert KEY not in capsys.readouterr().out


def test_a_damaged_file_of_the_cache_is_asked_again(stub, tmp_path):
    stub.judge = lambda prompt: "fine"
    Asker(options(stub, tmp_path), "Judge").ask(["one"])
    (path,) = (tmp_path / "cache").rglob("*.json")
    path.write_text("{")
    assert Asker(options(stub, tmp_path), "Judge").ask(["one"])[0].text == "fine"


@pytest.mark.parametrize(("status", "times"), [(401, 1), (403, 1), (404, 1), (400, 3), (413, 3), (422, 3)])
def test_a_refusal_ends_it_without_the_key(stub, tmp_path, status, times):
    stub.judge = lambda prompt: "fine"
    stub.script = [status] * times
    with pytest.raises(SFTError, match=f"refuses the request: status {status}: no, Bearer …") as error:
        Asker(options(stub, tmp_path), "Judge").ask([f"prompt {n}" for n in range(9)])
    assert KEY not in str(error.value)
    assert times <= len(stub.bodies) <= times + 1


def test_a_prompt_that_is_refused_by_itself_is_one_without_a_reply(stub, tmp_path):
    stub.judge = lambda prompt: "fine"
    stub.script = [400, 413, None, 422, 400, 400]
    prompts = [f"prompt {n}" for n in range(7)]
    for _ in range(2):
        replies = Asker(options(stub, tmp_path), "Judge").ask(prompts)
        assert [reply.text for reply in replies] == [None, None, "fine", None, None, None, "fine"]
        assert replies[0].failure == "status 400: no, Bearer …"
        assert KEY not in repr(replies)
        stub.script = [400, 400, 400, 400, 400]  # what was answered is in the cache


def test_the_cost_is_told_and_capped_before_anything_is_sent(stub, tmp_path, capsys):
    prices = {"price_input": 2.0, "price_output": 8.0, "max_tokens": 100_000}
    prompts = ["a" * 400_000, "b" * 400_000]
    with pytest.raises(SFTError, match=r"may cost 2\.00, max_cost is 1\.00"):
        Asker(options(stub, tmp_path, max_cost=1.0, **prices), "Judge").ask(prompts)
    assert stub.bodies == []
    assert "2 requests to send (0 in the cache), about 200,000 tokens" in capsys.readouterr().out
    stub.judge = lambda prompt: "fine"
    Asker(options(stub, tmp_path, max_cost=2.0, **prices), "Judge").ask(prompts)
    assert Asker(options(stub, tmp_path, **prices), "Judge").estimate(prompts).cost == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"base_url": "localhost"}, "base_url is 'localhost'"),
        ({"base_url": "http://"}, "base_url is 'http://'"),
        ({"base_url": "http://localhost:port/v1"}, "base_url is 'http://localhost:port/v1'"),
        ({"api_key_env": "NOT_THERE"}, "NOT_THERE is not set"),
        ({"api_key_env": "NO_KEY"}, "NO_KEY holds no key"),
        ({"max_cost": 1.0}, "max_cost needs prices"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"requests_per_minute": 0}, "it is 0"),
    ],
)
def test_wrong_options_are_refused_before_the_model_is_asked(tmp_path, monkeypatch, given, message):
    monkeypatch.delenv("NOT_THERE", raising=False)
    monkeypatch.setenv("NO_KEY", "clé\n")
    questions = write(tmp_path / "q.jsonl", [{"instruction": "a"}])
    made = Endpoint(**{"base_url": "http://x", "model": "m", "api_key_env": None, **given})
    with pytest.raises(SFTError, match=message):
        Judge(questions, made).requests()
    assert [each.text for each in Judge(questions, made).texts()] == ["a"]  # nobody is asked for that


def test_an_interrupt_ends_the_waiting_of_all_requests(stub, tmp_path, monkeypatch):
    def send(asker, client, prompt):
        if prompt == "stop":
            raise KeyboardInterrupt
        raise endpoint_module._Failed("busy", wait=30.0)

    monkeypatch.setattr(Asker, "_send", send)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Asker(options(stub, tmp_path, concurrency=2), "Judge").ask(["stop", "one", "two"])
    assert time.monotonic() - begun < 15


# --------------------------------------------------------------------------------------------------- pairwise

QUESTIONS = [{"instruction": f"question {n}", "category": "odd" if n % 2 else "even"} for n in range(4)]


def answered(judge, texts):
    return [Answered(item, (Generated(text, 1),)) for item, text in zip(judge.requests(), texts, strict=True)]


@pytest.fixture
def pairwise(stub, tmp_path):
    questions = write(tmp_path / "q.jsonl", QUESTIONS)
    outputs = [
        {"instruction": f"question {n}", "output": text} for n, text in enumerate(["x", "good", "good", "x"])
    ]
    return Judge(questions, options(stub, tmp_path), baseline=write(tmp_path / "b.jsonl", outputs))  # fmt: skip


def values(results):
    return {(each.name, each.metric): each.value for each in results.scores}


def test_win_rates_by_hand(pairwise, stub):
    results = pairwise.score(answered(pairwise, ["good", "x", "good one", "x"]))
    assert [each.answer for each in results.records] == [
        "model (A B)",
        "baseline (B A)",
        "tie (C C)",
        "tie (C C)",
    ]
    found = values(results)
    assert found["judge", "win_rate"] == 0.5
    assert found["judge", "position_consistency"] == 1.0
    assert found["judge/even", "win_rate"] == 0.75
    assert results.notes == ()
    assert len(stub.bodies) == 7  # of two equal answers once
    swapped = [
        re.findall(r"<answer_.>\n(.*?)\n</", body["messages"][0]["content"]) for body in stub.bodies[:2]
    ]
    assert swapped == [["good", "x"], ["x", "good"]]


def test_a_judge_that_likes_the_first_answer_is_found_out(pairwise, stub):
    stub.judge = lambda prompt: "[[A]]"
    found = values(pairwise.score(answered(pairwise, ["good"] * 4)))
    assert (found["judge", "win_rate"], found["judge", "position_consistency"]) == (0.5, 0.0)


def test_the_bases_answers_take_the_files_place(stub, tmp_path):
    judge = Judge(write(tmp_path / "q.jsonl", QUESTIONS), options(stub, tmp_path))
    assert judge.needs_base
    mine, base = answered(judge, ["good"] * 4), answered(judge, ["x", "x", "x", "good"])
    assert values(judge.score_beside(mine, base))["judge", "win_rate"] == (3 + 0.5) / 4


def test_records_of_an_evaluation_are_answers_too(stub, tmp_path):
    records = [{"task": "judge", "number": n, "generated": "x"} for n in range(4)]
    questions = write(tmp_path / "q.jsonl", QUESTIONS)
    judge = Judge(questions, options(stub, tmp_path), baseline=write(tmp_path / "r.jsonl", records))
    assert values(judge.score(answered(judge, ["good"] * 4)))["judge", "win_rate"] == 1.0
    missing = Judge(questions, options(stub, tmp_path), baseline=write(tmp_path / "s.jsonl", records[:3]))
    with pytest.raises(SFTError, match=r"no answer to 'question 3' \(.*q\.jsonl, row 4\)"):
        missing.requests()


def test_verdicts_that_cannot_be_read_are_counted_and_listed(pairwise, stub, capsys):
    stub.judge = lambda prompt: "Both are nice." if "question 2" in prompt else prefer_good(prompt)
    mine = answered(pairwise, ["good", "x", "good", "x"])
    with pytest.raises(SFTError, match=r"1 of 4 items have no verdict.*even 2 \(ends in 'Both are nice\.'\)"):
        pairwise.score(mine)
    pairwise.max_unjudged = 0.25
    results = pairwise.score(mine)
    assert results.notes == (
        "1 of 4 items have no verdict that can be read: even 2 (ends in 'Both are nice.')",
    )
    assert [each.answer for each in results.records][2] == "unreadable"
    assert {each.metric: each.items for each in results.scores}["position_consistency"] == 3
    assert values(results)["judge", "win_rate"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert len(stub.bodies) == 6  # the second time all came from the cache


def test_a_judge_that_never_answers_is_an_error(pairwise, stub, waits):
    pairwise.max_unjudged = 1.0
    stub.script = [500] * 100
    with pytest.raises(SFTError, match=r"4 of 4 items .*status 500, 6 attempts"):
        pairwise.score(answered(pairwise, ["good"] * 4))


def test_another_prompt_can_be_given(stub, tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ instruction }}|{{ first }}|{{ second }}")
    stub.judge = lambda prompt: "[[A]]" if prompt.split("|")[1] == "good" else "[[B]]"
    questions = write(tmp_path / "q.jsonl", QUESTIONS)
    judge = Judge(questions, options(stub, tmp_path), prompt=str(tmp_path / "mine.jinja"))
    mine = answered(judge, ["good"] * 4)
    assert values(judge.score_beside(mine, answered(judge, ["x"] * 4)))["judge", "win_rate"] == 1.0
    assert stub.bodies[0]["messages"][0]["content"] == "question 0|good|x"
    (tmp_path / "mine.jinja").write_text("{{ nothing }}")
    with pytest.raises(SFTError, match="'nothing' is undefined"):
        Judge(questions, options(stub, tmp_path), prompt=str(tmp_path / "mine.jinja")).score_beside(
            mine, mine
        )
    with pytest.raises(SFTError, match=r"gone\.jinja"):
        Judge(questions, options(stub, tmp_path), prompt=str(tmp_path / "gone.jinja"))


def test_agreement_with_humans(stub, tmp_path):
    human = ["model", "baseline", "model", None]
    rows = [{**row, "human": each} for row, each in zip(QUESTIONS, human, strict=True)]
    judge = Judge(write(tmp_path / "q.jsonl", rows), options(stub, tmp_path))
    results = judge.score_beside(
        answered(judge, ["good", "x", "x", "x"]), answered(judge, ["x", "good", "good", "x"])
    )
    # model/model, baseline/baseline, baseline/model: 2 of 3 agree; by chance 1/3·2/3 + 2/3·1/3
    expected = (2 / 3 - 4 / 9) / (1 - 4 / 9)
    assert values(results)["judge", "cohen_kappa"] == pytest.approx(expected)
    rows[0]["human"] = "yes"
    with pytest.raises(SFTError, match=r"row 1: `human` is 'yes'"):
        Judge(write(tmp_path / "q.jsonl", rows), options(stub, tmp_path)).requests()


# ----------------------------------------------------------------------------------------------------- single

BENCH = [
    {"turns": ["Tell.", "More."], "category": "writing", "human": [8, 2]},
    {"turns": ["2 + 2?", "And 1?"], "category": "math", "reference": ["4", "5"], "human": [6, 4]},
]


def rate(prompt: str) -> str:
    """The number in the last answer."""
    return f"[[{re.findall(r'<assistant>(.*?)</assistant>', prompt, re.DOTALL)[-1].strip()}]]"


@pytest.fixture
def single(stub, tmp_path):
    stub.judge = rate
    return Judge(write(tmp_path / "q.jsonl", BENCH), options(stub, tmp_path), style="single")


def conversed(judge, texts):
    items = judge.requests()
    return [
        Answered(item, (Conversed(tuple(Generated(text, 1) for text in each)),))
        for item, each in zip(items, texts, strict=True)
    ]


def test_ratings_by_turn_and_category(single, stub):
    assert [item.requests[0].temperature for item in single.requests()] == [0.7, 0.0]
    results = single.score(conversed(single, [("8", "4"), ("6", "3.5")]))
    found = values(results)
    assert found["judge", "rating"] == pytest.approx((8 + 4 + 6 + 3.5) / 4)
    assert (found["judge", "rating_turn_1"], found["judge", "rating_turn_2"]) == (7, 3.75)
    assert found["judge/math", "rating"] == 4.75
    assert [each.answer for each in results.records] == ["8 4", "6 3.5"]
    assert results.records[0].generated == "8"
    prompts = [body["messages"][0]["content"] for body in stub.bodies]
    assert "More." not in prompts[0]
    assert "Tell." in prompts[1]
    assert "<reference>\n5\n</reference>" in prompts[3]
    assert "<reference>" not in prompts[0]


def test_ratings_agree_with_humans_by_the_square_of_their_distance(single):
    found = values(single.score(conversed(single, [("8", "4"), ("6", "4")])))
    judge, human = np.array([8, 4, 6, 4]), np.array([8, 2, 6, 4])
    expected = 1 - ((judge - human) ** 2).mean() / ((judge[:, None] - human[None]) ** 2).mean()
    assert found["judge", "cohen_kappa"] == pytest.approx(expected)


def test_a_rating_out_of_range_is_none(single, stub):
    single.max_unjudged = 0.5
    results = single.score(conversed(single, [("8", "11"), ("6", "4")]))
    assert values(results)["judge", "rating"] == 5
    assert "1 of 2 items have no verdict that can be read: writing 0" in results.notes[0]


# ---------------------------------------------------------------------------------------------------- verdicts


def test_the_last_verdict_counts():
    assert choice_in("not [[A]] but [[B]].") == "B"
    assert choice_in("[A] [[D]]") is None
    assert rating_in("[[3]] no: [[7.5]]") == 7.5
    assert [rating_in(text) for text in ("[[0]]", "[[11]]", "7", "")] == [None] * 4


def test_length_control_is_the_fit_that_another_optimizer_finds():
    draw = np.random.default_rng(0)
    lengths = [(int(a), int(b)) for a, b in draw.integers(10, 900, size=(200, 2))]
    difference = np.array([a - b for a, b in lengths])
    chance = 1 / (1 + np.exp(-(0.4 + 1.5 * np.tanh(difference / difference.std()))))
    wins = [float(each) for each in draw.random(200) < chance]
    score = length_controlled("x", wins, lengths)
    features = torch.tensor(np.tanh(difference / difference.std()))
    fitted = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([fitted], max_iter=200, tolerance_grad=1e-10)

    def loss():
        optimizer.zero_grad()
        logits = fitted[0] + fitted[1] * features
        value = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, torch.tensor(wins, dtype=torch.float64), reduction="sum"
        )
        value = value + 0.005 * (fitted**2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    assert score.value == pytest.approx(torch.sigmoid(fitted[0]).item(), abs=1e-6)
    assert score.value == pytest.approx(1 / (1 + math.exp(-0.4)), abs=2.5 * score.stderr)
    assert 0.02 < score.stderr < 0.06


def test_winning_by_length_alone_is_no_winning():
    draw = np.random.default_rng(1)
    lengths = [
        (int(a), int(b))
        for a, b in zip(draw.integers(300, 900, 300), draw.integers(10, 600, 300), strict=True)
    ]
    difference = np.array([a - b for a, b in lengths])
    wins = [
        float(each)
        for each in draw.random(300) < 1 / (1 + np.exp(-2 * np.tanh(difference / difference.std())))
    ]
    score = length_controlled("x", wins, lengths)
    assert np.mean(wins) > 0.7
    assert score.value == pytest.approx(0.5, abs=2 * score.stderr)
    assert score.stderr < 0.1


@pytest.mark.parametrize(("wins", "expected"), [([1.0] * 30, 1.0), ([0.0] * 30, 0.0), ([0.5] * 30, 0.5)])
def test_length_control_of_equal_lengths_is_the_win_rate(wins, expected):
    assert length_controlled("x", wins, [(50, 50)] * 30).value == pytest.approx(expected, abs=0.01)


def test_kappa_of_full_agreement_is_one():
    assert kappa("x", [(1, 1), (1, 1)], 3, ordered=False).value == 1.0
    assert kappa("x", [(0, 0), (1, 1)], 3, ordered=False).value == 1.0


# ------------------------------------------------------------------------------------------------ conversations


def test_each_turn_is_asked_with_what_was_answered_before(model_folder):
    from lightning_sft import Scorer, SFTModule

    module = SFTModule(base=str(model_folder("llama")))
    module.configure_model()
    scorer = Scorer.of(module)
    long = Converse(("how are you?", "hello", "the user"), "Be good.", max_new_tokens=5)
    short = Converse(("hello",), max_new_tokens=4)
    (first, second) = scorer.run([long, short])
    said = [Message("system", "Be good.")]
    for turn, found in zip(long.turns, first.answers, strict=True):
        said.append(Message("user", turn))
        (alone,) = scorer.run([Generate(tuple(said), max_new_tokens=5)])
        assert alone == found
        said.append(Message("assistant", alone.text))
    assert second.answers == tuple(scorer.run([Generate((Message("user", "hello"),), max_new_tokens=4)]))


def test_conversations_come_back_from_the_journal(tmp_path):
    from lightning_sft import Item
    from lightning_sft.evaluation.journal import Journal

    item = Item("a", 0, (Converse(("x", "y")), Generate("z")))
    responses = (Conversed((Generated("1", 2), Generated("3", 4))), Generated("", 0))
    journal = Journal(tmp_path, {"weights": 1})
    list(journal.write([(0, Answered(item, responses))]))
    assert journal.known() == {item.key: responses}
