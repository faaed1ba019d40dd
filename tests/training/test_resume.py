"""A run that was stopped and continued is the run that was never stopped, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import resume_run
import torch
import yaml
from resume_run import Stopped, fit, losses, metrics, same_weights, write_config

from lightning_sft import SFTError
from lightning_sft.__main__ import main
from lightning_sft.training import checkpoints, fingerprint
from lightning_sft.training.checkpoints import AtomicCheckpointIO
from lightning_sft.training.metrics_file import MetricsFile, read_rows


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def config(here: Path, model_folder) -> Path:
    return write_config(here, model_folder("llama"))


def raise_stopped(*args: object) -> None:
    raise Stopped


RUN = Path("runs") / "my-1"
LAST = RUN / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model_folder) -> Path:
    """The folder of a run of the plain configuration that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    fit(write_config(folder, model_folder("llama")), "--trainer.default_root_dir", folder / "run")
    return folder / "run"


def step_of(checkpoint: Path) -> int:
    return int(torch.load(checkpoint, weights_only=True)["global_step"])


# ------------------------------------------------------------------------------------------------ exactness

FULL = {"adapter": "Full", "learning_rate": 1e-3}
CASES = {
    # 20 rows in 10 batches, 5 steps an epoch: after which step the checkpoint is, what stops the run, options
    "inside the first epoch": (2, "batch_start:6", {}),
    "inside an accumulation window": pytest.param(2, "batch_end:5", {}, marks=pytest.mark.slow),
    "at an optimizer step": pytest.param(2, "optimizer_step:3", {}, marks=pytest.mark.slow),
    "inside the second epoch": (7, "batch_start:16", {}),
    "before the last batch of an epoch": pytest.param(4, "batch_end:10", {}, marks=pytest.mark.slow),
    "at the end of an epoch": (4, "epoch_end:1", {}),
    "at the start of the next epoch": (5, "epoch_start:2", {}),
    "workers": pytest.param(7, "batch_start:16", {"data": {"num_workers": 2}}, marks=pytest.mark.slow),
    "full": (3, "batch_start:7", {"model": FULL}),
    "new tokens": (7, "batch_start:16", {"model": {"new_tokens": ["hello there", "<new>"]}}),
    "new tokens, full": pytest.param(
        3, "batch_start:7", {"model": {**FULL, "new_tokens": ["hello there"]}}, marks=pytest.mark.slow
    ),
    "after a validation inside an epoch": (2, "batch_start:5", {"trainer": {"val_check_interval": 4}}),
    "before a validation": pytest.param(
        1, "validation_end:1", {"trainer": {"val_check_interval": 4}}, marks=pytest.mark.slow
    ),
    "max_steps, inside": pytest.param(
        6, "batch_end:13", {"trainer": {"max_steps": 8, "max_epochs": -1}}, marks=pytest.mark.slow
    ),
    "max_steps, between epochs": (5, "batch_start:11", {"trainer": {"max_steps": 8, "max_epochs": -1}}),
    "a limit and a short last window": (6, "batch_end:13", {"trainer": {"limit_train_batches": 7}}),
    "the last batch of an epoch is next": (9, "batch_end:10", {"trainer": {"accumulate_grad_batches": 1}}),
    "validations counted over epochs": (
        6,
        "batch_end:14",
        {"trainer": {"val_check_interval": 3, "check_val_every_n_epoch": None}},
    ),
    "packs, in the second epoch": (
        5,
        "batch_start:12",
        {"data": {"packing": True, "pack_length": 90, "batch_size": 1}},
    ),
    "a token budget, in the second epoch": (5, "batch_start:12", {"data": {"batch_tokens": 90}}),
    "packs of a mixture, in the second epoch": (
        5,
        "batch_start:12",
        {
            "data": {
                "train": [{"path": "rows.jsonl", "weight": 0.7}, {"path": "rows.jsonl", "weight": 1.5}],
                "packing": True,
                "pack_length": 120,
                "batch_size": 1,
            }
        },
    ),
    "a mixture at the start of an epoch": (
        5,
        "epoch_start:2",
        {"data": {"train": [{"path": "rows.jsonl", "weight": 1.3}], "batch_tokens": 90}},
    ),
    "no validation": pytest.param(6, "epoch_start:2", {"data": {"val_split": None}}, marks=pytest.mark.slow),
}


@pytest.mark.parametrize(("step", "stop", "options"), CASES.values(), ids=CASES.keys())
def test_a_stopped_run_goes_on_as_the_one_that_was_not(
    here, model_folder, request, step: int, stop: str, options: dict, capsys
) -> None:
    config = write_config(here, model_folder("llama"), **options)
    whole = Path("whole") if options else request.getfixturevalue("whole")
    if options:
        fit(config, "--trainer.default_root_dir", whole)
    with pytest.raises(Stopped):
        fit(config, stop=stop)
    assert step_of(LAST) == step > 0
    assert not (RUN / "model").exists()
    capsys.readouterr()
    fit(config, "--ckpt_path", "last")
    assert f"Continuing {RUN} after step {step} " in capsys.readouterr().out
    assert [path.name for path in Path("runs").iterdir()] == ["my-1"]
    assert metrics(RUN) == metrics(whole)  # every row, validation and the drawn noise included
    assert same_weights(RUN, whole)


def test_only_the_steps_after_the_checkpoint_are_computed_again(config) -> None:
    with pytest.raises(Stopped):
        fit(config, "--checkpoints.every_n_steps", "3", stop="batch_start:9")
    before = metrics(RUN)
    assert [int(row["step"]) for row in before] == [0, 1, 2, 3]
    assert step_of(LAST) == 3
    with pytest.raises(Stopped):  # the first step of the continued run: there is a checkpoint of the third
        fit(config, "--checkpoints.every_n_steps", "3", "--ckpt_path", "last", stop="batch_end:3")
    again = metrics(RUN)
    assert [int(row["step"]) for row in again] == [0, 1, 2, 3]
    assert again == before


def test_workers_change_no_draw(config, whole) -> None:
    fit(config, "--data.num_workers", "2")
    assert metrics(RUN) == metrics(whole)


def test_every_batch_and_epoch_draws_anew(whole) -> None:
    draws = [row["noise/torch"] for row in metrics(whole) if row["noise/torch"]]
    assert len(draws) == len(set(draws)) == 10


def test_a_run_that_was_stopped_while_it_wrote_its_model_is_finished(config, monkeypatch, whole) -> None:
    from lightning_sft_adapters.lora import LoRA

    with monkeypatch.context() as patch:
        patch.setattr(LoRA, "export", raise_stopped)
        with pytest.raises(Stopped):
            fit(config)
    assert step_of(LAST) == 10
    fit(config, "--ckpt_path", "last")
    assert same_weights(RUN, whole)
    assert metrics(RUN) == metrics(whole)


def test_a_run_that_early_stopping_ended_trains_no_further(here, model_folder, monkeypatch) -> None:
    from lightning_sft_adapters.lora import LoRA

    stopping = {
        "class_path": "EarlyStopping",
        "init_args": {"monitor": "val/loss", "patience": 1, "min_delta": 9.0},
    }
    options = {"max_epochs": 6, "callbacks": [stopping]}
    config = write_config(here, model_folder("llama"), trainer=options)
    fit(config, "--trainer.default_root_dir", "whole")
    assert 5 < len(losses(Path("whole"))) < 30
    with monkeypatch.context() as patch:
        patch.setattr(LoRA, "export", raise_stopped)
        with pytest.raises(Stopped):
            fit(config)
    fit(config, "--ckpt_path", "last")
    assert metrics(RUN) == metrics(Path("whole"))
    assert same_weights(RUN, Path("whole"))


def test_the_best_checkpoint_is_the_same_one(config, whole) -> None:
    with pytest.raises(Stopped):
        fit(config, stop="validation_end:2")
    fit(config, "--ckpt_path", "last")
    best, other = ({path.name for path in (run / "checkpoints").iterdir()} for run in (RUN, whole))
    assert best == other
    assert len(best) == 2


@pytest.mark.parametrize("batch", [6, 7], ids=["after a step", "inside an accumulation window"])
def test_sigterm_makes_a_checkpoint(batch, config, monkeypatch, whole) -> None:
    calls = []

    def batch_end(self, trainer, *args) -> None:
        calls.append(trainer.global_step)
        if len(calls) == batch:
            os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(resume_run.Stop, "on_train_batch_end", batch_end)
            with pytest.raises(KeyboardInterrupt):
                fit(config, "--checkpoints.every_n_steps", "null")
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert step_of(LAST) == 3
    fit(config, "--ckpt_path", "last")
    assert metrics(RUN) == metrics(whole)


def test_a_run_that_ended_inside_an_epoch_is_made_longer_from_there(here, model_folder) -> None:
    constant = {"schedule": "constant", "warmup": 0}
    config = write_config(
        here, model_folder("llama"), model=constant, trainer={"max_epochs": -1, "max_steps": 8}
    )
    fit(config, "--trainer.default_root_dir", "whole")
    fit(config, "--trainer.max_steps", "3")
    fit(config, "--trainer.default_root_dir", "longer", "--ckpt_path", LAST)
    whole, longer = losses(Path("whole")), losses(Path("longer"))
    assert longer == {step: loss for step, loss in whole.items() if step >= 3}
    assert same_weights(Path("longer"), Path("whole"))


# ---------------------------------------------------------------------------------------- when and how they are made


@pytest.mark.parametrize(
    ("minutes", "every", "saved"),
    [(0, None, [5, 10]), (0, 2, [2, 4, 5, 6, 8, 10]), (1e-9, None, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])],
)
def test_when_checkpoints_are_made(config, monkeypatch, minutes, every, saved) -> None:
    made = []

    def save(self, checkpoint, path, storage_options=None) -> None:
        if Path(path).name == "last.ckpt":
            made.append(checkpoint["global_step"])

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save)
    monkeypatch.setattr(checkpoints, "_SHARE", 0)
    options = ["--checkpoints.every_minutes", minutes, "--checkpoints.every_n_steps", json.dumps(every)]
    fit(config, *options, "--model.preflight", "false")  # preflight writes a checkpoint of its own
    assert made == saved


def test_a_slow_disk_gets_fewer_checkpoints(config, monkeypatch) -> None:
    last = checkpoints.LastCheckpoint(every_minutes=1e-9)

    class OneProcess:
        world_size, global_step = 1, 7

    last._took, last._saved_at = 1e6, checkpoints.time.monotonic()
    assert not last._is_time(OneProcess())  # type: ignore[arg-type]
    last._took = 0.0
    assert last._is_time(OneProcess())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "option", [{"every_minutes": -1.0}, {"every_minutes": float("nan")}, {"every_n_steps": 0}]
)
def test_intervals_that_make_no_sense_are_refused(option) -> None:
    with pytest.raises(SFTError, match=r"checkpoints\.every_"):
        checkpoints.LastCheckpoint(**option)


def test_a_checkpoint_that_fails_to_be_written_leaves_the_one_before(tmp_path, monkeypatch) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": torch.ones(3)}, path)
    before = path.read_bytes()

    def half(checkpoint, file) -> None:
        file.write(before[: len(before) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(checkpoints.torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        AtomicCheckpointIO().save_checkpoint({"step": torch.zeros(3)}, path)
    assert path.read_bytes() == before


def test_no_checkpoint_holds_python_objects(whole) -> None:
    for path in (whole / "checkpoints").iterdir():
        torch.load(path, weights_only=True)


# ------------------------------------------------------------------------------------------------ which run


@pytest.fixture
def stopped(config) -> Path:
    """A run that was stopped after four steps, in `runs/my-1`."""
    with pytest.raises(Stopped):
        fit(config, stop="batch_start:9")
    return config


def test_last_without_a_run_is_an_error_that_says_what_was_looked_for(config) -> None:
    with pytest.raises(SFTError) as caught:
        fit(config, "--ckpt_path", "last")
    assert str(Path("runs").resolve()) in str(caught.value)
    assert "auto" in str(caught.value.fix)
    assert not Path("runs").exists()


def test_auto_starts_anew_where_there_is_no_run_and_goes_on_where_there_is(config, capsys) -> None:
    with pytest.raises(Stopped):
        fit(config, "--ckpt_path", "auto", stop="batch_start:9")
    capsys.readouterr()
    fit(config, "--ckpt_path", "auto")
    assert "after step 4 " in capsys.readouterr().out
    fit(config, "--ckpt_path", "auto", "--trainer.max_epochs", "1")
    assert sorted(path.name for path in Path("runs").iterdir()) == ["my-1", "my-2"]


def test_auto_starts_anew_in_a_folder_whose_run_came_to_no_checkpoint(config) -> None:
    arguments = ["--ckpt_path", "auto", "--trainer.default_root_dir", "mine"]
    with pytest.raises(Stopped):
        fit(config, *arguments, stop="batch_end:1")
    assert (Path("mine") / "config.yaml").exists()
    fit(config, *arguments)
    assert list(losses(Path("mine"))) == list(range(10))
    with pytest.raises(SFTError, match="finished"):
        fit(config, *arguments)


def test_a_run_stopped_before_its_first_checkpoint_is_named(config) -> None:
    with pytest.raises(Stopped):
        fit(config, stop="batch_end:1")
    with pytest.raises(SFTError, match=r"my-1 was stopped before its first"):
        fit(config, "--ckpt_path", "last")


def test_of_several_runs_the_newest_is_continued(stopped) -> None:
    with pytest.raises(Stopped):
        fit(stopped, stop="batch_start:7")
    fit(stopped, "--ckpt_path", "last")
    assert [(Path(f"runs/my-{n}") / "model").exists() for n in (1, 2)] == [False, True]
    fit(stopped, "--ckpt_path", "last")  # then the other
    assert (RUN / "model").exists()
    with pytest.raises(SFTError, match="no unfinished run"):
        fit(stopped, "--ckpt_path", "last")


def test_another_configuration_is_another_run_and_the_error_says_in_what(stopped) -> None:
    with pytest.raises(SFTError, match=r"my-1, differs in\n    model\.learning_rate: 0\.01 -> 0\.02\n  →"):
        fit(stopped, "--ckpt_path", "last", "--model.learning_rate", "0.02")


def test_a_drawn_seed_is_that_of_the_run_that_is_continued(config) -> None:
    with pytest.raises(Stopped):
        fit(config, "--seed_everything", "true", stop="batch_start:9")
    seed = yaml.safe_load((RUN / "config.yaml").read_text())["seed_everything"]
    fit(config, "--seed_everything", "true", "--ckpt_path", "last")
    assert yaml.safe_load((RUN / "config.yaml").read_text())["seed_everything"] == seed
    fit(config, "--seed_everything", seed, "--trainer.default_root_dir", "whole")
    assert metrics(RUN) == metrics(Path("whole"))


def test_a_folder_in_which_another_process_trains_is_left_alone(stopped) -> None:
    import subprocess
    import sys

    hold = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "print(1, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(RUN / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(SFTError, match="another process is training"):
            fit(stopped, "--ckpt_path", "last")
        other.communicate(b"")
    fit(stopped, "--ckpt_path", "last")
    assert not (RUN / ".lock").exists()


def test_a_stopped_run_whose_model_was_exported_is_not_finished(stopped_copy) -> None:
    assert main(["export", str(RUN)]) == 0
    assert (RUN / "model").is_dir()
    fit(stopped_copy, "--ckpt_path", "last", "--trainer.default_root_dir", RUN)
    assert list(losses(RUN)) == list(range(10))
    with pytest.raises(SFTError, match="is finished"):
        fit(stopped_copy, "--ckpt_path", "last", "--trainer.default_root_dir", RUN)


def test_the_config_of_a_continued_run_is_that_of_the_run(stopped) -> None:
    before = (RUN / "config.yaml").read_text()
    fit(stopped, "--ckpt_path", "last")
    assert (RUN / "config.yaml").read_text() == before


# ---------------------------------------------------------------------------------------------- what may change


@pytest.mark.parametrize(
    ("argument", "value", "shown"),
    [
        ("--data.batch_size", "4", "data.batch_size: 2 -> 4"),
        ("--data.seed", "3", "data.seed: 0 -> 3"),
        ("--seed_everything", "3", "seed_everything: 0 -> 3"),
        ("--trainer.accumulate_grad_batches", "1", "trainer.accumulate_grad_batches: 2 -> 1"),
        ("--trainer.limit_train_batches", "8", "trainer.limit_train_batches: 1.0 -> 8"),
        ("--trainer.max_epochs", "3", "steps of the run: 10 -> 15"),
        ("--trainer.gradient_clip_val", "1.0", "trainer.gradient_clip_val: None -> 1.0"),
        ("--trainer.precision", "bf16-mixed", "trainer.precision: 32-true -> bf16-mixed"),
        ("--data.max_length", "24", "train tokens and weights: "),
        ("--data.val_split", "3", "train examples: 20 -> 19"),
        ("--model.adapter.dropout", "0.0", "model.adapter.dropout: 0.3 -> 0.0"),
        ("--model.learning_rate", "0.02", "model.learning_rate: 0.01 -> 0.02"),
        ("--model.schedule", "linear", "model.schedule: cosine -> linear"),
        ("--model.loss.label_smoothing", "0.1", "model.loss.label_smoothing: 0.0 -> 0.1"),
        ("--model.chat_template", "alpaca", "chat template: "),
        ("--model.new_tokens", "['<x>']", "model.new_tokens: not there -> ['<x>']"),
    ],
)
def test_what_would_make_it_another_run_is_refused_and_shown(
    here, argument, value, shown, stopped_copy
) -> None:
    config = stopped_copy
    before = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    lengths = ["--data.overlong", "truncate_right", "--data.max_lost_fraction", "1.0"]
    with pytest.raises(SFTError) as caught:
        fit(config, "--ckpt_path", "last", "--trainer.default_root_dir", RUN, *lengths, argument, value)
    assert "not the one that the checkpoint is of" in caught.value.what
    assert f"\n    {shown}" in caught.value.what
    assert {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()} == before


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory, model_folder) -> Path:
    """A folder with a run that was stopped after four steps."""
    folder = tmp_path_factory.mktemp("stopped")
    config = write_config(folder, model_folder("llama"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(Stopped):
            fit(config, stop="batch_start:9")
    return folder


@pytest.fixture
def stopped_copy(here, stopped_once) -> Path:
    shutil.copytree(stopped_once, here, dirs_exist_ok=True)
    return here / "my.yaml"


def test_changed_data_is_refused(stopped_copy) -> None:
    rows = Path("rows.jsonl").read_text().replace("hello there", "there hello", 3)
    Path(stopped_copy.parent / "rows.jsonl").write_text(rows)
    arguments = ["--data.train", "rows.jsonl", "--trainer.default_root_dir", RUN]
    with pytest.raises(SFTError, match=r"\n    train tokens and weights: \w{16} -> \w{16}"):
        fit(stopped_copy, "--ckpt_path", "last", *arguments)


def test_another_base_of_the_same_shape_is_refused(stopped_copy, model_folder) -> None:
    from safetensors.torch import load_file, save_file

    base = Path(shutil.copytree(model_folder("llama"), "other-base"))
    tensors = load_file(base / "model.safetensors")
    save_file(
        {name: tensor * 1.01 for name, tensor in tensors.items()},
        base / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(SFTError, match="frozen weights of the base"):
        fit(stopped_copy, "--ckpt_path", "last", "--trainer.default_root_dir", RUN, "--model.base", base)


def test_what_changes_no_step_may_change(stopped_copy, model_folder, whole) -> None:
    base = Path(shutil.copytree(model_folder("llama"), "moved-base"))
    data = Path(shutil.copyfile("rows.jsonl", "moved.jsonl"))
    other = ["--data.num_workers", "1", "--trainer.log_every_n_steps", "3"]
    other += ["--trainer.callbacks", "[{class_path: resume_run.Noise}]"]
    other += ["--model.base", base, "--data.train", data, "--checkpoints.every_n_steps", "null"]
    fit(stopped_copy, "--ckpt_path", "last", "--trainer.default_root_dir", RUN, *other)
    assert same_weights(RUN, whole)


def test_a_new_run_from_a_checkpoint_may_be_longer_but_not_of_other_data(stopped_copy, capsys) -> None:
    longer = ["--ckpt_path", LAST, "--trainer.max_epochs", "3", "--model.learning_rate", "0.001"]
    with pytest.raises(SFTError, match=r"data\.batch_size: 2 -> 4"):
        fit(stopped_copy, *longer, "--trainer.default_root_dir", "refused", "--data.batch_size", "4")
    assert not Path("refused").exists()
    fit(stopped_copy, *longer)
    assert list(losses(Path("runs/my-2"))) == list(range(4, 15))
    assert not (RUN / "model").exists()


def test_a_checkpoint_from_inside_an_optimizer_step_is_refused(stopped_copy) -> None:
    saved = torch.load(LAST, weights_only=True)
    progress = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    progress["current"] = dict.fromkeys(progress["current"], 7)
    torch.save(saved, LAST)
    with pytest.raises(SFTError, match="inside an optimizer step"):
        fit(stopped_copy, "--ckpt_path", "last")


def test_the_differences_of_another_plugin_are_not_those_of_its_options() -> None:
    old: fingerprint.Facts = {"model.adapter": "A", "model.adapter.r": 4, "x": 1}
    new: fingerprint.Facts = {"model.adapter": "B", "model.adapter.k": 4, "x": 1, "y": None}
    assert fingerprint.differences(old, new) == ["model.adapter: A -> B", "y: not there -> None"]


# ------------------------------------------------------------------------------------------------ metrics.csv


def test_a_metrics_file_goes_on_without_the_rows_after_the_checkpoint(tmp_path) -> None:
    first = MetricsFile(tmp_path)
    for step in range(6):
        first.log_metrics({"loss": step / 3}, step)
    first.save()
    first.log_metrics({"val": 1.0}, 5)  # a column that wasn't there
    first.save()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("0.12,1")  # of a line that was being written: not step 1
    second = MetricsFile(tmp_path, steps=4)
    second.log_metrics({"loss": 9.0}, 4)
    second.save()
    rows = read_rows(tmp_path / "metrics.csv")
    assert [(row["step"], row["loss"], row["val"]) for row in rows] == [
        *[(str(step), str(step / 3), "") for step in range(4)],
        ("4", "9.0", ""),
    ]
    MetricsFile(tmp_path).experiment  # noqa: B018
    assert not (tmp_path / "metrics.csv").exists()


def test_the_command_tells_of_a_refusal_without_a_traceback(stopped_copy, capsys) -> None:
    assert main(["fit", "--config", str(stopped_copy), "--ckpt_path", "gone.ckpt"]) == 2
    assert "Traceback" not in capsys.readouterr().err
