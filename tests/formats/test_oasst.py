import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft import Message, Meta, SFTError
from lightning_sft_formats.oasst import OASST


def node(name, *replies, role=None, **fields):
    role = role or ("prompter" if name.startswith("p") else "assistant")
    return {"message_id": name, "text": name, "role": role, "replies": list(replies), **fields}


def tree(root):
    return {"message_tree_id": root["message_id"], "tree_state": "ready_for_export", "prompt": root}


def paths(root, **options):
    """The paths as texts, an answer that isn't trained in brackets."""
    return [
        " ".join(f"({m.content})" if m.weight == 0 else m.content for m in conversation.messages)
        for conversation in OASST(**options).convert(tree(root))
    ]


def flat(root):
    """The rows of a file with a message per row."""
    rows, todo = [], [(root, None)]
    while todo:
        message, parent = todo.pop()
        row = {key: value for key, value in message.items() if key != "replies"}
        rows.append(row | {"parent_id": parent, "message_tree_id": root["message_id"], "user_id": "u"})
        todo.extend((reply, message["message_id"]) for reply in message["replies"])
    return rows


EXAMPLE = node(
    "p0",
    node("a1", node("p2", node("a3", rank=1), node("a4", rank=0)), node("p5"), rank=1, lang="en"),
    node("a6", rank=0, lang="de"),
    node("a7", node("p8", node("a9")), rank=2),
)


def test_paths_end_at_the_last_answers_and_the_best_ranked_come_first():
    assert paths(EXAMPLE) == ["p0 a6", "p0 a1 p2 a4", "p0 (a1) p2 a3", "p0 a7 p8 a9"]


def test_a_conversation_has_roles_default_weights_and_the_language_of_its_end():
    first, second, *_ = OASST().convert(tree(EXAMPLE))
    assert first.messages == (Message("user", "p0"), Message("assistant", "a6"))
    assert (first.meta.language, second.meta.language) == ("de", None)


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [
        (1, ["p0 a6"]),
        (2, ["p0 a6", "p0 a1 p2 a4", "p0 (a1) p2 a3"]),
        (3, ["p0 a6", "p0 a1 p2 a4", "p0 (a1) p2 a3", "p0 a7 p8 a9"]),
    ],
)
def test_answers_by_rank(top_k, expected):
    assert paths(EXAMPLE, top_k=top_k) == expected


def test_an_answer_without_a_rank_counts_only_where_it_is_alone():
    assert paths(node("p", node("a")), top_k=1) == ["p a"]
    assert paths(node("p", node("a"), node("a2")), top_k=1) == []
    assert paths(node("p", node("a"), node("a2", rank=0)), top_k=1) == ["p a2"]
    assert paths(node("p", node("a"), node("a2", rank=5.0))) == ["p a2", "p a"]


def test_depths():
    assert paths(EXAMPLE, max_depth=2) == ["p0 a6", "p0 a1", "p0 a7"]
    assert paths(EXAMPLE, max_depth=3) == ["p0 a6", "p0 a1", "p0 a7"]
    assert paths(EXAMPLE, min_depth=3) == ["p0 a1 p2 a4", "p0 (a1) p2 a3", "p0 a7 p8 a9"]
    assert paths(EXAMPLE, min_depth=5) == []


def test_languages():
    root = node("p", node("a", lang="en"), node("a2", lang="de"), lang="en")
    assert paths(root, languages=["en"]) == ["p a"]
    assert paths(root, languages=["en", "de"]) == ["p a", "p a2"]
    assert paths(root, languages=["fr"]) == []


@pytest.mark.parametrize("fields", [{"deleted": True}, {"review_result": False}, {"synthetic": True}])
def test_refused_messages_go_with_all_replies(fields):
    root = node("p", node("a", node("p2", node("a2"))), node("a3"))
    for message, expected in (
        (root, []),
        (root["replies"][0], ["p a3"]),
        (root["replies"][0]["replies"][0], ["p a", "p a3"]),
    ):
        message.update(fields)
        assert paths(root) == expected
        for key in fields:
            del message[key]
    assert paths(root) == ["p a p2 a2", "p a3"]


def test_messages_of_models_are_kept_if_asked_for():
    assert paths(node("p", node("a", synthetic=True)), synthetic=True) == ["p a"]


@st.composite
def trees(draw):
    names = iter(range(10**6))

    def grow(role, depth):
        count = draw(st.integers(0, 3)) if depth < 5 else 0
        other = "assistant" if role == "prompter" else "prompter"
        fields = {"rank": draw(st.sampled_from([None, 0, 1, 2]))}
        if draw(st.integers(0, 5)) == 0:
            fields[draw(st.sampled_from(["deleted", "synthetic"]))] = True
        fields["lang"] = draw(st.sampled_from(["en", "en", "de"]))
        name = f"m{next(names)}"
        return node(name, *(grow(other, depth + 1) for _ in range(count)), role=role, **fields)

    return grow("prompter", 1)


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "top_k": st.integers(1, 2),
        "languages": st.just(["en"]),
        "max_depth": st.integers(2, 5),
        "min_depth": st.integers(1, 4),
        "synthetic": st.booleans(),
    },
)


def reachable(message, options, depth=1):
    """Every answer that may be trained, by the slow obvious way: with the depth of its deepest continuation."""
    bad = message.get("deleted") or (message.get("synthetic") and not options.get("synthetic"))
    if (
        bad
        or message["lang"] not in options.get("languages", ["en", "de"])
        or depth > options.get("max_depth", 99)
    ):
        return {}
    found = {}
    for reply in message["replies"]:
        if message["role"] == "prompter" and "top_k" in options:
            rank = reply["rank"]
            if not (len(message["replies"]) == 1 if rank is None else rank < options["top_k"]):
                continue
        found |= reachable(reply, options, depth + 1)
    if message["role"] == "assistant":
        found[message["message_id"]] = max([depth, *found.values()])
    return found


@given(trees(), OPTIONS)
def test_every_answer_is_trained_in_exactly_one_path(root, options):
    conversations = list(OASST(**options).convert(tree(root)))
    trained = [
        m.content for c in conversations for m in c.messages if m.role == "assistant" and m.weight is None
    ]
    least = options.get("min_depth", 2)
    assert len(trained) == len(set(trained))
    assert set(trained) == {name for name, deepest in reachable(root, options).items() if deepest >= least}
    parents = {row["message_id"]: row["parent_id"] for row in flat(root)}
    for conversation in conversations:
        names = [m.content for m in conversation.messages]
        assert [parents[name] for name in names] == [None, *names[:-1]]
        assert any(m.weight is None for m in conversation.messages if m.role == "assistant")
        assert conversation.messages[-1].role == "assistant"
        assert least <= len(names) <= options.get("max_depth", 99)


@given(st.lists(trees(), min_size=1, max_size=3), st.randoms(), OPTIONS)
def test_a_message_per_row_in_any_order_gives_what_the_trees_give(roots, random, options):
    for number, root in enumerate(roots):
        rename(root, f"t{number}-")
    rows = [row for root in roots for row in flat(root)]
    random.shuffle(rows)
    format = OASST(**options)
    gathered = list(format.gather((Meta("file", n), row) for n, row in enumerate(rows, 1)))
    assert [rows[meta.row - 1]["parent_id"] for meta, _ in gathered] == [None] * len(roots)
    found = {row["prompt"]["message_id"]: trained_counts(format.convert(row)) for _, row in gathered}
    assert found == {root["message_id"]: trained_counts(format.convert(tree(root))) for root in roots}


def rename(message, prefix):
    message["message_id"] = message["text"] = prefix + message["text"]
    for reply in message["replies"]:
        rename(reply, prefix)


def trained_counts(conversations):
    """What doesn't depend on the order of replies with the same rank."""
    return sorted(
        (m.content, m.weight is None) for c in conversations for m in c.messages if m.role == "assistant"
    )


def gather(*rows):
    return list(OASST().gather([(Meta("f", n), row) for n, row in enumerate(rows, 1)]))


def message(name, parent, role="prompter", **fields):
    return {"message_id": name, "parent_id": parent, "text": name, "role": role, **fields}


def test_a_tree_has_the_place_of_its_root():
    gathered = gather(message("b", "a", "assistant"), message("c", None), message("a", None))
    assert [(meta, row["prompt"]["message_id"]) for meta, row in gathered] == [
        (Meta("f", 2), "c"),
        (Meta("f", 3), "a"),
    ]


@pytest.mark.parametrize(
    ("rows", "what", "where"),
    [
        ([message("a", None), message("b", "x")], "parent 'x'", "f, row 2, key 'parent_id'"),
        ([message("a", None), message("a", None)], "'a' is there twice", "f, row 1 and f, row 2"),
        ([message("a", "b"), message("b", "a", "assistant"), message("c", None)], "2 messages.*circle", None),
        ([message(None, None)], "id is empty", "f, row 1, key 'message_id'"),
    ],
)
def test_messages_that_make_no_tree_are_refused(rows, what, where):
    with pytest.raises(SFTError, match=what) as error:
        gather(*rows)
    assert error.value.where == where


@pytest.mark.parametrize(
    ("root", "what"),
    [
        (node("a"), "doesn't begin with a prompter"),
        (node("p", node("p2")), "of the same role"),
        (node("p", node("a", role="bot")), "unknown role 'bot'"),
        (node("p", node("a", rank="best")), "the rank is 'best'"),
        (node("p", node("a", text="")), "the response is empty"),
        (node("p", node("a", text=None)), "the response is empty"),
        (node("p", "a"), "expected a JSON object"),
    ],
)
def test_malformed_trees_are_refused_with_the_message(root, what):
    with pytest.raises(SFTError, match=what) as error:
        paths(root)
    assert error.value.where.startswith("message '")


def test_a_row_that_is_neither_is_refused():
    with pytest.raises(SFTError, match="neither a message"):
        list(OASST().convert({"text": "a"}))


@pytest.mark.parametrize("options", [{"top_k": 0}, {"min_depth": 0}, {"max_depth": 1}])
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(SFTError, match=f"{next(iter(options))} is"):
        OASST(**options)


def test_a_very_long_thread_is_no_trouble():
    rows = [
        message(f"m{n}", f"m{n - 1}" if n else None, ("prompter", "assistant")[n % 2], lang="en")
        for n in range(3000)
    ]
    ((_, row),) = gather(*rows)
    (conversation,) = OASST().convert(row)
    assert len(conversation.messages) == 3000
