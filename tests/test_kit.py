"""Each law of the conformance kit catches what breaks it, and says what."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from itertools import count
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch.nn.functional import cross_entropy

from lightning_sft import (
    Adapter,
    Conversation,
    DataFormat,
    Filter,
    Loss,
    Message,
    SetFilter,
    SFTError,
    Verdict,
    turns,
)
from lightning_sft.testing import (
    AdapterTests,
    CallbackTests,
    FilterTests,
    FormatTests,
    LossTests,
    MissingSample,
    PluginTests,
    adapters,
    filters,
    formats,
    losses,
)
from lightning_sft.testing.plugin import check_base, check_config, check_entry_point, check_options

calls = count()


class Good(DataFormat):
    """Rows with a question and an answer."""

    def matches(self, columns):
        return {"q", "a"} <= columns

    def convert(self, row):
        texts = [row.get(column) for column in "qa"]
        for column, text in zip("qa", texts, strict=True):
            if not isinstance(text, str):
                raise SFTError("no text", where=f"key {column!r}")
        return [Conversation((Message("user", texts[0]), Message("assistant", texts[1])))]

    def to_row(self, item):
        return dict(zip("qa", (message.content for message in item.messages), strict=True))


ROWS = ({"q": "Why?", "a": "So."}, {"q": "When?", "a": "Now."})


def variant(base: type, **methods: object) -> type:
    return type("Variant", (base,), {"__doc__": "A variant.", **methods})


def remembers(self, row):
    self.seen = getattr(self, "seen", 0) + 1
    return [Conversation((Message("user", f"{self.seen}"),))]


def empties(self, row):
    row.clear()
    return []


def test_a_good_format_passes() -> None:
    class Tests(FormatTests):
        plugin, rows, bad_rows = Good, ROWS, ({"q": 1, "a": "So."},)

    tests = Tests()
    for name in dir(tests):
        if name.startswith("test_") and "short_name" not in name and "config" not in name:
            getattr(tests, name)()


@pytest.mark.parametrize(
    ("check", "methods", "problem"),
    [
        (formats.check_items, {"convert": lambda self, row: []}, "makes nothing of its rows"),
        (formats.check_items, {"convert": lambda self, row: [dict(row)]}, "gives a dict, not a Conversation"),
        (formats.check_items, {"convert": lambda self, row: [Conversation((Message("bot"),))]}, "the role 'bot'"),
        (formats.check_items, {"convert": lambda self, row: [Conversation([Message("user")])]}, "are no tuple"),
        (formats.check_items, {"convert": lambda self, row: [Conversation((Message("user", 3),))]}, "3 as a text"),
        (formats.check_detection, {"matches": lambda self, columns: columns & {"q"}}, "matches answers frozenset"),
        (formats.check_detection, {"fits": lambda self, row: row.get("q")}, "fits answers"),
        (formats.check_odd_rows, {"convert": lambda self, row: [row["q"]]}, "fails with KeyError: 'q' on the row {}"),
        (formats.check_writing, {"to_row": lambda self, item: {"q": "x", "a": "y"}}, "reads something else"),
        (formats.check_writing, {"convert": lambda self, row: [*Good.convert(self, row)] * 2}, "reads 2 conversations"),
    ],
)  # fmt: skip
def test_a_bad_format_is_caught(
    check: Callable[..., None], methods: Mapping[str, object], problem: str
) -> None:
    check(Good(), ROWS)
    with pytest.raises(AssertionError) as caught:
        check(variant(Good, **methods)(), ROWS)
    assert problem in str(caught.value)
    assert "Variant" in str(caught.value)


@pytest.mark.parametrize(
    ("convert", "problem"),
    [
        (remembers, "something else of the same rows the second time"),
        (empties, "changes the rows"),
        (
            lambda self, row: [Conversation((Message("user", f"{id(self)}"),))],
            "another Variant makes something else",
        ),
        (lambda self, row: [Conversation((Message("user", str(next(calls))),))], "the second time"),
    ],
)
def test_a_format_that_is_not_pure_is_caught(convert: Callable[..., object], problem: str) -> None:
    formats.check_purity(Good(), Good(), ROWS)
    made = variant(Good, convert=convert)
    with pytest.raises(AssertionError, match=problem):
        formats.check_purity(made(), made(), [dict(row) for row in ROWS])


def test_a_bad_row_that_is_accepted_or_refused_without_a_place_is_caught() -> None:
    with pytest.raises(AssertionError, match="accepts the bad row"):
        formats.check_bad_rows(Good(), ROWS)

    def convert(self, row):
        raise SFTError("bad")

    with pytest.raises(AssertionError, match="names no key"):
        formats.check_bad_rows(variant(Good, convert=convert)(), ROWS)


def test_missing_samples_are_asked_for() -> None:
    tests = type("Tests", (FormatTests,), {"plugin": Good})()
    with pytest.raises(MissingSample, match="set `rows` in the test class of Good"):
        tests.test_it_is_pure()

    class Needy(Good):
        """Needs it."""

        def __init__(self, column: str) -> None: ...

    with pytest.raises(MissingSample, match="Needy needs the options column"):
        type("Tests", (FormatTests,), {"plugin": Needy})().make()


# ----------------------------------------------------------------------------------------------- losses


class Plain(Loss):
    """Cross-entropy."""

    def per_token(self, batch):
        return cross_entropy(batch.logits, batch.targets, reduction="none")


class Doubtful(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        return logits.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 1.001


def with_wrong_gradient(self, batch):
    return cross_entropy(Doubtful.apply(batch.logits), batch.targets, reduction="none")


def centred(self, batch):
    nll = Plain().per_token(batch)
    return nll - nll.mean() if len(nll) else nll


def with_state(self, batch):
    self.n = getattr(self, "n", 0) + 1
    return Plain().per_token(batch) * self.n


@pytest.mark.parametrize(
    ("check", "per_token", "problem"),
    [
        (losses.check_shape, lambda self, b: Plain().per_token(b).sum(), r"shape \[\] for 6 tokens"),
        (losses.check_shape, lambda self, b: Plain().per_token(b).detach(), "can't be differentiated"),
        (losses.check_shape, lambda self, b: Plain().per_token(b) / 0, "is not finite"),
        (losses.check_shape, lambda self, b: (b.targets * 2), "a loss of type torch.int64"),
        (losses.check_repeats, with_state, "changes from call to call"),
        (losses.check_zero_weights, centred, "a token of weight 0 changes"),
        (losses.check_chunks, centred, "depends on the tokens that come with it"),
        (losses.check_gradient, with_wrong_gradient, "off by .* from finite differences"),
    ],
)  # fmt: skip
def test_a_bad_loss_is_caught(
    check: Callable[..., None], per_token: Callable[..., object], problem: str
) -> None:
    check(Plain())
    with pytest.raises(AssertionError, match=problem):
        check(variant(Plain, per_token=per_token)())


def test_a_loss_that_wrongly_says_it_is_cross_entropy_is_caught() -> None:
    losses.check_cross_entropy(variant(Plain, as_cross_entropy=lambda self: 0.0)())
    with pytest.raises(AssertionError, match=r"as_cross_entropy says 0\.1"):
        losses.check_cross_entropy(variant(Plain, as_cross_entropy=lambda self: 0.1)())


# --------------------------------------------------------------------------------------------- adapters


class Whole(Adapter):
    """Everything."""

    def prepare(self, model):
        return model.requires_grad_(True)

    def export(self, model, folder):
        model.save_pretrained(folder)


def exports_other(self, model, folder):
    model.get_output_embeddings().weight.data += 1
    model.save_pretrained(folder)


def exports_pickle(self, model, folder):
    model.save_pretrained(folder)
    torch.save({}, folder / "more.bin")


def exports_rounded(self, model, folder):
    deepcopy(model).to(torch.float16).save_pretrained(folder)


def hides(self, model):
    """Trains something that the module's state doesn't have."""
    model.requires_grad_(False)
    extra = torch.nn.Parameter(torch.ones(64))
    head = model.get_output_embeddings()
    head.weight.requires_grad_(True)
    head.forward = lambda hidden: torch.nn.functional.linear(hidden * extra, head.weight)
    with torch.no_grad():
        extra += torch.rand(64) + next(calls)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapters.write_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    ("methods", "problem"),
    [
        ({"export": exports_other}, "export changes the model"),
        ({"export": exports_pickle}, "writes more.bin"),
        ({"export": exports_rounded}, "has logits that are off by"),
    ],
)
def test_an_adapter_that_exports_something_else_is_caught(
    base: Path, tmp_path: Path, methods: Mapping[str, object], problem: str
) -> None:
    with pytest.raises(AssertionError, match=problem):
        adapters.check_export(variant(Whole, **methods)(), base, tmp_path / "out")


def test_an_adapter_that_trains_nothing_or_hides_what_it_trains_is_caught(base: Path) -> None:
    with pytest.raises(AssertionError, match="leaves no parameter to train"):
        adapters.check_trains(variant(Whole, prepare=lambda self, model: model.requires_grad_(False))(), base)
    hidden = variant(Whole, prepare=hides)
    with pytest.raises(AssertionError, match="part of it is kept elsewhere"):
        adapters.check_checkpoint(hidden(), hidden(), base)


def test_a_base_model_that_is_the_tuned_one_is_caught(base: Path) -> None:
    from contextlib import nullcontext

    adapters.check_base_model(Whole(), base)  # refuses
    with pytest.raises(AssertionError, match="gives another model than the base"):
        adapters.check_base_model(variant(Whole, base_model=lambda self, model: nullcontext(model))(), base)


# ---------------------------------------------------------------------------------------------- filters


class Quiet(Filter):
    """Drops who says nothing."""

    def judge(self, conversation):
        said = sum(len(text) for _, text in turns(conversation))
        return Verdict(None if said else "nothing is said", said)


class Unheard(SetFilter):
    """Drops what was said before."""

    def look(self, conversation):
        return [text for _, text in turns(conversation)]

    def begin(self):
        heard = []

        def judge(seen):
            if seen in heard:
                return Verdict("said before")
            heard.append(seen)
            return Verdict()

        return judge


def counts(self, conversation):
    self.seen = getattr(self, "seen", 0) + 1
    return Verdict("too late" if self.seen > 3 else None)


def changes(self, conversation):
    for tool in getattr(conversation, "messages", ()):
        for call in tool.tool_calls:
            call.arguments["city"] = "Rome"
    return Verdict()


def shares(self):
    self.heard = getattr(self, "heard", [])
    return lambda seen: Verdict("said before") if seen in self.heard else self.heard.append(seen) or Verdict()


class Forgetting(Quiet):
    """Keeps what the last conversation said, but not through pickle."""

    def __init__(self) -> None:
        self.most = 3

    def __getstate__(self):
        return {"most": 5}

    def judge(self, conversation):
        return Verdict("long" if len([*turns(conversation)]) > self.most else None)


def test_good_filters_pass() -> None:
    for filter in (Quiet, Unheard):
        filters.check_verdicts(filter(), filters.SAMPLES)
        filters.check_purity(filter(), filter(), filters.SAMPLES)
        filters.check_order(filter(), filters.SAMPLES)
        filters.check_unchanged(filter(), filters.SAMPLES)
    filters.check_samples(Quiet(), filters.SAMPLES[:2], filters.SAMPLES[6:7])
    filters.check_samples(Unheard(), filters.SAMPLES[:1], filters.SAMPLES[1:2])


def gives(verdict: object) -> Callable[..., object]:
    return lambda self, conversation: verdict


@pytest.mark.parametrize(
    ("base", "check", "methods", "problem"),
    [
        (Quiet, "verdicts", {"judge": gives(True)}, "gives a bool, not a Verdict"),
        (Quiet, "verdicts", {"judge": gives(Verdict(" "))}, "says not why"),
        (Quiet, "verdicts", {"judge": gives(Verdict(score=float("nan")))}, "which is no number"),
        (Quiet, "verdicts", {"judge": lambda self, c: Verdict(c.messages[9])}, "fails with IndexError"),
        (Quiet, "verdicts", {"judge": lambda self, c: Verdict(score=len(c.messages))}, "fails with AttributeError"),
        (Quiet, "purity", {"judge": counts}, "otherwise the second time"),
        (Quiet, "purity", {"judge": lambda self, c: Verdict(f"{id(self)}")}, "another Variant judges"),
        (Forgetting, "purity", {}, "after it was pickled"),
        (Unheard, "purity", {"look": lambda self, c: lambda: c}, "can't be pickled"),
        (Quiet, "order", {"judge": counts}, "make it a SetFilter"),
        (Unheard, "order", {"begin": shares}, "aren't apart"),
        (Quiet, "unchanged", {"judge": changes}, "changes the conversations"),
    ],
)  # fmt: skip
def test_a_bad_filter_is_caught(base: type, check: str, methods: Mapping[str, object], problem: str) -> None:
    filter, items = variant(base, **methods) if methods else base, deepcopy(filters.SAMPLES)
    law = getattr(filters, f"check_{check}")
    with pytest.raises(AssertionError) as caught:
        law(*((filter(), filter(), items) if check == "purity" else (filter(), items)))
    assert problem in str(caught.value)


def test_samples_that_are_judged_otherwise_are_caught() -> None:
    with pytest.raises(AssertionError, match=r"drops \(nothing is said\) what it should keep"):
        filters.check_samples(Quiet(), filters.SAMPLES[6:7], filters.SAMPLES[6:7])
    with pytest.raises(AssertionError, match="keeps what it should drop"):
        filters.check_samples(Quiet(), filters.SAMPLES[:1], filters.SAMPLES[:1])
    with pytest.raises(MissingSample, match="set `kept`"):
        type("Tests", (FilterTests,), {"plugin": Quiet})().given("kept")


# -------------------------------------------------------------------------------------------- callbacks


class Counting(Callback):
    """Counts."""

    def __init__(self) -> None:
        self.n = 0

    def on_train_batch_end(self, *args):
        self.n += 1

    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, state):
        self.n = state["n"]


class Thing:
    pass


@pytest.mark.parametrize(
    ("methods", "problem"),
    [
        ({}, None),
        ({"load_state_dict": lambda self, state: None}, "does not bring back"),
        ({"state_dict": lambda self: {"thing": Thing()}}, "can't be read with weights_only=True"),
    ],
)
def test_a_callback_whose_state_is_lost_is_caught(
    tmp_path: Path, methods: Mapping[str, object], problem: str | None
) -> None:
    tests = type("Tests", (CallbackTests,), {"plugin": variant(Counting, **methods)})()
    tests.make = tests.plugin
    if problem is None:
        tests.test_its_state_comes_back_from_a_checkpoint(tmp_path)
        return
    with pytest.raises(AssertionError, match=problem):
        tests.test_its_state_comes_back_from_a_checkpoint(tmp_path)


# -------------------------------------------------------------------------------------------- all kinds


class Undocumented(Good):
    """Rows.

    Args:
        one: This one.
    """

    def __init__(self, one: int = 1, two: int = 2) -> None: ...


class Untyped(Good):
    """Rows.

    Args:
        one: This one.
    """

    def __init__(self, one=1) -> None: ...


class Changing(Good):
    """Rows.

    Args:
        one: This one.
    """

    def __init__(self, one: int = 1) -> None: ...


def test_a_class_that_is_no_plugin_is_caught() -> None:
    with pytest.raises(AssertionError, match=r"Thing does not subclass lightning_sft\.bases\.DataFormat"):
        check_base(Thing, "formats")
    with pytest.raises(AssertionError, match="does not define convert"):
        check_base(type("Half", (DataFormat,), {"matches": None}), "formats")


def test_a_class_that_is_not_installed_is_caught() -> None:
    with pytest.raises(AssertionError, match=r'Good = "test_kit:Good"'):
        check_entry_point(Good, "formats")
    with pytest.raises(AssertionError, match="leads to"):
        check_entry_point(type("Alpaca", (Good,), {}), "formats")


def test_options_without_a_type_or_a_description_are_caught() -> None:
    check_options(Changing)
    with pytest.raises(AssertionError, match="Undocumented does not document two"):
        check_options(Undocumented)
    with pytest.raises(AssertionError, match="an option of Untyped has no type"):
        check_options(Untyped)
    with pytest.raises(AssertionError, match="has no docstring"):
        check_options(type("Silent", (Good,), {}))


def test_options_that_are_refused_are_caught() -> None:
    check_config(Changing, "formats", {"one": 3})
    with pytest.raises(AssertionError, match="refuses the options"):
        check_config(Changing, "formats", {"three": 3})


def test_the_kit_needs_neither_pytest_nor_torch_to_be_imported() -> None:
    libraries = "{'pytest', 'hypothesis', 'torch', 'lightning', 'jsonargparse'}"
    code = f"import sys, lightning_sft.testing; print({libraries} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_every_test_of_the_kit_says_what_it_is_about() -> None:
    for mixin in (PluginTests, FormatTests, FilterTests, AdapterTests, LossTests, CallbackTests):
        assert all(getattr(mixin, name).__doc__ for name in dir(mixin) if name.startswith("test_"))
