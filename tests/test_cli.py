"""One YAML and its overrides make a run; the run folder holds what it was and what came of it."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import transformers
import yaml
from lightning.pytorch import Callback

from lightning_sft.__main__ import main

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
SWEEPS = sorted((Path(__file__).parents[1] / "configs/sweeps").glob("*.yaml"))
STRATEGIES = sorted((Path(__file__).parents[1] / "configs/strategies").glob("*.yaml"))
ROWS = [{"instruction": f"say {n}", "output": f"hello {n}"} for n in range(14)]


class StopAt(Callback):
    """Is the user who presses Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def interrupt_signal() -> Iterator[None]:
    """Lightning ignores SIGINT once it has been interrupted."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def here(tmp_path: Path, model_folder, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `rows.jsonl` and a config `my.yaml` for the tiny model."""
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path, model_folder("llama"))
    return tmp_path


def write_inputs(folder: Path, model: Path) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = {
        "model": {"base": str(model), "learning_rate": 0.001},
        "data": {"train": "rows.jsonl", "val_split": 2, "batch_size": 4},
        "trainer": {"max_epochs": 1, "limit_train_batches": 2},
    }
    (folder / "my.yaml").write_text(yaml.safe_dump(config))


def succeed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What the command prints, given that it succeeds."""
    try:
        status = main(list(argv))
    except SystemExit as exit:  # --help and --print_config
        status = exit.code  # type: ignore[assignment]
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def print_config(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    return succeed(capsys, "fit", *argv, "--print_config")


def configured(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, dict[str, object]]:
    """The configuration that a command line makes."""
    return yaml.safe_load(print_config(capsys, *argv))


def read_metrics(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------- the options


def test_a_printed_config_prints_the_same_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--config", "my.yaml", "--model.adapter", "LoRA", "--model.adapter.r", "4"]
    argv += [
        "--data.train",
        "[{path: rows.jsonl, format: {class_path: Alpaca, init_args: {output: answer}}}]",
    ]
    printed = print_config(capsys, *argv)
    (here / "printed.yaml").write_text(printed)
    assert print_config(capsys, "--config", "printed.yaml") == printed


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        (["--model.optimizer", "torch.optim.SGD", "--model.optimizer.momentum", "0.9"], "momentum: 0.9"),
        (["--model.adapter", "Peft", "--model.adapter.config", "peft.VeraConfig", "--model.adapter.config.r", "7"],
         "class_path: peft.VeraConfig"),
        (["--model.adapter", "QLoRA", "--model.adapter.quant_type", "int8", "--model.adapter.r", "3"], "r: 3"),
        (["--model.adapter", "Freeze", "--model.adapter.layer_decay", "0.9"], "layer_decay: 0.9"),
    ],
)  # fmt: skip
def test_optimizers_and_adapters_by_class_path_print_and_parse_again(
    here: Path, capsys: pytest.CaptureFixture[str], argv: list[str], found: str
) -> None:
    printed = print_config(capsys, "--config", "my.yaml", *argv)
    assert found in printed
    (here / "printed.yaml").write_text(printed)
    assert print_config(capsys, "--config", "printed.yaml") == printed


def test_a_printed_config_tells_the_rate_of_each_group_without_the_weights(
    here: Path, model_folder, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the model itself, that is loaded here: two blocks, with embeddings and head below and above."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    table, norm = model.lm_head.weight.numel(), model.model.norm.weight.numel()
    shutil.copytree(model_folder("llama"), here / "base")
    (here / "base" / "model.safetensors").unlink()
    argv = ["--config", "my.yaml", "--model.base", "base", "--model.adapter", "Full"]
    argv += ["--model.adapter.layer_decay", "0.5", "--model.adapter.unfreeze_every", "10"]
    printed = print_config(capsys, *argv)
    told = [line.removeprefix("#").split() for line in printed.splitlines() if line.startswith("#   ")]
    assert told == [
        ["embeddings", "0.00025", f"{table:,}", "parameters,", "from", "step", "31"],
        ["block", "0", "0.0005", f"{block:,}", "parameters,", "from", "step", "21"],
        ["block", "1", "0.001", f"{block:,}", "parameters,", "from", "step", "11"],
        ["head", "and", "final", "norm", "0.001", f"{table + norm:,}", "parameters"],
    ]
    (here / "printed.yaml").write_text(printed)
    assert print_config(capsys, "--config", "printed.yaml") == printed
    assert sorted(path.name for path in here.iterdir()) == ["base", "my.yaml", "printed.yaml", "rows.jsonl"]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["LoRA"], []),
        (["Full"], []),
        (["QLoRA", "--model.adapter.loraplus_ratio=16", "--model.adapter.r=4"], ["A ", "B ", "0.016"]),
        (["LoRA", "--model.adapter.loraplus_ratio=4", "--model.adapter.init=pissa"], ["A ", "B ", "0.004"]),
        (["Freeze", "--model.adapter.layer_decay=0.5", "--model.adapter.layers=9"], ["known here: ", "layers is 9"]),
        (["Full", "--model.adapter.layer_decay=0.5", "--model.base=not/here"], ["not/here isn't on this machine"]),
    ],
)  # fmt: skip
def test_a_printed_config_tells_rates_where_they_differ_and_never_fails_by_them(
    here: Path, capsys: pytest.CaptureFixture[str], argv: list[str], told: list[str]
) -> None:
    printed = print_config(capsys, "--config", "my.yaml", "--model.adapter", *argv)
    comments = "".join(re.findall(r"(?m)^#(?! lightning).*$", printed))
    assert all(each in comments for each in told)
    assert bool(comments) == bool(told)
    assert yaml.safe_load(printed)["model"]["learning_rate"] == 0.001


def test_a_second_config_goes_over_the_first(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "lora.yaml").write_text("model: {adapter: LoRA}\ndata: {batch_size: 2}\n")
    config = configured(capsys, "--config", "my.yaml", "--config", "lora.yaml")
    assert config["model"]["adapter"]["class_path"].endswith(".LoRA")
    assert config["model"]["learning_rate"] == 0.001
    assert (config["data"]["batch_size"], config["data"]["train"]) == (2, "rows.jsonl")


def test_options_on_the_command_line_go_over_the_config(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model.adapter", "LoRA", "--model.adapter.r", "4", "--data.train", "other.jsonl"]
    config = configured(capsys, "--config", "my.yaml", *argv)
    assert config["model"]["adapter"]["init_args"]["r"] == 4
    assert config["model"]["adapter"]["init_args"]["alpha"] == 32
    assert config["data"]["train"] == "other.jsonl"
    assert config["data"]["batch_size"] == 4


@pytest.mark.parametrize(
    "argv",
    [
        ["--data.train=[a.jsonl, {path: b.jsonl}]"],
        ["--data.train=a.jsonl", "--data.train+=b.jsonl"],
        ["--data.train+=b.jsonl"],  # my.yaml gives the first
        ["--data.train=a.jsonl", "--data.train+={path: b.jsonl, limit: 3}"],
    ],
)
def test_more_sources_can_be_listed_or_added(
    here: Path, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    sources = configured(capsys, "--config", "my.yaml", *argv)["data"]["train"]
    assert isinstance(sources, list)
    paths = [source if isinstance(source, str) else source["path"] for source in sources]
    assert paths in (["a.jsonl", "b.jsonl"], ["rows.jsonl", "b.jsonl"])


def test_a_data_file_is_not_parsed_as_options(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "paths.json").write_text('[{"path": "rows.jsonl"}]')
    assert (
        configured(capsys, "--config", "my.yaml", "--data.train", "paths.json")["data"]["train"]
        == "paths.json"
    )


@pytest.mark.parametrize(("option", "name"), [("model.adapter", "LoRA"), ("model.loss", "CrossEntropy")])
def test_help_on_a_plugin_prints_the_docs_of_each_option(
    capsys: pytest.CaptureFixture[str], option: str, name: str
) -> None:
    import inspect

    import docstring_parser

    from lightning_sft import plugins

    cls = plugins.find("adapters" if option == "model.adapter" else "losses", name).load()
    text = " ".join(succeed(capsys, "fit", f"--{option}.help", name).split())
    documented = {p.arg_name: p.description for p in docstring_parser.parse(cls.__doc__ or "").params}
    for parameter in list(inspect.signature(cls).parameters):
        assert f"--{option}.{parameter}" in text
        assert " ".join((documented[parameter] or "").split()) in text


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_help_explains_every_option_of_model_and_data(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    text = succeed(capsys, command, "--help")
    assert text.startswith(f"usage: lightning-sft [options] {command} ")
    sections = re.split(r"\n  (?=--)", text)
    for section in sections:
        if re.match(r"--(model|data)\.", section) and not re.match(r"\S+\.help", section):
            explained = section.partition("(type:")[0].split("\n", 1)
            assert len(explained) == 2 or "  " in explained[0], section
    assert "lora.LoRA" in text


# --------------------------------------------------------------------------------------- shipped configs


@pytest.mark.parametrize("path", CONFIGS, ids=[path.name for path in CONFIGS])
def test_a_shipped_config_parses(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    argv = ["--config", str(path), "--model.base", "model", "--data.train", "rows.jsonl"]
    config = configured(capsys, *argv)
    assert (config["model"]["base"], config["data"]["train"]) == ("model", "rows.jsonl")


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda path: path.stem)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_strategy_stands_behind_any_config(capsys, path: Path, strategy: Path) -> None:
    plain = configured(capsys, "--config", str(path))
    spread = configured(capsys, "--config", str(path), "--config", str(strategy))
    own = yaml.safe_load(strategy.read_text())
    for section, options in own.items():
        for key in options:
            plain[section].pop(key), spread[section].pop(key)
    assert spread == plain


@pytest.mark.parametrize("path", CONFIGS + STRATEGIES + SWEEPS, ids=lambda path: path.name)
def test_a_shipped_config_explains_each_key(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    keys = [line for line in lines if re.match(r"\s*[\w.]+: *\S", line)]  # with a value
    assert [line for line in keys if "#" not in line] == []


@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_shipped_config_trains(here: Path, model_folder, name: str) -> None:
    (path,) = (path for path in CONFIGS if path.stem == name)
    argv = ["--config", str(path), "--model.base", str(model_folder("llama")), "--data.train", "rows.jsonl"]
    assert main(["fit", *argv, "--trainer.max_steps", "1"]) == 0
    assert (here / "runs" / f"{path.stem}-1" / "model" / "tokenizer.json").is_file()


# --------------------------------------------------------------------------------------------- a whole run


@dataclass
class Run:
    """A finished run and what it printed."""

    folder: Path
    printed: str


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of `my.yaml` with three epochs."""
    import contextlib
    import io

    here = tmp_path_factory.mktemp("finished")
    write_inputs(here, model_folder("llama"))
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(here)
        assert main(["fit", "--config", "my.yaml", "--trainer.max_epochs", "3"]) == 0
    return Run(here / "runs" / "my-1", printed.getvalue())


def test_the_run_folder_has_its_parts(finished: Run) -> None:
    assert {path.name for path in finished.folder.iterdir()} == {
        "config.yaml",
        "ledger.json",
        "metrics.csv",
        "goldens.json",
        "checkpoints",
        "model",
    }
    assert (finished.folder / "checkpoints" / "last.ckpt").is_file()
    assert {path.name for path in (finished.folder / "model").iterdir()} >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }


def test_metrics_have_every_step_and_every_validation(finished: Run) -> None:
    metrics = read_metrics(finished.folder / "metrics.csv")
    assert set(metrics[0]) == {
        "epoch",
        "step",
        "train/loss",
        "train/learning_rate",
        "train/tokens_per_second",
        "val/loss",
        "val/perplexity",
    }
    steps = [row for row in metrics if row["train/loss"]]
    assert [int(row["step"]) for row in steps] == [0, 1, 2, 3, 4, 5]
    assert all(float(row["train/tokens_per_second"]) > 0 for row in steps)
    validations = [row for row in metrics if row["val/loss"]]
    assert [int(row["epoch"]) for row in validations] == [0, 1, 2]
    for row in validations:
        assert math.isclose(float(row["val/perplexity"]), math.exp(float(row["val/loss"])), rel_tol=1e-4)


def test_the_ledger_accounts_for_every_row(finished: Run) -> None:
    ledger = json.loads((finished.folder / "ledger.json").read_text())
    (source,) = ledger["train"]["sources"]
    assert source["rows"] == len(ROWS)
    assert ledger["train"]["examples"] + ledger["val"]["examples"] == len(ROWS)


def test_the_run_says_what_it_starts_from_how_it_goes_and_where_it_ends(finished: Run) -> None:
    lines = finished.printed.splitlines()
    assert any(re.match(r"model .* parameters, .* trained \(100.0%\), Full", line) for line in lines)
    assert any("rows.jsonl: 14 rows as format Alpaca (lightning-sft 0.1.0)" in line for line in lines)
    (table,) = (n for n, line in enumerate(lines) if line.startswith("source "))
    assert lines[table].split()[-3:] == ["trained", "context", "lost"]
    assert lines[table + 2].split()[1:7] == ["rows.jsonl", "14", "14", "0", "0", "14"]
    assert any("4 examples × 1 accumulated × 1 rank" in line and "6 in all" in line for line in lines)
    progress = [line for line in lines if line.startswith("step ")]
    assert [line.split()[1] for line in progress] == [f"{step}/6" for step in range(1, 7)]
    assert all(re.search(r"left \d+:\d\d:\d\d  loss \d+\.\d+  tok/s [\d,]+", line) for line in progress)
    assert f"The run is in {Path('runs') / 'my-1'}" in finished.printed


def test_the_runs_config_validates_to_the_same_loss(
    finished: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.folder.parents[1])
    before = set(finished.folder.rglob("*"))
    config = str(finished.folder / "config.yaml")
    out = succeed(capsys, "validate", "--config", config, "--ckpt_path", "last")
    validations = [row for row in read_metrics(finished.folder / "metrics.csv") if row["val/loss"]]
    assert printed_loss(out, "val") == pytest.approx(float(validations[-1]["val/loss"]), rel=1e-5)
    assert set(finished.folder.rglob("*")) == before


def test_test_reports_the_validation_loss_on_the_same_rows(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--config", "my.yaml", "--data.val", "rows.jsonl", "--data.test", "rows.jsonl"]
    argv += ["--data.val_split", "null"]
    val = printed_loss(succeed(capsys, "validate", *argv), "val")
    test = printed_loss(succeed(capsys, "test", *argv, "--data.val_batch_size", "3"), "test")
    assert val == pytest.approx(test, rel=1e-5)
    assert not (here / "runs").exists()


def printed_loss(printed: str, stage: str) -> float:
    """The loss in Lightning's table of results."""
    found = re.search(rf"{stage}/loss\W+(\d+\.\d+)", printed)
    assert found, printed
    return float(found.group(1))


# -------------------------------------------------------------------------------------- where a run goes


def test_the_default_folder_is_named_after_the_first_config_and_counts_up(here: Path) -> None:
    (here / "more.yaml").write_text("data: {batch_size: 2}\n")
    assert main(["fit", "--config", "my.yaml"]) == 0
    assert main(["fit", "--config", "my.yaml"]) == 0
    assert main(["fit", "--config", "my.yaml", "--config", "more.yaml"]) == 0
    assert {path.name for path in (here / "runs").iterdir()} == {"my-1", "my-2", "my-3"}


def test_the_folder_can_be_chosen(here: Path) -> None:
    assert main(["fit", "--config", "my.yaml", "--trainer.default_root_dir", "deep/in/here"]) == 0
    assert (here / "deep" / "in" / "here" / "model" / "config.json").is_file()
    assert not (here / "runs").exists()


def test_fast_dev_run_writes_nothing(here: Path) -> None:
    before = set(here.rglob("*"))
    assert main(["fit", "--config", "my.yaml", "--trainer.fast_dev_run", "true"]) == 0
    assert set(here.rglob("*")) == before


# ------------------------------------------------------------------------------- what the user has chosen


def test_a_users_own_checkpoint_callback_takes_the_place_of_the_best(here: Path) -> None:
    callback = (
        "{class_path: ModelCheckpoint, init_args: {dirpath: mine, every_n_train_steps: 1, save_top_k: -1}}"
    )
    assert main(["fit", "--config", "my.yaml", f"--trainer.callbacks=[{callback}]"]) == 0
    assert len(list((here / "mine").glob("*.ckpt"))) == 2
    assert os.listdir(here / "runs" / "my-1" / "checkpoints") == ["last.ckpt"]
    assert (here / "runs" / "my-1" / "model").is_dir()


def test_a_users_own_logger_takes_the_place_of_ours(here: Path) -> None:
    logger = "{class_path: CSVLogger, init_args: {save_dir: logs, name: mine}}"
    assert main(["fit", "--config", "my.yaml", f"--trainer.logger={logger}"]) == 0
    assert (here / "logs" / "mine" / "version_0" / "metrics.csv").is_file()
    assert not (here / "runs" / "my-1" / "metrics.csv").exists()


def test_checkpoints_logger_and_progress_can_be_switched_off(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    off = ["--trainer.enable_checkpointing=false", "--trainer.logger=false"]
    out = succeed(capsys, "fit", "--config", "my.yaml", *off, "--trainer.enable_progress_bar=false")
    assert "step " not in out
    assert {path.name for path in (here / "runs" / "my-1").iterdir()} == {
        "config.yaml",
        "ledger.json",
        "goldens.json",
        "model",
    }


def test_logging_every_n_steps_is_as_the_user_says(here: Path) -> None:
    more = ["--trainer.log_every_n_steps", "2", "--trainer.max_epochs", "2"]
    assert main(["fit", "--config", "my.yaml", *more]) == 0
    metrics = read_metrics(here / "runs" / "my-1" / "metrics.csv")
    assert [int(row["step"]) for row in metrics if row["train/loss"]] == [1, 3]


# ------------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("step", [1, 3])
def test_an_interrupted_run_ends_quietly_and_can_be_continued(
    here: Path, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    argv = ["fit", "--config", "my.yaml", "--trainer.max_epochs", "2"]
    stop = f"--trainer.callbacks+={{class_path: {__name__}.StopAt, init_args: {{step: {step}}}}}"
    assert main([*argv, stop]) == 130
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert err.endswith("interrupted\n")
    run = Path("runs") / "my-1"
    assert not list(run.glob("model*"))
    logged = read_metrics(run / "metrics.csv") if step > 1 else []  # the step that was interrupted isn't
    assert len([row for row in logged if row["train/loss"]]) == step - 1
    told = f"--trainer.default_root_dir {run} --ckpt_path last"
    if step == 1:  # before the first checkpoint
        assert told not in out
        return
    assert told in out
    assert main([*argv, *told.split()]) == 0
    assert (run / "model" / "config.json").is_file()


def test_a_model_that_could_not_be_written_whole_is_not_there(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_sft_adapters.full import Full

    def export(self: object, model: object, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(Full, "export", export)
    assert main(["fit", "--config", "my.yaml"]) == 130
    assert not (here / "runs" / "my-1" / "model").exists()
