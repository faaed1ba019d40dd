"""The trials of a sweep: what they try, what becomes of them, and how a sweep goes on; without training."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import yaml

from lightning_sft import cli, run_folder
from lightning_sft.__main__ import main
from lightning_sft.errors import SFTError
from lightning_sft.sweeping import command, results
from lightning_sft.sweeping.options import FitOptions
from lightning_sft.sweeping.space import read
from lightning_sft.sweeping.study import MetricMissing, Plan, Study
from lightning_sft.sweeping.trial import Reporter

SEARCH = ["model.learning_rate=log_uniform(1e-5,1e-1)", "model.adapter.r=choice(4,8,16)"]
FIT = [
    "--model.base=tiny", "--model.adapter=LoRA", "--data.train=[{path: tiny:train}]", "--data.val=tiny:held_out",
    "--trainer.accelerator=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def options():
    return FitOptions(FIT)


class Taken:
    """Options that nobody checks, of a small configuration."""

    resolved = {"model": {"learning_rate": 0.1, "adapter": {"class_path": "LoRA", "init_args": {"r": 1}}}}

    def accepted(self, config):
        return config


class Quick(Study):
    """Trials whose value is a function of their options, told in `lengths` steps."""

    lengths = 3
    killed_at = -1

    def _listened(self, trial, folder):
        config = yaml.safe_load(results.config_of(folder).read_text())
        rate = config["model"]["learning_rate"]
        value = abs(math.log10(rate) + 3) + config["model"]["adapter"]["init_args"]["r"] / 100
        for at in range(1, self.lengths + 1):
            if (trial.number, at) == (self.killed_at, self.lengths):
                raise KeyboardInterrupt
            if self._stops(trial, value + 1 / at, 1000 * at):
                return at < self.lengths, []
        return False, []


def study(folder, kind=Quick, options=None, **plan) -> Study:
    folder.mkdir(exist_ok=True)
    return kind(folder, Plan(**{"parameters": read(SEARCH), **plan}), options or Taken())


# ------------------------------------------------------------------------------------------------- trials


@pytest.mark.parametrize(
    "sampler",
    [pytest.param("tpe", marks=pytest.mark.slow), "random", pytest.param("grid", marks=pytest.mark.slow)],
)
def test_a_sweep_that_was_killed_goes_on_as_if_it_had_not_been(sampler, tmp_path):
    search = ["model.learning_rate=choice(1e-5,1e-4,1e-3,1e-2)", SEARCH[1]] if sampler == "grid" else SEARCH
    plan = {"sampler": sampler, "parameters": read(search)}
    whole = study(tmp_path / "whole", **plan)
    whole.run(12, None)
    assert type(whole._study.sampler).__name__ == ("TPESampler" if sampler == "tpe" else "RandomSampler")
    killed = study(tmp_path / "killed", **plan)
    for killed.killed_at in (0, 10):
        with pytest.raises(KeyboardInterrupt):
            killed.run(12, None)
        assert killed.trials()[-1].state == "unfinished"
    again = study(tmp_path / "killed", **plan)
    again.run(12, None)
    assert [(t.state, t.value, t.parameters) for t in again.trials()] == [
        (t.state, t.value, t.parameters) for t in whole.trials()
    ]
    assert len({tuple(trial.parameters.values()) for trial in whole.trials()}) == 12
    assert [trial.number for trial in whole.trials()] == list(range(12))


def test_seeds_draw_differently(tmp_path):
    drawn = []
    for seed in (0, 0, 1):
        found = study(tmp_path / str(len(drawn)), sampler="random", seed=seed)
        found.run(3, None)
        drawn.append([trial.parameters for trial in found.trials()])
    assert drawn[0] == drawn[1]
    assert not any(a in drawn[0] for a in drawn[2])


def test_the_grid_ends_the_sweep(tmp_path):
    found = study(
        tmp_path / "s", sampler="grid", parameters=read(["model.learning_rate=choice(0.1,0.2)", SEARCH[1]])
    )
    found.run(99, None)
    assert sorted(tuple(t.parameters.values()) for t in found.trials()) == [
        (r, rate) for r in (4, 8, 16) for rate in (0.1, 0.2)
    ]


def test_no_trial_begins_after_the_time(tmp_path):
    found = study(tmp_path / "s")
    found.run(5, 0.0)
    assert found.trials() == []


def test_the_median_stops_what_is_worse_and_only_early(tmp_path):
    found = study(tmp_path / "s", pruner="median", sampler="random")
    found.run(18, None)
    for trial in found.trials():
        history = found._study.trials[trial.number].intermediate_values
        if trial.state == "pruned":
            assert max(history) < 3000
            complete = [t for t in found._study.trials[: trial.number] if t.state.name == "COMPLETE"]
            middle = sorted(t.intermediate_values[max(history)] for t in complete)[len(complete) // 2]
            assert min(history.values()) >= middle - 1e-12 or len(complete) % 2 == 0
        else:
            assert sorted(history) == [1000, 2000, 3000]
    states = [trial.state for trial in found.trials()]
    assert states[:5] == ["complete"] * 5
    assert states.count("pruned") > 2
    assert results.best_of(found.trials(), "min").value == min(
        trial.value for trial in found.trials() if trial.state == "complete"
    )


class Failing(Quick):
    """Whose trials fail with a large rank."""

    from_rank = 16

    def _listened(self, trial, folder):
        rank = yaml.safe_load(results.config_of(folder).read_text())["model"]["adapter"]["init_args"]["r"]
        if rank >= self.from_rank:
            raise SFTError(f"rank {rank} is too much")
        return super()._listened(trial, folder)


def test_a_trial_that_fails_is_noted_and_left_behind(tmp_path, capsys):
    found = study(tmp_path / "s", Failing)
    found.run(7, None)
    trials = found.trials()
    assert len(trials) == 7
    assert {(t.state, t.parameters["model.adapter.r"] == 16) for t in trials} == {
        ("failed", True),
        ("complete", False),
    }
    assert {t.error for t in trials if t.state == "failed"} == {"rank 16 is too much"}
    written = json.loads((tmp_path / "s" / "results.json").read_text())
    assert [each["error"] for each in written["trials"]] == [t.error for t in trials]
    results.show(tmp_path / "s", trials, "val/loss", "min")
    assert "too much" in capsys.readouterr().out


def test_nothing_but_failures_ends_the_sweep(tmp_path):
    found = study(tmp_path / "s", Failing)
    found.from_rank = 1
    with pytest.raises(SFTError, match=r"3 trials in a row have failed.*too much"):
        found.run(9, None)
    assert len(found.trials()) == 3
    assert not (tmp_path / "s" / "best.yaml").exists()


class Uneven(Quick):
    """Whose second epoch is longer than the first one, and ends early in two steps of one thousandth."""

    def _listened(self, trial, folder):
        for value, at in ((3.0, 1000), (2.0, 917), (1.0, 917)):
            self._stops(trial, value, at)
        return False, []


def test_the_value_is_the_last_that_was_told(tmp_path):
    found = study(tmp_path / "s", Uneven)
    found.run(1, None)
    assert [trial.value for trial in found.trials()] == [1.0]


class Diverging(Quick):
    def _stops(self, trial, value, at):
        return super()._stops(trial, math.nan if at == 3000 else value, at)


def test_a_trial_that_ends_with_no_number_has_failed(tmp_path):
    found = study(tmp_path / "s", Diverging)
    found.run(2, None)
    assert [trial.state for trial in found.trials()] == ["failed"] * 2
    assert "val/loss is nan at the end" in found.trials()[0].error
    assert not (tmp_path / "s" / "best.yaml").exists()


class Ended(Quick):
    """Whose sweep is killed when a run has ended."""

    def _listened(self, trial, folder):
        super()._listened(trial, folder)
        raise KeyboardInterrupt


@pytest.mark.parametrize(("stops", "state"), [(False, "complete"), (True, "pruned")])
def test_a_run_that_had_ended_is_noted_and_not_run_again(stops, state, tmp_path, monkeypatch):
    from lightning_sft.sweeping import study as module

    monkeypatch.setattr("optuna.trial.Trial.should_prune", lambda trial: stops)
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path / "s", Ended).run(1, None)
    monkeypatch.setattr(module.resume, "is_finished", lambda folder: True)
    again = study(tmp_path / "s", Ended)
    again.run(1, None)
    assert [trial.state for trial in again.trials()] == [state]


class Silent(Quick):
    def _listened(self, trial, folder):
        return False, ["train/loss", "validation/loss", "epoch"]


def test_a_metric_that_no_run_logs_ends_the_sweep_at_once(tmp_path):
    found = study(tmp_path / "s", Silent)
    with pytest.raises(MetricMissing, match="has logged no val/loss") as caught:
        found.run(9, None)
    assert "train/loss, validation/loss" in caught.value.fix
    assert [trial.state for trial in found.trials()] == ["failed"]
    assert len(json.loads((tmp_path / "s" / "results.json").read_text())["trials"]) == 1


# ------------------------------------------------------------------------------------------------ results


def test_the_table_holds_every_trial_and_the_best_can_be_fitted(tmp_path, options):
    folder = tmp_path / "s"
    for mode in ("max", "min"):
        found = study(tmp_path / mode, options=options, mode=mode)
        found.run(4, None)
    folder = tmp_path / "min"
    with (folder / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    written = json.loads((folder / "results.json").read_text())
    assert [float(row["val/loss"]) for row in table] == [trial.value for trial in found.trials()]
    assert [float(row["model.learning_rate"]) for row in table] == [
        trial.parameters["model.learning_rate"] for trial in found.trials()
    ]
    assert [row["folder"] for row in table] == [str(folder / "trials" / f"{n:03}") for n in range(4)]
    values = [float(row["val/loss"]) for row in table]
    assert written["best"] == values.index(min(values))
    highest = json.loads((tmp_path / "max" / "results.json").read_text())
    every = [trial["value"] for trial in highest["trials"]]
    assert highest["best"] == every.index(max(every))
    best = FitOptions(["--config", str(folder / "best.yaml")]).resolved
    chosen = found.trials()[written["best"]].parameters
    assert best["model"]["learning_rate"] == chosen["model.learning_rate"]
    assert best["model"]["adapter"]["init_args"]["r"] == chosen["model.adapter.r"]
    same = options.resolved | {"model": best["model"]}
    assert best == same


def test_keys_are_shortened_as_far_as_they_differ():
    keys = ["a.lr", "b.c.r", "b.d.r", "d.r", "x"]
    assert results.shortened(keys) == {"a.lr": "lr", "b.c.r": "c.r", "b.d.r": "b.d.r", "d.r": "d.r", "x": "x"}


# --------------------------------------------------------------------------------- before the first trial


@pytest.mark.parametrize(
    ("search", "says", "fix"),
    [
        ("model.lerning_rate=uniform(0,1)", "no option is named 'lerning_rate'", "model.learning_rate"),
        ("model.adapter.rank=choice(4,8)", "LoRA has no option 'rank'", "its options"),
        ("model.adapter.r=choice(4,x)", "expected int, got 'x'", None),
        ("model.adapter=choice(LoRA,Fulll)", "no adapter is named 'Fulll'", "did you mean Full"),
        ("trainer.max_epochs=uniform(1,2)", "expected int, null, got '1.0'", None),
        ("model.schedule=choice(cosine,cosin)", "got 'cosin'", None),
        ("data.train.0.lim=choice(4,8)", "Source has no option 'lim'", "limit"),
        ("data.train.7.limit=choice(4,8)", "'7' is no place in a list of 1", "from 0"),
        ("model.adapter=choice(Full,LoRA) model.adapter.r=choice(4,8)", "Full has no option 'r'", None),
        ("ckpt_path=choice(a,b)", "a sweep chooses it", None),
    ],
)
def test_what_the_parser_refuses_is_named_before_any_trial(search, says, fix, options):
    with pytest.raises(SFTError, match=says) as caught:
        options.check(read(search.split()))
    assert caught.value.where.startswith(f"--search {search.split()[-1].partition('=')[0]}")
    assert fix is None or fix in caught.value.fix


def test_what_it_takes_is_taken(options):
    options.check(
        read(
            [
                "model.adapter=choice(LoRA,{class_path: Full})", "data.train.0.weight=uniform(1,3)",
                "model.optimizer.class_path=choice(torch.optim.SGD)", "model.optimizer.momentum=uniform(0,0.9)",
                "trainer.max_epochs=int(1,4)", "model.render.train_on_eot=choice(turn,last)",
            ]
        )
    )  # fmt: skip


def test_the_shipped_search_fits_its_config():
    folder = Path(__file__).parents[2] / "configs/sweeps"
    FitOptions(["--config", str(folder / "tiny.yaml")]).check(read([str(folder / "search.yaml")]))


def fails(capsys, *argv: str) -> str:
    assert main(["sweep", *argv]) == 2
    return capsys.readouterr().err


def test_mistakes_of_the_command_line_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    search = ["--search", SEARCH[0]]
    assert "no validation data" in fails(capsys, *search, "--model.base=tiny", "--data.train=tiny:train")
    assert "no option is named 'trails'" in fails(capsys, *search, *FIT, "--trails", "3")
    assert "a sweep chooses it for each trial" in fails(capsys, *search, *FIT, "--trainer.default_root_dir=x")
    assert "trials is 0" in fails(capsys, *search, *FIT, "--trials", "0")
    assert "a grid has no end" in fails(capsys, *search, *FIT, "--sampler=grid")
    assert not (tmp_path / "sweeps").exists()
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert "pip install 'lightning-sft[sweep]'" in fails(capsys, *search, *FIT)


def test_the_folder_is_named_after_the_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(json.dumps({"data": {"train": "tiny:train", "val": "tiny:held_out"}}))
    arguments = ["--config=my.yaml", "--model.base=tiny", "--search", SEARCH[0], "--timeout=0"]
    assert main(["sweep", *arguments]) == 0
    assert "The sweep is in sweeps/my" in capsys.readouterr().out


def test_a_definition_that_was_not_written_to_its_end_is_not_there(tmp_path, options, monkeypatch):
    definition = {"fit": options.resolved, "sweep": Plan(read(SEARCH)).as_json()}
    write_text = Path.write_text

    def killed(path, text, **given):
        write_text(path, text[:9], **given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            command._claim(tmp_path, definition)
    run_folder.unlock(tmp_path)
    command._claim(tmp_path, definition)
    run_folder.unlock(tmp_path)


def test_no_two_sweeps_share_a_folder(tmp_path, options):
    plan = Plan(read(SEARCH)).as_json()
    command._claim(tmp_path, {"fit": options.resolved, "sweep": plan})
    run_folder.unlock(tmp_path)
    command._claim(tmp_path, {"fit": options.resolved, "sweep": plan})  # the same one
    run_folder.unlock(tmp_path)
    other = Plan(read([SEARCH[0], "model.adapter.r=choice(4,8)"]), mode="max").as_json()
    config = {**options.resolved, "seed_everything": 1}
    with pytest.raises(SFTError, match="holds another sweep") as caught:
        command._claim(tmp_path, {"fit": config, "sweep": other})
    for line in (
        "seed_everything: 0 -> 1", "mode: 'min' -> 'max'",
        "search.model.adapter.r.choice: [4, 8, 16] -> [4, 8]",
    ):  # fmt: skip
        assert line in caught.value.what


# --------------------------------------------------------------------------------------------- the callback


class Heard:
    """Stands in for the sweep: wants to stop at the n-th value."""

    def __init__(self, last: int) -> None:
        self.last, self.values, self.ending = last, [], {}

    def wants_to_stop(self, value, at):
        self.values.append((at, value))
        return len(self.values) == self.last

    def tell(self, **line):
        self.ending = line


@pytest.mark.parametrize(("metric", "last"), [("val/loss", 2), ("forgetting/retention", 2), ("val/loss", 99)])
def test_values_are_told_as_they_are_logged_and_the_run_stops(metric, last, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    config = {
        "model": {"base": "tiny", "adapter": "LoRA", "preflight": False},
        "data": {
            "train": [{"path": "tiny:train", "format": "Alpaca", "limit": 16}], "batch_size": 4,
            "val": [{"path": "tiny:held_out", "format": "Alpaca", "limit": 4}],
        },
        "trainer": {
            "max_epochs": 3, "accelerator": "cpu", "enable_progress_bar": False, "val_check_interval": 0.5,
            "callbacks": [{
                "class_path": "ForgettingProbe",
                "init_args": {"every_n_steps": 3, "domains": [{"name": "a", "text": "tiny:general", "limit": 2}]},
            }],
        },
    }  # fmt: skip
    (tmp_path / "my.yaml").write_text(json.dumps(config))
    heard = Heard(last)
    cli.run(["fit", "--config", "my.yaml"], [Reporter(metric, heard)])
    with (tmp_path / "runs/my-1/metrics.csv").open() as file:
        logged = [float(row[metric]) for row in csv.DictReader(file) if row.get(metric)]
    assert [value for _, value in heard.values] == pytest.approx(logged)
    steps = {"val/loss": [500, 1000, 1500, 2000, 2500, 3000], "forgetting/retention": [0, 750]}[metric]
    assert [at for at, _ in heard.values] == steps[:last]
    assert heard.ending["cut"] == (last == 2)
    assert metric in heard.ending["names"]
    assert "sweep" not in (tmp_path / "runs/my-1/config.yaml").read_text()
