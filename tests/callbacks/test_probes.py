"""The other probes: each figure by hand, or in plain transformers and peft."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file

from lightning_sft import (
    Evaluator,
    Generate,
    Item,
    LogLikelihood,
    Record,
    Results,
    Score,
    SFTDataModule,
    SFTError,
    SFTModule,
    Source,
    is_valid_format,
)
from lightning_sft.data.canaries import canaries
from lightning_sft_adapters.full import Full
from lightning_sft_adapters.lora import LoRA
from lightning_sft_callbacks.behaviour import BiasProbe, FormatProbe, RefusalProbe
from lightning_sft_callbacks.drift import DriftProbe
from lightning_sft_callbacks.evaluating import EvaluateDuringFit
from lightning_sft_callbacks.generations import SampleGenerations, statistics
from lightning_sft_callbacks.memorization import MemorizationProbe, auc
from lightning_sft_filters.length import Length

ROWS = [{"instruction": f"say {n}", "output": "how are you? " * (1 + n % 3) + str(n)} for n in range(12)]


def write(path: Path, content: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


@pytest.fixture
def train(tmp_path, model_folder):
    """A function that trains with callbacks; the run folder is `tmp_path / "run"`."""

    def run(*callbacks, adapter=None, steps=3, rate=0.02, val=True, rows=ROWS[:8], **options) -> SFTModule:
        torch.manual_seed(0)
        module = SFTModule(base=str(model_folder("llama")), adapter=adapter or LoRA(r=4), learning_rate=rate)
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, max_steps=steps,
            enable_model_summary=False, callbacks=list(callbacks), default_root_dir=tmp_path / "run",
        )  # fmt: skip
        data = write(tmp_path / "train.jsonl", rows)
        held_out = write(tmp_path / "val.jsonl", ROWS[8:]) if val else None
        trainer.fit(module, SFTDataModule(train=data, val=held_out, batch_size=4, seed=0, **options))
        return module

    return run


# ------------------------------------------------------------------------------------------- memorization


def test_auc_is_the_share_of_pairs_in_the_right_order():
    assert auc([1.0, 2.0], [3.0, 4.0]) == 1.0
    assert auc([3.0, 4.0], [1.0, 2.0]) == 0.0
    assert auc([1.0, 3.0], [2.0, 3.0]) == pytest.approx((1 + 1 + 0 + 0.5) / 4)


@pytest.mark.parametrize("nll", [0.0, 0.5, 4.6, 5.0, 40.0, 900.0])
def test_extraction_is_what_drawing_so_often_gives(nll):
    probe = MemorizationProbe(draws=100, probability=0.5)
    once = math.exp(-nll)
    assert probe.is_extractable(nll) == (1 - (1 - once) ** 100 >= 0.5)


def test_rows_learned_by_heart_stand_out(train, tokenizer):
    probe = MemorizationProbe(every_n_steps=20, max_auc=0.95, max_verbatim=0.5)
    with pytest.warns(UserWarning, match="learned by heart"):
        module = train(probe, adapter=Full(), steps=90, rate=0.03)
    first, last = probe.history[0], probe.history[-1]
    assert last["gap"] > first["gap"] + 0.2
    assert last["verbatim"] > 0.7 > last["verbatim_held_out"]
    assert [record["step"] for record in probe.history] == [0, 20, 40, 60, 80, 90]
    model = module.loaded.eval()
    model.set_attn_implementation("sdpa")
    losses, verbatim = [], []
    for row in ROWS[:8]:
        prompt = f"<|im_start|>user\n{row['instruction']}<|im_end|>\n<|im_start|>assistant\n"
        before = tokenizer(prompt)["input_ids"]
        ids = tokenizer(f"{prompt}{row['output']}<|im_end|>")["input_ids"]
        assert ids[: len(before)] == before
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        own = log_p.gather(1, torch.tensor(ids[1:])[:, None])[len(before) - 1 :, 0]
        losses.append(-float(own.mean()))
        verbatim.append(log_p.argmax(-1)[len(before) - 1 :].tolist() == ids[len(before) :])
    assert last["trained_loss"] == pytest.approx(sum(losses) / 8, rel=1e-5)
    assert last["verbatim"] == sum(verbatim) / 8


def test_exposure_is_the_rank_among_random_secrets(train, tmp_path, tokenizer):
    from lightning_sft.__main__ import main
    from lightning_sft_callbacks.memorization import exposure

    assert [exposure(rank, 8) for rank in (1, 2, 8)] == [3.0, 2.0, 0.0]
    path = tmp_path / "canaries.jsonl"
    assert main(["data", "canaries", str(path), "--count", "3"]) == 0
    assert main(["data", "canaries", str(path)]) == 2  # nothing is written over
    planted = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["instruction"] for row in planted}) == 3
    assert all(len(row["output"]) == 9 and row["output"].isdigit() for row in planted)
    probe = MemorizationProbe(canaries=str(path), candidates=32)
    module = train(probe, adapter=Full(), steps=80, rate=0.01, rows=planted)
    model = module.loaded.eval()
    model.set_attn_implementation("sdpa")
    numbers, found = np.random.default_rng(0), []
    for row in planted:
        others = ["".join(map(str, numbers.integers(0, 10, 9))) for _ in range(31)]
        prompt = f"<|im_start|>user\n{row['instruction']}<|im_end|>\n<|im_start|>assistant\n"
        scores = []
        for text in (row["output"], *others):
            start = len(tokenizer(prompt)["input_ids"])
            ids = tokenizer(prompt + text)["input_ids"]
            with torch.no_grad():
                log_p = model(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
            scores.append(float(log_p.gather(1, torch.tensor(ids[1:])[:, None])[start - 1 :].sum()))
        found.append(5 - math.log2(sum(score >= scores[0] for score in scores)))
    assert probe.history[-1]["exposure"] == pytest.approx(sum(found) / 3)
    assert probe.history[-1]["exposure"] > probe.history[0]["exposure"] + 1


def test_canaries_of_the_data_module_are_trained_and_asked_for(train, tmp_path):
    path = str(tmp_path / "canaries.jsonl")
    canaries(path, count=3)
    rows = write(tmp_path / "rows.jsonl", ROWS)
    for given, weight in ((path, 1.0), (Source(path, weight=4.0), 4.0)):
        sources = SFTDataModule(rows, canaries=given).sources["train"]
        assert [(each.path, each.weight) for each in sources] == [(rows, 1.0), (path, weight)]
    planted, named = (
        MemorizationProbe(candidates=64),
        MemorizationProbe(candidates=64, canaries=path, name="named"),
    )
    module = train(planted, named, steps=1, canaries=path)
    assert len(module.data.prepared["train"].examples) == 8 + 3
    assert planted.history[0]["exposure"] == named.history[0]["exposure"]


def test_no_canary_is_held_out_left_over_or_asked_for_without_being_planted(train, tmp_path):
    path = str(tmp_path / "canaries.jsonl")
    canaries(path, count=6)
    probe = MemorizationProbe(candidates=2)
    data = train(probe, steps=1, val=False, canaries=Source(path, limit=4), val_split=7).data
    held_out, trained = (data.prepared[part].sources.tolist() for part in ("val", "train"))
    assert (held_out, trained) == ([0] * 7, [0, 1, 1, 1, 1])
    assert len(probe.canaries) == 4
    assert probe.told({**probe.history[-1], "exposure": 2.25}).endswith("exposure 2.2 bits")
    assert SFTDataModule(canaries=path).sources["train"] == []  # nothing is trained on by itself
    with pytest.raises(SFTError, match="filtered by Length") as caught:
        train(steps=1, canaries=path, filters=[Length(least=3)])
    assert path in caught.value.where


def test_a_file_without_canaries_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(SFTError, match="no such file"):
        MemorizationProbe(canaries=str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(SFTError, match="no canary") as caught:
        MemorizationProbe(canaries=write(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b"}]))
    assert "row 1" in caught.value.where


def test_it_stops_where_it_is_told_to(train):
    probe = MemorizationProbe(every_n_steps=2, max_auc=-1.0, then="stop")
    assert train(probe, steps=9).trainer.global_step == 2


def test_it_needs_held_out_rows(train):
    with pytest.raises(SFTError, match="validation data"):
        train(MemorizationProbe(), val=False)


# -------------------------------------------------------------------------------------------------- drift


def test_drift_of_trained_weights_is_their_distance(train, model_folder):
    probe = DriftProbe(every_n_steps=2)
    module = train(probe, adapter=Full(), steps=3)
    assert set(probe.history[0]["layers"].values()) == {0.0}
    before = load_file(model_folder("llama") / "model.safetensors")
    now = dict(module.loaded.named_parameters())
    moved = base = 0.0
    for name, tensor in before.items():
        if name.startswith("model.layers.1."):
            moved += float((now[name].detach() - tensor).double().square().sum())
            base += float(tensor.double().square().sum())
    layers = probe.history[-1]["layers"]
    assert layers["layer_1"] == pytest.approx(math.sqrt(moved / base), rel=1e-6)
    assert {"layer_0", "layer_1", "embed_tokens", "lm_head", "norm"} <= set(layers)


def test_drift_of_an_adapter_is_what_it_adds(train, model_folder):
    probe = DriftProbe()
    module = train(probe, adapter=LoRA(r=4, alpha=8), steps=3)
    assert set(probe.history[0]["layers"].values()) == {0.0}
    merged = module.loaded.merge_and_unload()
    before = load_file(model_folder("llama") / "model.safetensors")
    moved = base = 0.0
    for name, tensor in before.items():
        if name.startswith("model.layers.0.") and name.endswith("proj.weight"):
            moved += float((merged.state_dict()[name] - tensor).double().square().sum())
            base += float(tensor.double().square().sum())
    assert probe.history[-1]["layers"]["layer_0"] == pytest.approx(math.sqrt(moved / base), rel=1e-4)


def test_drift_beside_a_quantised_base_is_measured_on_its_real_weights(train, model_folder):
    pytest.importorskip("bitsandbytes")
    from lightning_sft_adapters.qlora import QLoRA

    probe = DriftProbe()
    module = train(probe, adapter=QLoRA(r=4, alpha=8), steps=3)
    tensors = load_file(model_folder("llama") / "model.safetensors")
    base = sum(
        float(tensor.double().square().sum()) for name, tensor in tensors.items()
        if name.startswith("model.layers.0.") and name.endswith("proj.weight")
    )  # fmt: skip
    moved = sum(
        float(layer.get_delta_weight("default").detach().double().square().sum())
        for name, layer in module.loaded.named_modules()
        if ".layers.0." in name and hasattr(layer, "get_delta_weight")
    )
    # quantising to 4 bits moves the norm by a few per cent
    assert probe.history[-1]["layers"]["layer_0"] == pytest.approx(math.sqrt(moved / base), rel=0.05)


# -------------------------------------------------------------------------------------------- generations


def test_statistics_of_answers_by_hand():
    found = statistics(["a b c d a b c d", "a b c d a b c d", "x"])
    assert found == pytest.approx(
        {"distinct_1": 5 / 17, "distinct_2": 4 / 14, "repeated_4": 2 * (1 - 4 / 5) / 3, "alike": 1 / 3}
    )


def test_answers_are_kept_and_are_those_of_generate(train, tokenizer, capsys):
    probe = SampleGenerations(["say 3", "who are you?"], max_new_tokens=6)
    module = train(probe, adapter=Full(), steps=2)
    model = module.loaded.eval()
    model.set_attn_implementation("sdpa")
    expected = []
    for prompt in probe.prompts:
        text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        stops = list(module.renderer.stop_token_ids)
        out = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=stops, pad_token_id=0)
        expected.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    assert probe.history[-1]["answers"] == expected
    assert probe.history[0]["answers"] != expected
    assert "tuned" in capsys.readouterr().out


def test_prompts_come_from_a_file_or_the_list(tmp_path):
    path = write(tmp_path / "prompts.jsonl", [{"prompt": "a"}, {"instruction": "b"}])
    assert SampleGenerations(["c"], path).prompts == ["c", "a", "b"]
    with pytest.raises(SFTError, match="no prompts"):
        SampleGenerations()
    with pytest.raises(SFTError, match="no prompt") as caught:
        SampleGenerations(path=write(tmp_path / "bad.jsonl", [{"prompt": "a"}, {"text": "b"}]))
    assert "row 2" in caught.value.where


# ---------------------------------------------------------------------------------------------- behaviour


@pytest.mark.parametrize(
    ("answer", "refuses"),
    [("I’m sorry, but no.", True), ("As an AI, I", True), ("Sure: sorry is a word", False), ("", False)],
)
def test_refusals_are_known_by_their_phrases(answer, refuses, tmp_path):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "a"}])
    assert RefusalProbe(prompts, prompts).is_refusal(answer) == refuses


def test_refusals_are_counted_on_either_side(train, tmp_path, monkeypatch):
    harmful = write(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    harmless = write(tmp_path / "b.jsonl", [{"prompt": "c"}, {"prompt": "d"}, {"prompt": "e"}])
    probe = RefusalProbe(harmful, harmless, max_new_tokens=2)
    said = iter([True, False, False, False, True] * 2)
    monkeypatch.setattr(probe, "is_refusal", lambda answer: next(said))
    train(probe, steps=1)
    assert (probe.history[0]["refused_harmful"], probe.history[0]["refused_harmless"]) == (
        0.5,
        pytest.approx(1 / 3),
    )
    assert len(probe.history[0]["answers"]) == 5


def test_bias_is_the_difference_of_the_sentences_log_likelihoods(train, tmp_path, tokenizer):
    pairs = [("the user asks", "the assistant asks"), ("hello there", "hello you")]
    path = write(tmp_path / "pairs.jsonl", [{"first": a, "second": b} for a, b in pairs])
    probe = BiasProbe(path)
    module = train(probe, adapter=Full(), steps=2)
    model = module.loaded.eval()
    model.set_attn_implementation("sdpa")

    def score(text: str) -> float:
        ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]  # EOS stands in for BOS
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        return float(log_p.gather(1, torch.tensor(ids[1:])[:, None]).sum())

    expected = [score(a) - score(b) for a, b in pairs]
    last, first = probe.history[-1], probe.history[0]
    assert last["differences"] == pytest.approx(expected, abs=1e-4)
    assert last["prefers_first"] == np.mean([each > 0 for each in expected])
    assert last["mean_difference"] == pytest.approx(np.mean(expected), abs=1e-4)
    moved = np.abs(np.array(last["differences"]) - first["differences"]).mean()
    assert (first["moved"], last["moved"]) == (0.0, pytest.approx(moved))


@pytest.mark.parametrize(
    ("answer", "asked", "valid"),
    [
        ('{"a": [1, 2]}', "json", True),
        ('Here it is:\n```json\n{"a": 1}\n```\nDone.', "json", True),
        ('Here it is: {"a": 1}', "json", False),
        ("{'a': 1}", "json", False),
        ("<a><b/></a>", "xml", True),
        ("<a><b></a>", "xml", False),
        ('<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "xml", False),
        ("# Title\n\n- one\n- two", "markdown", True),
        ("| a | b |\n|---|---|\n| 1 | 2 |", "markdown", True),
        ("| a | b |\n|---|---|\n| 1 |", "markdown", False),
        ("```python\nprint()", "markdown", False),
        ("just a sentence", "markdown", False),
    ],
)
def test_formats_are_parsed(answer, asked, valid):
    assert is_valid_format(answer, asked) == valid


def test_valid_answers_are_counted_by_format(train, tmp_path, monkeypatch):
    content = [
        {"prompt": "a", "format": "json"},
        {"prompt": "b", "format": "json"},
        {"prompt": "c", "format": "xml"},
    ]
    probe = FormatProbe(write(tmp_path / "f.jsonl", content), max_new_tokens=2)
    monkeypatch.setattr(
        "lightning_sft_callbacks.behaviour.is_valid_format", lambda answer, asked: asked == "xml"
    )
    train(probe, steps=1)
    assert probe.history[0] | {"answers": []} == {
        "step": 0, "valid": pytest.approx(1 / 3), "valid_json": 0.0, "valid_xml": 1.0, "answers": [],
    }  # fmt: skip
    with pytest.raises(SFTError, match="format is 'yaml'"):
        FormatProbe(write(tmp_path / "g.jsonl", [{"prompt": "a", "format": "yaml"}]))


# --------------------------------------------------------------------------------------------- evaluators


class Likely(Evaluator):
    """How likely a few texts are."""

    def requests(self):
        texts = ["hello there", "how are you?", "the user asks", "the assistant answers"]
        return [Item("texts", n, (LogLikelihood("", text),)) for n, text in enumerate(texts)]

    def score(self, answered):
        records = [Record.of(each, "", {"nats": each.log_likelihoods[0]}) for each in answered]
        scores = (Score.mean("likely", "nats", [r.metrics["nats"] for r in records]),)
        return Results((*scores, Score.mean("likely/texts", "nats", [0.0])), tuple(records))


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(1))


class Silent(Likely):
    """An evaluator that asks nothing."""

    def requests(self):
        return []


class Scoreless(Likely):
    """An evaluator that has no score."""

    def score(self, answered):
        return Results((), ())


class Drawing(Likely):
    """An evaluator that draws from every generator of random numbers, and generates."""

    def requests(self):
        draw()
        asked = Generate("hello", max_new_tokens=3, temperature=1.0)
        return [*super().requests(), Item("drawn", 0, (asked,))]

    def score(self, answered):
        draw()
        found = super().score(answered[:-1])
        return Results(
            tuple(replace(each, name=f"drawing {each.name}") for each in found.scores), found.records
        )


def test_evaluators_run_on_the_way_on_the_same_items(train, model_folder):
    from lightning_sft import Scorer

    probe = EvaluateDuringFit([Likely()], every_n_steps=2, items=2)
    module = train(probe, adapter=Full(), steps=4)
    assert [record["step"] for record in probe.history] == [0, 2, 4]
    (items,) = probe._asked
    assert len(items) == 2
    again = Scorer.of(module).run([item.requests[0] for item in items])
    expected = sum(each.log_likelihood for each in again) / 2
    assert probe.history[-1]["likely/nats"] == pytest.approx(expected)
    assert probe.numbers(probe.history[-1]) == {"likely/nats": pytest.approx(expected)}
    several = {"step": 2, "a/b/x": 1.0, "a/b/y": 2.0, "a/b/c/x": 3.0, "d/x": 4.0, "d/e/x": 5.0}
    assert probe.numbers(several) == {"a/b/x": 1.0, "a/b/y": 2.0, "d/x": 4.0}
    probe.history[-1]["likely/nats"] = float("nan")
    probe._write(module.trainer, module)
    text = (Path(module.trainer.default_root_dir) / f"{probe.file}.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["history"][-1]["likely/nats"] is None
    with pytest.raises(SFTError, match="no evaluator"):
        EvaluateDuringFit([])
    probe.evaluators, probe._asked = [Likely(), Likely()], []
    with pytest.raises(SFTError, match="two evaluators have a score that is called likely/nats"):
        probe.measure(module.trainer, module)
    for kind, says in (
        (Silent, "Silent asks nothing"),
        (Scoreless, "Scoreless has given no score of 4 items"),
    ):
        probe.evaluators, probe._asked, probe.items = [kind()], [], None
        with pytest.raises(SFTError, match=says):
            probe.measure(module.trainer, module)


# ------------------------------------------------------------------------------------------------- all


def test_none_of_them_changes_the_run(train, tmp_path):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "a", "format": "json", "first": "a", "second": "b"}])
    probes = [
        MemorizationProbe(every_n_steps=1), DriftProbe(1), SampleGenerations(["a"], None, 1, 3, temperature=1.0),
        RefusalProbe(prompts, prompts, 1, 3), BiasProbe(prompts, 1), FormatProbe(prompts, 1, 3),
        EvaluateDuringFit([Likely(), Drawing()], 1),
    ]  # fmt: skip
    states, drawn = [], []
    for callbacks in ([], probes):
        random.seed(1)
        np.random.seed(1)
        module = train(*callbacks, adapter=LoRA(r=4, dropout=0.3))
        (moments,) = (each.state_dict()["state"].values() for each in module.trainer.optimizers)
        kept = [torch.as_tensor(value).clone() for each in moments for value in each.values()]
        steps = torch.tensor([module.trainer.global_step, module.training])
        states.append([p.detach().clone() for p in module.parameters()] + kept + [steps])
        drawn.append(draw())
    assert len(states[0]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    assert drawn[0] == drawn[1]
    for probe in probes:
        assert [record["step"] for record in probe.history] == [0, 1, 2, 3]
        saved = probe.state_dict()
        path = tmp_path / "state.pt"
        torch.save(saved, path)
        assert torch.load(path, weights_only=True) == saved
        assert json.loads((tmp_path / "run" / f"{probe.file}.json").read_text())["history"]


def test_an_evaluator_that_needs_the_base_is_refused_during_training():
    class Beside(Evaluator):
        needs_base = True

        def requests(self):
            return []

        def score(self, answered):
            return Results((), ())

    with pytest.raises(SFTError, match="Beside needs the base's answers"):
        EvaluateDuringFit([Beside()])
