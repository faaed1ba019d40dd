"""ForgettingProbe against plain transformers, and a run that doesn't notice it; RetentionStopping on a catastrophe."""

from __future__ import annotations

import json
import math
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file

from lightning_sft import SFTDataModule, SFTError, SFTModule, run_folder
from lightning_sft.sweeping.trial import Reporter
from lightning_sft_adapters.full import Full
from lightning_sft_adapters.lora import LoRA
from lightning_sft_callbacks.domains import Domain
from lightning_sft_callbacks.forgetting import ForgettingProbe
from lightning_sft_callbacks.retention_stopping import RetentionStopping

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from resume_run import STOP, Stopped, fit, write_config

TEXTS = [
    "hello there, how are you?",
    "the assistant answers",
    "the user asks and asks and asks the user: " * 9,
]
QUESTIONS = [
    {"question": "who asks?", "choices": ["the user", "the assistant", "hello"], "answer": 0},
    {"question": "who answers?", "choices": ["the user", "the assistant"], "answer": 1},
    {"question": "how are you?", "choices": ["there", "hello there, how are you"], "answer": 0},
]


def rows(path: Path, content: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("probe")
    train = [{"instruction": f"say {n}", "output": "how are you? " * (1 + n % 3)} for n in range(16)]
    return {
        "train": rows(folder / "train.jsonl", train),
        "val": rows(folder / "val.jsonl", train[:5]),
        "texts": rows(folder / "texts.jsonl", [{"text": text} for text in TEXTS]),
        "questions": rows(folder / "questions.jsonl", QUESTIONS),
    }


def probe(files, **options) -> ForgettingProbe:
    domains = [
        Domain("text", text=files["texts"], weight=2.0),
        Domain("facts", questions=files["questions"]),
    ]
    return ForgettingProbe(**{"domains": domains, "every_n_steps": 2, **options})


class Told(list[float]):
    """A sweep that keeps what a trial tells."""

    def wants_to_stop(self, value: float, at: int) -> bool:
        self.append(value)
        return False

    def tell(self, **line: object) -> None: ...


def train(folder, files, run: Path, *callbacks, steps: int = 5, adapter=None, rate: float = 0.02, **options):
    torch.manual_seed(0)
    module = SFTModule(
        base=str(folder), adapter=adapter or LoRA(r=4, dropout=0.1), learning_rate=rate, **options
    )
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, max_steps=steps,
        enable_model_summary=False, callbacks=list(callbacks), default_root_dir=run, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(module, SFTDataModule(train=files["train"], val=files["val"], batch_size=4, seed=0))
    return module


# ----------------------------------------------------------------------------------- the slow obvious way


def log_p(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)


def by_hand(base, tuned, tokenizer, questions=QUESTIONS) -> dict[str, float]:
    """Every figure of both domains, one text at a time, in plain transformers."""
    nll = {"base": 0.0, "tuned": 0.0}
    kl, tokens = 0.0, 0
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) <= 256
        p0, p = log_p(base, ids), log_p(tuned, ids)
        targets = torch.tensor(ids[1:])[:, None]
        nll["base"] -= float(p0.gather(1, targets).sum())
        nll["tuned"] -= float(p.gather(1, targets).sum())
        kl += float((p0.exp() * (p0 - p)).sum())
        tokens += len(ids) - 1
    right, loss = {"base": [], "tuned": []}, {"base": 0.0, "tuned": 0.0}
    for name, model in (("base", base), ("tuned", tuned)):
        for row in questions:
            context = tokenizer(f"Question: {row['question']} Answer:")["input_ids"]
            scores = []
            for choice in row["choices"]:
                ids = tokenizer(f"Question: {row['question']} Answer: {choice}")["input_ids"]
                p = log_p(model, ids).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
                scores.append(float(p[len(context) - 1 :].sum()))
            right[name].append(scores.index(max(scores)) == row["answer"])
            loss[name] += torch.tensor(scores).double().logsumexp(0).item() - scores[row["answer"]]
    delta, asked = (nll["tuned"] - nll["base"]) / tokens, (loss["tuned"] - loss["base"]) / len(questions)
    pairs = list(zip(right["base"], right["tuned"], strict=True))
    return {
        "ce": nll["tuned"] / tokens,
        "delta_ce": delta,
        "delta_bpb": (nll["tuned"] - nll["base"]) / sum(len(t.encode()) for t in TEXTS) / math.log(2),
        "kl": kl / tokens,
        "asked_delta": asked,
        "accuracy": sum(right["tuned"]) / len(questions),
        "f10": sum(a and not b for a, b in pairs) / len(questions),
        "retention": math.exp(-(2 * max(0.0, delta) + max(0.0, asked)) / 3),
    }


@pytest.mark.parametrize("adapter", [lambda: LoRA(r=4), Full], ids=["LoRA", "Full"])
@pytest.mark.parametrize(
    ("family", "dtype", "exact"),
    [("llama", "float64", 1e-6), ("bloom", "float64", 1e-6), ("gemma2", "float32", 1e-5)],
)
def test_its_figures_are_those_of_plain_transformers(
    adapter, family, dtype, exact, files, model_folder, tmp_path, tokenizer
):
    import transformers

    load = partial(transformers.AutoModelForCausalLM.from_pretrained, dtype=getattr(torch, dtype))

    folder = model_folder(family)
    callback = probe(files, kl_top_k=len(tokenizer))
    module = train(folder, files, tmp_path / "run", callback, adapter=adapter(), dtype=dtype)
    module.export(tmp_path / "tuned")
    base = load(folder).eval()
    if (tmp_path / "tuned" / "adapter_config.json").exists():
        import peft

        fresh = load(folder)
        tuned = peft.PeftModel.from_pretrained(fresh, tmp_path / "tuned").eval()
    else:
        tuned = load(tmp_path / "tuned").eval()
    expected = by_hand(base, tuned, tokenizer)
    record = callback.history[-1]
    text, asked = record["domains"]["text"], record["domains"]["facts"]
    assert record["step"] == 5
    assert abs(expected["delta_ce"]) > 1e-2
    found = {
        **{name: text[name] for name in ("ce", "delta_ce", "delta_bpb", "kl")},
        "asked_delta": asked["delta_ce"],
        "accuracy": asked["accuracy"],
        "f10": asked["f10"],
        "retention": record["retention"],
    }
    assert found == pytest.approx(expected, rel=0, abs=exact)


def test_at_step_0_nothing_is_lost_exactly(files, model_folder, tmp_path):
    for number, adapter in enumerate((LoRA(r=4), Full())):
        callback = probe(files)
        train(model_folder("llama"), files, tmp_path / str(number), callback, adapter=adapter, steps=1)
        first = callback.history[0]
        assert first["step"] == 0
        assert first["retention"] == 1.0
        assert first["gain"] == 0.0
        assert {values["delta_ce"] for values in first["domains"].values()} == {0.0}
        assert first["domains"]["text"]["kl"] == 0.0


def test_a_few_likeliest_tokens_give_a_lower_bound_of_the_divergence(
    files, model_folder, tmp_path, tokenizer
):
    found = []
    for keep in (2, 16, len(tokenizer)):
        callback = probe(files, kl_top_k=keep)
        train(model_folder("llama"), files, tmp_path / str(keep), callback, adapter=Full())
        found.append(callback.history[-1]["domains"]["text"]["kl"])
    assert 0 < found[0] < found[1] < found[2]


def test_a_text_longer_than_the_context_is_measured_in_windows(files, model_folder, tmp_path, tokenizer):
    long = rows(tmp_path / "long.jsonl", [{"text": "the user asks, the assistant answers " * 60}])
    callback = ForgettingProbe([Domain("long", text=long)], every_n_steps=0)
    train(model_folder("llama"), files, tmp_path / "run", callback, steps=1)
    assert callback.baseline is not None
    ids = tokenizer("the user asks, the assistant answers " * 60)["input_ids"]
    windows = -(-len(ids) // 256)
    assert windows > 1
    assert callback.baseline.measured["long"].sizes == (len(ids) - windows,)


def test_the_progress_bar_shows_the_retention_and_the_file_the_share_of_time(
    files, model_folder, tmp_path, capsys
):
    from lightning_sft.training.progress import Progress

    callback = probe(files, every_n_steps=1)
    module = train(model_folder("llama"), files, tmp_path / "run", callback, steps=3)
    shown = Progress().get_metrics(module.trainer, module)
    assert shown["retention"] == f"{callback.history[-1]['retention']:.3f}"
    written = json.loads((tmp_path / "run" / "forgetting.json").read_text())
    assert 0 < written["share_of_time"] < 1
    assert written["share_of_time"] == pytest.approx(callback.seconds / callback.elapsed, abs=1e-4)
    assert "ForgettingProbe took" not in capsys.readouterr().out
    short = probe(files, every_n_steps=None, cost=1e-6)
    train(model_folder("llama"), files, tmp_path / "short", short, steps=1)
    said = capsys.readouterr().out
    assert "asks 3 of 3 text, 3 of 3 facts, 5 of 5 validation examples, at the start and the end" in said
    assert "more than cost (0%), as the run is short" in said
    assert "more than cost (0%): the run is short" in said
    again = probe(files)
    again.load_state_dict(callback.state_dict())
    assert (again.seconds, again.elapsed) == (callback.seconds, callback.elapsed)
    again.count_time()  # the clock starts anew
    assert again.elapsed == callback.elapsed


# ---------------------------------------------------------------------------------------- what is asked


def test_a_short_run_is_asked_fewer_texts_and_the_same_ones_when_it_goes_on(
    files, model_folder, tmp_path, monkeypatch
):
    texts = rows(tmp_path / "many.jsonl", [{"text": f"{text} {n}"} for n in range(20) for text in TEXTS[:2]])
    asked = rows(
        tmp_path / "asked.jsonl", [{**row, "question": f"{n}"} for n in range(20) for row in QUESTIONS]
    )
    domains = [
        Domain("text", text=texts),
        Domain("facts", questions=asked),
        Domain("all", text=texts, limit=12),
    ]
    first = ForgettingProbe(domains, cost=0.5)
    module = train(model_folder("llama"), files, tmp_path / "run", first, adapter=Full(), steps=5)
    report = json.loads((tmp_path / "run/forgetting.json").read_text())
    found = report["asked"]
    assert 8 <= found["text"]["asked"] < 40 == found["text"]["of"]
    assert 16 <= found["facts"]["asked"] < 60 == found["facts"]["of"]
    assert found["all"] == {"asked": 12, "of": 12}
    assert found["task"] == {"asked": 5, "of": 5}
    assert len(report["baseline"]["text"]["losses"]) == found["text"]["asked"]
    assert len(report["baseline"]["facts"]["right"]) == found["facts"]["asked"]
    again = ForgettingProbe(domains, cost=0.5)
    train(model_folder("llama"), files, tmp_path / "again", again, adapter=Full(), steps=5)
    assert (again.asked, again.history) == (first.asked, first.history)
    monkeypatch.setattr("lightning_sft_callbacks.planned.plan", None)  # would fail
    resumed = ForgettingProbe(domains, cost=0.5)
    resumed.load_state_dict(first.state_dict())
    resumed.begin(module.trainer, module)
    assert resumed.asked == first.asked
    assert resumed.every_n_steps == first.every_n_steps
    assert {"step": 5, **resumed.measure(module.trainer, module)} == first.history[-1]
    for others in (domains[:2], [*domains, Domain("more", text=texts)]):
        other = ForgettingProbe(others, cost=0.5)
        other.load_state_dict(first.state_dict())
        with pytest.raises(SFTError, match=r"the domain (all|more) isn't what it was"):
            other.begin(module.trainer, module)
    rows(tmp_path / "asked.jsonl", [{**row, "answer": 1} for row in QUESTIONS * 20])
    other = ForgettingProbe(domains, cost=0.5)
    other.load_state_dict(first.state_dict())
    with pytest.raises(SFTError, match="the domain facts isn't what it was"):
        other.begin(module.trainer, module)


def test_where_a_saved_adapter_goes_on_all_is_compared_with_what_it_began_as(
    files, model_folder, tmp_path, tokenizer
):
    import peft
    import transformers

    base = model_folder("llama")
    train(base, files, tmp_path / "one").export(tmp_path / "first")
    callback = probe(files, kl_top_k=len(tokenizer), cache=str(tmp_path / "kept"))
    adapter = LoRA(r=4, init_from=str(tmp_path / "first"))
    train(base, files, tmp_path / "two", callback, adapter=adapter, rate=0.01).export(tmp_path / "second")
    models = []
    for name in ("first", "second"):
        fresh = transformers.AutoModelForCausalLM.from_pretrained(base)
        models.append(peft.PeftModel.from_pretrained(fresh, tmp_path / name).eval())
    expected, text = by_hand(*models, tokenizer), callback.history[-1]["domains"]["text"]
    assert expected["kl"] > 1e-4
    assert {name: text[name] for name in ("ce", "delta_ce", "kl")} == pytest.approx(
        {name: expected[name] for name in ("ce", "delta_ce", "kl")}, abs=1e-5
    )
    other = probe(files, kl_top_k=len(tokenizer), cache=str(tmp_path / "kept"))
    train(base, files, tmp_path / "three", other, steps=1)  # the same base, but without that adapter
    assert len(list((tmp_path / "kept").iterdir())) == 2


# -------------------------------------------------------------------------------- it changes nothing


@pytest.mark.parametrize("adapter", [lambda: LoRA(r=4, dropout=0.3), Full], ids=["LoRA", "Full"])
def test_the_run_is_the_same_bit_for_bit_without_it(adapter, files, model_folder, tmp_path):
    weights = []
    for callbacks in ([], [probe(files), RetentionStopping(0.0, patience=99, restore=False)]):
        run = tmp_path / str(len(callbacks))
        module = train(model_folder("llama"), files, run, *callbacks, adapter=adapter())
        weights.append({name: p.detach().clone() for name, p in module.named_parameters()})
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_baseline_is_kept_for_other_runs(files, model_folder, tmp_path, monkeypatch):
    first = probe(files, cache=str(tmp_path / "kept"), task_examples=0)
    train(model_folder("llama"), files, tmp_path / "a", first, adapter=Full())
    second = probe(files, cache=str(tmp_path / "kept"), task_examples=0)
    monkeypatch.setattr(ForgettingProbe, "_measured_base", None)  # would fail
    train(model_folder("llama"), files, tmp_path / "b", second, adapter=Full())
    assert second.history == first.history
    third = probe(files, cache=str(tmp_path / "kept"), task_examples=0)
    with pytest.raises(TypeError):
        train(model_folder("qwen3"), files, tmp_path / "c", third, adapter=Full())


# ------------------------------------------------------------------------------------- several of a class


@pytest.mark.slow
def test_two_probes_with_names_measure_what_each_would_alone(files, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    domains = [{"name": "text", "text": files["texts"]}, {"name": "facts", "questions": files["questions"]}]

    def options(*chosen: int, **more: object) -> dict:
        init = {"domains": [domains[n] for n in chosen], "every_n_steps": 2, **more}
        return {"class_path": "ForgettingProbe", "init_args": init}

    def run(name: str, *callbacks: dict, stop: str | None = None, **more: object) -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        trainer = {"callbacks": [{"class_path": "resume_run.Stop"}, *callbacks]}
        config = write_config(
            tmp_path / name, model_folder("llama"), model={"adapter": "Full"}, trainer=trainer
        )
        where = tmp_path / name / "run"
        if stop is not None:
            with pytest.raises(Stopped):
                fit(config, "--trainer.default_root_dir", where, stop=stop)
        fit(config, "--trainer.default_root_dir", where, *(["--ckpt_path", "last"] if stop else []))
        return where

    def history(where: Path, name: str = "forgetting") -> list[dict]:
        return json.loads((where / f"{name}.json").read_text())["history"]

    stopping = {
        "class_path": "RetentionStopping",
        "init_args": {"min_retention": 0.0, "patience": 99, "probe": "b"},
    }
    both = run("both", options(0), options(1, name="b"), stopping, stop="batch_start:10")
    assert history(both) == history(run("first", options(0)))
    assert history(both, "forgetting-b") == history(run("second", options(1)))
    header = (both / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {
        "forgetting/text/ce",
        "forgetting-b/facts/ce",
        "forgetting/retention",
        "forgetting-b/retention",
    } <= set(header)
    saved = torch.load(both / "checkpoints/last.ckpt", weights_only=True)["callbacks"]
    assert {"ForgettingProbe", "ForgettingProbe-b"} <= saved.keys()
    kept = {each["step"]: each["retention"] for each in saved["RetentionStopping"]["archive"]}
    measured = {each["step"]: each["retention"] for each in history(both, "forgetting-b")}
    assert kept.items() <= measured.items()
    for callbacks, says in (
        ([options(0), options(1)], "two callbacks of the class ForgettingProbe"),
        ([options(0), options(1, name="b"), {"class_path": "RetentionStopping"}], "several ForgettingProbes"),
        ([options(0), {**stopping}], "no ForgettingProbe has the name 'b'"),
        ([options(0, name="a/b")], "name is 'a/b'"),
    ):
        with pytest.raises(SFTError, match=says):
            run("wrong", *callbacks)


# ------------------------------------------------------------------------------------------- stopping


def test_a_catastrophe_ends_the_run_and_the_model_is_one_that_remembers(files, model_folder, tmp_path):
    import transformers

    measured = probe(files, every_n_steps=1, name="main")
    stopping = RetentionStopping(0.9, patience=2, probe="main")
    told = {name: Told() for name in ("val/loss", "forgetting-main/retention")}  # what a sweep hears
    hearing = [Reporter(name, each) for name, each in told.items()]
    at_the_end = probe(files, every_n_steps=0, name="other")
    module = train(
        model_folder("llama"), files, tmp_path / "run", at_the_end, measured, stopping, *hearing, adapter=Full(),
        steps=40, rate=2.0,
    )  # fmt: skip
    assert module.trainer.global_step < 10
    assert "below 0.9" in (stopping.reason or "")
    assert measured.history[-2]["step"] == module.trainer.global_step
    assert measured.history[-2]["retention"] < 0.9
    best = stopping.best()
    assert best is not None
    assert best["retention"] >= 0.9
    assert module.restored == best["step"] == measured.history[-1]["step"] == at_the_end.history[-1]["step"]
    assert at_the_end.history[-1]["retention"] == pytest.approx(best["retention"], abs=1e-6)
    retention = told["forgetting-main/retention"]
    assert retention[-1] == best["retention"] > retention[-2]
    module.export(tmp_path / "model")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    nll, tokens = 0.0, 0
    for example in module.data.prepared["val"].examples:
        trained = torch.tensor(example.weights[1:]) > 0
        targets = torch.tensor(example.input_ids[1:].tolist())[:, None]
        nll -= float(log_p(exported, example.input_ids.tolist()).gather(1, targets)[trained].sum())
        tokens += int(trained.sum())
    assert told["val/loss"][-1] == pytest.approx(nll / tokens, abs=1e-5)
    again = ForgettingProbe(measured.domains, every_n_steps=0, task_examples=0)
    again._loaded, again.baseline = measured._loaded, measured.baseline
    assert again.measure(module.trainer, module)["retention"] == pytest.approx(best["retention"], abs=1e-6)
    kept = {Path(each["file"]).name for each in stopping.archive}
    assert {path.name for path in (tmp_path / "run" / "pareto").iterdir()} == kept


@pytest.mark.parametrize(
    ("measured", "reason"),
    [
        (
            [(0.8, 1.0), (0.95, 2.0), (0.8, 3.0), (0.9, 4.0), (0.8, 5.0), (0.89, 6.0)],
            "retention 0.890 is below",
        ),
        ([(0.9, 1.0), (0.9, 1.0), (0.9, 2.0), (0.9, 1.5), (0.9, 2.0)], "the objective is not above 2.000"),
    ],
)
def test_patience_is_counted_in_measurements_in_a_row(measured, reason, monkeypatch):
    stopping = RetentionStopping(0.9, patience=2)
    monkeypatch.setattr(stopping, "_archive", lambda trainer, point: None)
    trainer = SimpleNamespace(should_stop=False, is_global_zero=True, global_step=0)
    for step, (kept, objective) in enumerate(measured):
        assert not trainer.should_stop
        record = {"step": step, "retention": kept, "gain": 0.0, "objective": objective}
        monkeypatch.setattr(
            stopping, "_probe", lambda trainer, r=record: SimpleNamespace(latest=lambda *_: r)
        )
        for _ in range(2):  # the same measurement is counted once
            stopping._look(trainer, None)
    assert trainer.should_stop
    assert reason in (stopping.reason or "")


def test_the_archive_holds_what_nothing_else_beats(files, model_folder, tmp_path):
    stopping = RetentionStopping(0.0, patience=99)
    points = [(0.0, 1.0), (0.5, 0.8), (0.4, 0.7), (0.5, 0.9), (0.6, 0.85), (0.6, 0.85), (math.nan, 0.0)]

    class Saving:
        default_root_dir = tmp_path
        is_global_zero = True

        def save_checkpoint(self, path, weights_only):
            path.parent.mkdir(exist_ok=True)
            path.write_text("")

    last = tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()

    def there() -> list[int]:
        return sorted(int(path.stem.removeprefix("step-")) for path in (tmp_path / "pareto").iterdir())

    for step, (gain, kept) in enumerate(points):
        stopping._archive(Saving(), {"step": step, "gain": gain, "retention": kept, "objective": gain + kept})
    assert [each["step"] for each in stopping.archive] == [0, 3, 4]
    assert there() == [0, 1, 3, 4]  # a run that is killed now would go on from before 1 was beaten
    last.write_text("")
    stopping._clean(Saving())
    assert there() == [0, 3, 4]
    (tmp_path / "pareto/step-9.ckpt").write_text("")  # of steps after which the run was killed
    (tmp_path / "pareto/step-9.ckpt.partial").write_text("")
    stopping.on_fit_end(Saving(), None)
    assert there() == [0, 3, 4]
    moved = {"step": 3, "file": "/elsewhere/pareto/step-3.ckpt"}
    assert stopping._existing(Saving(), moved) == tmp_path / "pareto/step-3.ckpt"
    with pytest.raises(SFTError, match="those of step 7, are gone"):
        stopping._existing(Saving(), {"step": 7, "file": str(tmp_path / "pareto/step-7.ckpt")})
    stopping.min_retention = 0.88
    assert stopping.best()["step"] == 3
    stopping.min_retention = 0.0
    stopping.archive = [{**each, "objective": -each["gain"]} for each in stopping.archive]
    assert stopping.best()["step"] == 0  # by J, not by gain
    stopping.min_retention = 1.1
    assert stopping.best()["step"] == 0


# --------------------------------------------------------------------------------------- kill and resume


def test_history_and_archive_survive_a_kill(files, model_folder, tmp_path, monkeypatch):
    from lightning_sft import cli

    domains = [{"name": "text", "text": files["texts"]}, {"name": "facts", "questions": files["questions"]}]
    results = {}
    for case in ("whole", "killed"):
        folder = tmp_path / case
        folder.mkdir()
        monkeypatch.chdir(folder)
        callbacks = [
            {"class_path": "resume_run.Stop"},
            {"class_path": "RetentionStopping", "init_args": {"min_retention": 0.0, "patience": 99}},
            {"class_path": "ForgettingProbe", "init_args": {"domains": domains, "every_n_steps": 2}},
        ]
        config = write_config(
            folder, model_folder("llama"), model={"adapter": "Full", "learning_rate": 1e-3},
            trainer={"callbacks": callbacks},
        )  # fmt: skip
        for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "LIGHTNING_SFT_RUN_FOLDER", STOP):
            monkeypatch.setenv(variable, "0")
        monkeypatch.delenv("LIGHTNING_SFT_RUN_FOLDER")
        if case == "killed":
            monkeypatch.setenv(STOP, "batch_start:10")
            with pytest.raises(Stopped):
                cli.run(["fit", "--config", str(config)])
            monkeypatch.setenv(STOP, "")
            monkeypatch.delenv("LIGHTNING_SFT_RUN_FOLDER", raising=False)
            cli.run(["fit", "--config", str(config), "--ckpt_path", "last"])
        else:
            cli.run(["fit", "--config", str(config)])
        run = folder / "runs" / "my-1"
        results[case] = (
            json.loads((run / "forgetting.json").read_text())["history"],
            sorted(path.name for path in (run / "pareto").iterdir()),
            (run / "model" / "model.safetensors").read_bytes(),
        )
        *_, before, last = (f"knowledge | {record['retention']:.3f} " for record in results[case][0])
        assert last != before
        assert last in (run / "model/README.md").read_text()
    assert [record["step"] for record in results["whole"][0]] == [0, 2, 4, 6, 8, 10]
    assert results["killed"] == results["whole"]


@pytest.mark.parametrize("exported", [True, False], ids=["after the export", "before it"])
def test_a_run_that_is_killed_at_its_end_still_ends_with_the_best(
    exported, files, model_folder, tmp_path, monkeypatch
):
    domains = [{"name": "text", "text": files["texts"]}]
    probing = {"domains": domains, "every_n_steps": 3}
    models = []
    for stop in (None, "train_end:1"):
        folder = tmp_path / str(stop)
        folder.mkdir()
        monkeypatch.chdir(folder)
        callbacks = [
            {"class_path": "resume_run.Stop"},
            {"class_path": "RetentionStopping", "init_args": {"min_retention": 0.9, "patience": 99}},
            {"class_path": "ForgettingProbe", "init_args": probing},
        ]
        config = write_config(
            folder, model_folder("llama"), model={"adapter": "Full", "learning_rate": 0.2},
            trainer={"callbacks": callbacks, "gradient_clip_val": 1.0},
        )  # fmt: skip
        run = Path("runs/my-1")
        if stop is None:
            fit(config)
        else:
            with pytest.raises(Stopped):
                fit(config, stop=stop)
            assert (run / "model").exists()
            if not exported:
                shutil.rmtree(run / "model")
                (run / run_folder.ENDING).unlink()
            fit(config, "--ckpt_path", "last")
        saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        history = json.loads((run / "forgetting.json").read_text())["history"]
        weights = load_file(run / "model/model.safetensors")
        models.append((weights, history, sorted(path.name for path in (run / "pareto").iterdir())))
        last = {name.removeprefix("model."): tensor for name, tensor in saved.items()}
        assert not torch.equal(weights["model.norm.weight"], last["model.norm.weight"])
        assert not (run / run_folder.ENDING).exists()
        with pytest.raises(SFTError, match="is finished"):
            fit(config, "--ckpt_path", "last", "--trainer.default_root_dir", run)
    steps = [record["step"] for record in models[0][1]]
    assert steps[:-1] == [0, 3, 6, 9, 10]
    assert steps[-1] == 0 or steps[-1] in steps[1:-2], "the last record is of the weights that were restored"
    card = (run / "model/README.md").read_text()
    assert f"knowledge | {models[0][1][-1]['retention']:.3f} " in card
    assert models[0][1:] == models[1][1:]
    assert all(torch.equal(models[0][0][name], models[1][0][name]) for name in models[0][0])


# --------------------------------------------------------------------------------------------- mistakes


def test_a_text_that_is_trained_on_is_refused(files, model_folder, tmp_path):
    same = rows(tmp_path / "same.jsonl", [{"text": "something else"}, {"text": TEXTS[0]}])
    with pytest.raises(SFTError, match=r"is trained on .*same.jsonl, row 2") as caught:
        train(model_folder("llama"), {**files, "train": same}, tmp_path / "run", probe(files))
    assert "domain text" in caught.value.where
    assert "row 1" in caught.value.where


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"domains": []}, "at least one"),
        ({"domains": [("a", {"text": "x"}), ("a", {"text": "y"})]}, "name of its own"),
        ({"domains": [("a", {"text": "x", "weight": 0.0})]}, "all weights are 0"),
        ({"domains": [("a", {})]}, "either text, questions or an evaluator"),
        ({"domains": [("a", {"text": "x", "questions": "y"})]}, "either text, questions or an evaluator"),
        ({"domains": [("a", {"questions": "y", "prompt": "?"})]}, "no {question} in the prompt"),
        ({"domains": [("a", {"text": "x", "limit": 0})]}, "limit is 0"),
        ({"domains": [("a", {"text": "nowhere.jsonl"})]}, "no such file"),
        ({"cost": 0.0}, "share above 0"),
        ({"kl_top_k": -1}, "kl_top_k is -1"),
        ({"task_examples": -1}, "task_examples is -1"),
        ({"strictness": math.nan}, "strictness is nan"),
        ({"domains": [("", {"text": "x"})]}, "no name"),
        ({"domains": [("a", {"text": "x", "weight": math.inf})]}, "weight is inf"),
        ({"every_n_steps": -1}, "every_n_steps is -1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, says):
    def made() -> ForgettingProbe:
        if "domains" in options:
            return ForgettingProbe([Domain(name, **parts) for name, parts in options["domains"]])
        return ForgettingProbe(**options)

    with pytest.raises(SFTError, match=says):
        made()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "a"}, "no question with choices"),
        ({"question": "a", "choices": ["b"], "answer": 0}, "no question with choices"),
        ({"question": "a", "choices": ["b", "b"], "answer": 0}, "no question with choices"),
        ({"question": "a", "choices": ["b", ""], "answer": 0}, "no question with choices"),
        ({"question": "a", "choices": ["b", "c"], "answer": 2}, "answer is 2, and there are 2 choices"),
        ({"question": "a", "choices": ["b", "c"], "answer": "c"}, "answer is 'c'"),
    ],
)
def test_a_bad_question_is_named(row, says, files, model_folder, tmp_path):
    bad = rows(tmp_path / "bad.jsonl", [QUESTIONS[0], row])
    callback = ForgettingProbe([Domain("facts", questions=bad)], every_n_steps=0)
    with pytest.raises(SFTError, match=says) as caught:
        train(model_folder("llama"), files, tmp_path / "run", callback)
    assert "domains: facts" in caught.value.where
    assert "row 2" in caught.value.where


def test_stopping_needs_a_probe(files, model_folder, tmp_path):
    with pytest.raises(SFTError, match="no ForgettingProbe"):
        train(model_folder("llama"), files, tmp_path / "run", RetentionStopping())


def test_a_domain_of_an_evaluator_is_the_same_one_in_another_process():
    from lightning_sft_callbacks.domains import load
    from lightning_sft_evaluators.multiple_choice import MultipleChoice

    def digest(**options) -> str:
        given = {"path": "tiny:facts", "prompt": "{{ question }}", "choices": "choices", "answer": "answer"}
        return load(Domain(name="facts", evaluator=MultipleChoice(**given | options), limit=4), None).digest

    kept = MultipleChoice("tiny:facts", "{{ question }}", "choices", "answer")  # so that addresses differ
    assert digest() == digest()
    assert len({digest(), digest(prompt="Q: {{ question }}"), digest(metrics=["acc"])}) == 3
    del kept
