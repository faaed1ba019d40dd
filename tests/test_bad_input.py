"""A user's mistake is one clear message and status 2, before any training; no traceback, nothing left behind.

Each mistake below is a function of a `Place` (the current folder, with a model and good rows) that makes what
is wrong and returns the command line; `says` are the pieces that the message must have.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from stranger import install, install_format

from lightning_sft.__main__ import main

ROWS: list[dict[str, object]] = [{"instruction": f"say {n}", "output": f"hello {n}"} for n in range(12)]


@dataclass
class Place:
    """The current folder of a mistake.

    Args:
        model: A folder with a tiny model.
        run: A folder with a finished LoRA run of it.
    """

    model: Path
    run: Path

    def fit(self, *argv: str, base: str | None = None, train: str | None = "good.jsonl") -> list[str]:
        """A `fit` on the model and the good rows, or others."""
        data = [] if train is None else ["--data.train", train]
        return ["fit", "--model.base", base or str(self.model), *data, "--trainer.max_epochs", "1", *argv]

    def rows(self, *rows: object, name: str = "bad.jsonl") -> str:
        """A JSONL file with these rows."""
        return self.file(name, "".join(json.dumps(row) + "\n" for row in rows))

    def file(self, name: str, content: str) -> str:
        """A file with this content."""
        Path(name).write_text(content)
        return name

    def broken_model(self, name: str = "broken") -> Path:
        """A copy of the model, to be broken."""
        return Path(shutil.copytree(self.model, name))

    def broken_run(self) -> Path:
        """A copy of the run, to be broken."""
        return Path(shutil.copytree(self.run, "broken-run"))


Mistake = Callable[[Place], list[str]]
MISTAKES: list[tuple[Mistake, tuple[str, ...]]] = []


def says(*pieces: str) -> Callable[[Mistake], Mistake]:
    """Add a mistake to the table, with what the message must say of it."""

    def add(mistake: Mistake) -> Mistake:
        MISTAKES.append((mistake, pieces))
        return mistake

    return add


@pytest.fixture(scope="module")
def finished_run(model_folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    place = Place(model_folder("llama"), folder / "run")
    argv = ["--model.adapter", "LoRA", "--trainer.default_root_dir", str(place.run)]
    assert main(place.fit(*argv, train=str(rows))) == 0
    return place.run


@pytest.fixture
def place(model_folder, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    place = Place(model_folder("llama"), finished_run)
    place.rows(*ROWS, name="good.jsonl")
    return place


def message(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """What the command says of a mistake, on one line, given that it ends as a mistake has to."""
    before = set(Path().rglob("*"))
    assert main(argv) == 2
    out, err = capsys.readouterr()
    error = err[err.index("error: ") :]
    assert "Traceback" not in out + err
    assert "step 1/" not in out
    with suppress(OSError):
        Path("runs").rmdir()
    assert set(Path().rglob("*")) <= before, "something was left behind"
    return " ".join(error.split())


# ------------------------------------------------------------------------------------------------- data


@says("god.jsonl", "no such file", "did you mean 'good.jsonl'?")
def a_data_file_that_is_not_there(place: Place) -> list[str]:
    return place.fit(train="god.jsonl")


@says("bad.jsonl", "no rows")
def an_empty_data_file(place: Place) -> list[str]:
    return place.fit(train=place.file("bad.jsonl", ""))


@says("bad.jsonl, row 2", "malformed JSON", "column")
def a_malformed_line(place: Place) -> list[str]:
    return place.fit(train=place.file("bad.jsonl", json.dumps(ROWS[0]) + '\n{"instruction": "a",\n'))


@says("bad.jsonl, row 3", "'output'", "there is 'instruction'")
def a_row_without_the_key(place: Place) -> list[str]:
    return place.fit(train=place.rows(*ROWS[:2], {"instruction": "a"}))


@says("bad.jsonl, row 3", "key 'output'", "empty", "remove the row")
def an_empty_response(place: Place) -> list[str]:
    return place.fit(train=place.rows(*ROWS[:2], {"instruction": "a", "output": " "}))


@says("bad.jsonl, row 2", "key 'output'", "expected text")
def a_response_that_is_no_text(place: Place) -> list[str]:
    return place.fit(train=place.rows(ROWS[0], {"instruction": "a", "output": 3}))


@says("good.jsonl, row 1", "'conversations' is missing", "there is 'instruction', 'output'")
def a_format_that_does_not_fit(place: Place) -> list[str]:
    return place.fit("--data.train", "[{path: good.jsonl, format: ShareGPT}]", train=None)


@says("data.train", "no format is named 'Alpacca'", "did you mean Alpaca?")
def an_unknown_format_on_the_command_line(place: Place) -> list[str]:
    return place.fit("--data.train", "[{path: good.jsonl, format: Alpacca}]", train=None)


@says("my.yaml, data.train", "no format is named 'Alpacca'", "did you mean Alpaca?")
def an_unknown_format_in_a_config(place: Place) -> list[str]:
    config = place.file("my.yaml", "data: {train: [{path: good.jsonl, format: Alpacca}]}")
    return place.fit("--config", config, train=None)


@says("my.yaml, data.train", "no option 'formt'", "did you mean format?")
def an_unknown_key_of_a_source(place: Place) -> list[str]:
    config = place.file("my.yaml", "data: {train: [{path: good.jsonl, formt: Alpaca}]}")
    return place.fit("--config", config, train=None)


@says("data.train", "Alpaca has no option 'instrction'", "did you mean instruction?")
def an_unknown_option_of_a_format(place: Place) -> list[str]:
    format = "{class_path: Alpaca, init_args: {instrction: q}}"
    return place.fit("--data.train", f"[{{path: good.jsonl, format: {format}}}]", train=None)


@says("data.train", "no format is named 'Alpacca'", "did you mean Alpaca?")
def an_unknown_format_of_an_added_source(place: Place) -> list[str]:
    return place.fit("--data.train+={path: good.jsonl, format: Alpacca}")


@says("bad.jsonl", "ambiguous", "Alpaca and Messages", "format: Alpaca")
def an_ambiguous_format(place: Place) -> list[str]:
    return place.fit(train=place.rows(ROWS[0] | {"messages": []}))


@says("bad.jsonl", "no format fits the columns 'answer', 'question'", "Alpaca, Dolly")
def columns_of_no_format(place: Place) -> list[str]:
    return place.fit(train=place.rows({"question": "a", "answer": "b"}))


@says("someone/data", "can't be loaded", "HF_TOKEN", "offline")
def a_hub_dataset_without_network(place: Place) -> list[str]:
    return place.fit(train="someone/data")


@says("data.train", "no data is given")
def no_training_data(place: Place) -> list[str]:
    return place.fit(train=None)


@says("data.val", "no data is given")
def no_data_to_validate(place: Place) -> list[str]:
    return ["validate", "--model.base", str(place.model), "--data.train", "good.jsonl"]


@says("data.test", "no data is given")
def no_data_to_test(place: Place) -> list[str]:
    return ["test", "--model.base", str(place.model), "--data.train", "good.jsonl"]


@says("good.jsonl", "nothing is left", "longer than max_length 5", "raise data.max_length")
def every_row_too_long(place: Place) -> list[str]:
    return place.fit("--data.max_length", "5")


@says("bad.jsonl", "1 examples", "data.max_lost_fraction 1.0%", "data.overlong: truncate_right")
def too_much_lost(place: Place) -> list[str]:
    long = {"instruction": "a", "output": "zq" * 40}
    return place.fit("--data.max_length", "50", train=place.rows(*ROWS, long))


@says("data.max_length", "9999", "context of 256")
def more_than_the_context(place: Place) -> list[str]:
    return place.fit("--data.max_length", "9999")


@says("data.val and data.val_split are both given", "give one")
def two_kinds_of_validation_data(place: Place) -> list[str]:
    return place.fit("--data.val", "good.jsonl", "--data.val_split", "0.1")


@says("data.val_split", "0.01 of 12 rows leaves none for validation")
def a_split_that_leaves_no_validation(place: Place) -> list[str]:
    return place.fit("--data.val_split", "0.01")


@says("data.val_split", "12 of 12 rows leaves none for training")
def a_split_that_leaves_no_training(place: Place) -> list[str]:
    return place.fit("--data.val_split", "12")


# ---------------------------------------------------------------------------------------------- options


@says("my.yaml", "'model.bse'", "did you mean model.base?")
def an_unknown_key_in_a_config(place: Place) -> list[str]:
    return place.fit("--config", place.file("my.yaml", "model: {bse: x}"))


@says("my.yaml", "'modle.base'", "did you mean model.base?")
def an_unknown_section_in_a_config(place: Place) -> list[str]:
    return place.fit("--config", place.file("my.yaml", "modle: {base: x}"))


@says("'data.batchsize'", "did you mean data.batch_size?")
def an_unknown_key_on_the_command_line(place: Place) -> list[str]:
    return place.fit("--data.batchsize", "4")


@says("my.yaml, data.batch_size", "expected int", "'four'")
def a_wrong_type_in_a_config(place: Place) -> list[str]:
    return place.fit("--config", place.file("my.yaml", "data: {batch_size: four}"))


@says("data.batch_size", "expected int", "'four'")
def a_wrong_type_on_the_command_line(place: Place) -> list[str]:
    return place.fit("--data.batch_size", "four")


@says("model.schedule", "'cosine', 'linear', 'constant'", "'cosin'")
def a_choice_that_is_none(place: Place) -> list[str]:
    return place.fit("--model.schedule", "cosin")


@says("model.adapter", "no adapter is named 'LoRa'", "did you mean LoRA?")
def an_unknown_adapter(place: Place) -> list[str]:
    return place.fit("--model.adapter", "LoRa")


@says("model.loss", "no loss is named 'CrossEntrpy'", "did you mean CrossEntropy?")
def an_unknown_loss(place: Place) -> list[str]:
    return place.fit("--model.loss", "CrossEntrpy")


@says("model.adapter", "LoRA has no option 'rank'", "its options: r, alpha")
def an_unknown_option_of_an_adapter(place: Place) -> list[str]:
    return place.fit("--model.adapter", "LoRA", "--model.adapter.rank", "4")


@says("my.yaml, model.adapter", "LoRA has no option 'droput'", "did you mean dropout?")
def an_unknown_option_of_an_adapter_in_a_config(place: Place) -> list[str]:
    config = "model: {adapter: {class_path: LoRA, init_args: {droput: 0.1}}}"
    return place.fit("--config", place.file("my.yaml", config))


@says("model.adapter.r: expected int, got 'many'")
def a_wrong_type_of_an_option_of_an_adapter(place: Place) -> list[str]:
    return place.fit("--model.adapter", "LoRA", "--model.adapter.r", "many")


@says("my.yaml, model.adapter.init: expected one of 'default', ", "'corda', got 'pizza'")
def a_choice_of_an_adapter_that_is_none(place: Place) -> list[str]:
    config = "model: {adapter: {class_path: LoRA, init_args: {init: pizza}}}"
    return place.fit("--config", place.file("my.yaml", config))


@says("model.adapter.config.target_modules: expected list of str, str, null, got '3'")
def a_wrong_type_in_a_class_of_pefts(place: Place) -> list[str]:
    config = "{class_path: peft.IA3Config, init_args: {target_modules: 3}}"
    return place.fit("--model.adapter", "Peft", "--model.adapter.config", config)


@says("model.adapter.config", "no class is named 'peft.IA3Confg'", "did you mean IA3Config?")
def an_unknown_class_of_pefts(place: Place) -> list[str]:
    return place.fit("--model.adapter", "Peft", "--model.adapter.config", "{class_path: peft.IA3Confg}")


@says("model.adapter.config: no class is named 'IA3Confg'", "did you mean IA3Config?")
def an_unknown_bare_class_of_pefts(place: Place) -> list[str]:
    config = "model: {adapter: {class_path: Peft, init_args: {config: IA3Confg}}}"
    return place.fit("--config", place.file("my.yaml", config))


@says("trainer.callbacks", "no class is named 'ForgetingProbe'", "did you mean ForgettingProbe?")
def an_unknown_probe(place: Place) -> list[str]:
    return place.fit("--trainer.callbacks", "[{class_path: ForgetingProbe}]")


@says("model.optimizer", "no class is named 'torch.optim.AdmW'", "did you mean AdamW?")
def an_unknown_optimizer(place: Place) -> list[str]:
    return place.fit("--model.optimizer", "torch.optim.AdmW")


@says("model.optimizer", "Muon has no option 'momentm'", "did you mean momentum?")
def an_unknown_option_of_an_optimizer(place: Place) -> list[str]:
    return place.fit("--model.optimizer", "{class_path: torch.optim.Muon, init_args: {momentm: 1}}")


@says("model.adapter", "LoRA", "r", "positive")
def an_option_that_the_adapter_refuses(place: Place) -> list[str]:
    return place.fit("--model.adapter", "LoRA", "--model.adapter.r", "0")


@says("model.adapter", "no_such_layer not found in the base model")
def layers_that_the_model_has_not(place: Place) -> list[str]:
    return place.fit("--model.adapter", "LoRA", "--model.adapter.target_modules", "no_such_layer")


@says("model.adapter.layers (Freeze)", "layers is 99", "a number from 0 to 2")
def more_layers_than_the_model_has(place: Place) -> list[str]:
    return place.fit("--model.adapter", "Freeze", "--model.adapter.layers", "99")


@says("model.adapter (Peft)", "neither config nor init_from is given", "peft.IA3Config")
def an_adapter_of_no_kind(place: Place) -> list[str]:
    return place.fit("--model.adapter", "Peft")


@says("model.optimizer (SGD)", "lr would be set in two places", "model.learning_rate")
def a_rate_in_two_places(place: Place) -> list[str]:
    return place.fit("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.5")


@says("trainer.callbacks", "'EarlyStoping'", "did you mean EarlyStopping?")
def an_unknown_callback(place: Place) -> list[str]:
    return place.fit("--trainer.callbacks+=EarlyStoping")


@says("model.base must be given")
def no_model(place: Place) -> list[str]:
    return ["fit", "--data.train", "good.jsonl"]


@says("data.batch_size", "is 0", "at least 1")
def a_batch_size_of_0(place: Place) -> list[str]:
    return place.fit("--data.batch_size", "0")


@says("data.val_batch_size", "is 0", "at least 1")
def a_validation_batch_size_of_0(place: Place) -> list[str]:
    return place.fit("--data.val_batch_size", "0")


@says("data.num_workers", "is -1", "at least 0")
def negative_workers(place: Place) -> list[str]:
    return place.fit("--data.num_workers", "-1")


@says("model.learning_rate", "-0.1", "0 or more")
def a_negative_learning_rate(place: Place) -> list[str]:
    return place.fit("--model.learning_rate", "-0.1")


@says("model.learning_rate", "nan")
def a_learning_rate_that_is_no_number(place: Place) -> list[str]:
    return place.fit("--model.learning_rate", ".nan")


@says("model.betas", "1.0")
def a_beta_of_1(place: Place) -> list[str]:
    return place.fit("--model.betas", "[0.9, 1.0]")


@says("model.warmup", "1.5", "a fraction of all steps (0.03) or a whole number of steps")
def a_warmup_over_the_whole_run(place: Place) -> list[str]:
    return place.fit("--model.warmup", "1.5")


@says("trainer", "gpu", "--help")
def an_accelerator_that_is_not_there(place: Place) -> list[str]:
    return place.fit("--trainer.accelerator", "gpu")


@says("trainer.callbacks", "GradientAccumulationScheduler", "trainer.accumulate_grad_batches")
def a_scheduler_of_accumulation(place: Place) -> list[str]:
    name = "--trainer.callbacks+=GradientAccumulationScheduler"
    return place.fit(name, "--trainer.callbacks.scheduling={0: 2}")


@says("trainer", "val_check_interval", "1000")
def a_validation_interval_longer_than_the_epoch(place: Place) -> list[str]:
    return place.fit("--data.val", "good.jsonl", "--trainer.val_check_interval", "1000")


@says("trainer", "nonsense")
def a_strategy_that_does_not_exist(place: Place) -> list[str]:
    return place.fit("--trainer.strategy", "nonsense")


@says("trainer", "nonsense")
def an_accelerator_that_does_not_exist(place: Place) -> list[str]:
    return place.fit("--trainer.accelerator", "nonsense")


@says("trainer.strategy", "ModelParallelStrategy can't train here", "tensor parallel", "use fsdp2")
def a_strategy_that_splits_layers(place: Place) -> list[str]:
    strategy = (
        "{class_path: ModelParallelStrategy, init_args: {data_parallel_size: 1, tensor_parallel_size: 1}}"
    )
    return place.fit(
        "--trainer.accelerator", "cpu", "--trainer.devices", "1", f"--trainer.strategy={strategy}"
    )


@says("good.jsonl", "subset, split and revision are for datasets, this is a file")
def a_split_of_a_file(place: Place) -> list[str]:
    return place.fit("--data.train", "[{path: good.jsonl, split: test}]")


@says("--dtype", "as it was trained", "--merge")
def a_type_for_weights_that_are_not_merged(place: Place) -> list[str]:
    return ["export", str(place.run), "--dtype", "bfloat16"]


@says("BeforeAfter.gated", "no instruction has the task 'sorting'")
def a_task_that_no_instruction_has(place: Place) -> list[str]:
    data = "instructions: tiny:held_out, general_text: tiny:general, questions: tiny:facts"
    return place.fit(
        "--trainer.callbacks", f"[{{class_path: BeforeAfter, init_args: {{{data}, gated: [sorting]}}}}]"
    )


@says("trainer.overfit_batches", "trainer.limit_train_batches")
def overfit_batches(place: Place) -> list[str]:
    return place.fit("--trainer.overfit_batches", "1")


# ----------------------------------------------------------------------------------------- config files


@says("my.yml", "no such config file", "did you mean my.yaml?")
def a_config_that_is_not_there(place: Place) -> list[str]:
    place.file("my.yaml", "model: {base: x}")
    return place.fit("--config", "my.yml")


@says("my.yaml, line 3", "malformed YAML", "check the indentation, brackets and quotes")
def a_config_with_an_open_bracket(place: Place) -> list[str]:
    return place.fit("--config", place.file("my.yaml", "model:\n  betas: [0.9\ndata: {}\n"))


@says("second.yaml, line 2", "malformed YAML", r"'\t'")
def a_second_config_with_a_tab(place: Place) -> list[str]:
    first = place.file("first.yaml", "data: {batch_size: 2}")
    second = place.file("second.yaml", "model:\n\tbase: x")
    return place.fit("--config", first, f"--config={second}")


@says("my.yaml", "holds no options", "model:")
def an_empty_config(place: Place) -> list[str]:
    return place.fit("--config", place.file("my.yaml", "# nothing\n"))


@says("my.yaml", "no mapping")
def a_config_that_is_a_list(place: Place) -> list[str]:
    return place.fit("--config", place.file("my.yaml", "- model\n"))


# ------------------------------------------------------------------------------------ model and template


@says("model.base: broken", "no tokenizer", "model.tokenizer")
def a_model_without_a_tokenizer(place: Place) -> list[str]:
    for file in place.broken_model().glob("tokenizer*"):
        file.unlink()
    return place.fit(base="broken")


@says("model.base: broken", "tokenizer can't be loaded", "complete and undamaged")
def a_damaged_tokenizer(place: Place) -> list[str]:
    place.file(str(place.broken_model() / "tokenizer.json"), '{"version"')
    return place.fit(base="broken")


@says("model.base: broken", "configuration can't be loaded", "config.json", "complete and undamaged")
def a_model_without_a_configuration(place: Place) -> list[str]:
    (place.broken_model() / "config.json").unlink()
    return place.fit(base="broken")


@says("model.base: broken", "configuration can't be loaded", "not a valid JSON")
def a_damaged_configuration(place: Place) -> list[str]:
    place.file(str(place.broken_model() / "config.json"), '{"model_type": ')
    return place.fit(base="broken")


@says("model.base: broken", "the model can't be loaded", "model.safetensors")
def a_model_without_weights(place: Place) -> list[str]:
    (place.broken_model() / "model.safetensors").unlink()
    return place.fit(base="broken")


@says("model.base: broken", "the model can't be loaded", "complete and undamaged")
def weights_that_are_cut_off(place: Place) -> list[str]:
    weights = place.broken_model() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return place.fit(base="broken")


@says("model.base: broken", "the model can't be loaded", "other shapes than its configuration says")
def weights_of_another_shape(place: Place) -> list[str]:
    config = place.broken_model() / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 96}))
    return place.fit(base="broken")


@says("model.base: good.jsonl", "a file, not a model folder")
def a_base_that_is_a_file(place: Place) -> list[str]:
    return place.fit(base="good.jsonl")


@says("model.base: ./modle", "no such folder", "a local model folder or a Hub id")
def a_base_that_is_not_there(place: Place) -> list[str]:
    return place.fit(base="./modle")


@says("model.base: someone/model", "nor reachable on the Hub", "HF_HUB_OFFLINE", "HF_TOKEN")
def a_hub_model_without_network(place: Place) -> list[str]:
    return place.fit(base="someone/model")


@says(
    "model.tokenizer",
    "odd.jsonl, row 1",
    "token 298",
    "only 296",
    "the tokenizer that the model was trained with",
)
def a_tokenizer_larger_than_the_model(place: Place) -> list[str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place.model)
    tokenizer.add_tokens(["<one>", "<two>", "<three>"])
    tokenizer.save_pretrained("larger")
    Path("odd.jsonl").write_text('{"instruction": "a", "output": "b <three>"}\n')
    return place.fit("--model.tokenizer", "larger", "--data.train", "odd.jsonl")


@says("model.chat_template", "'mine.jinja' is neither a file nor one of alpaca, chatml, plain")
def a_template_that_is_not_there(place: Place) -> list[str]:
    return place.fit("--model.chat_template", "mine.jinja")


@says("model.chat_template", "did you mean 'chatml'?")
def a_misspelt_template(place: Place) -> list[str]:
    return place.fit("--model.chat_template", "chatlm")


@says("model.chat_template: mine.jinja", "can't be read", "UTF-8")
def a_template_that_is_no_text(place: Place) -> list[str]:
    Path("mine.jinja").write_bytes(b"\xff\xfe\x00")
    return place.fit("--model.chat_template", "mine.jinja")


@says("good.jsonl, row 5", "no fours, please", "model.chat_template")
def a_template_that_refuses_a_row(place: Place) -> list[str]:
    template = (
        "{% for m in messages %}{% if '4' in m.content %}{{ raise_exception('no fours, please') }}{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}"
    )
    return place.fit("--model.chat_template", place.file("mine.jinja", template))


@says("model.chat_template: mine.jinja, line 1", "the chat template is no Jinja", "unexpected '}'")
def a_template_that_is_no_jinja(place: Place) -> list[str]:
    return place.fit("--model.chat_template", place.file("mine.jinja", "{% for m in messages %}{{ m }"))


@says("chat_template_kwargs: enable_thinkin", "doesn't use this option", "did you mean enable_thinking?")
def an_option_that_the_template_does_not_use(place: Place) -> list[str]:
    template = (
        "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{% if enable_thinking %}{% endif %}"
    )
    options = ("--model.chat_template_kwargs", "{enable_thinkin: false}")
    return place.fit("--model.chat_template", place.file("mine.jinja", template), *options)


# --------------------------------------------------------------------------- run folders and checkpoints


@says("--ckpt_path gone.ckpt", "no such checkpoint")
def a_checkpoint_that_is_not_there(place: Place) -> list[str]:
    return place.fit("--ckpt_path", "gone.ckpt")


@says("--ckpt_path last", "no unfinished run of this configuration", "runs", "--ckpt_path auto")
def the_last_checkpoint_of_no_run(place: Place) -> list[str]:
    return place.fit("--ckpt_path", "last")


@says("good.jsonl", "no checkpoint")
def a_checkpoint_that_is_something_else(place: Place) -> list[str]:
    return place.fit("--ckpt_path", "good.jsonl")


@says("cut.ckpt", "no checkpoint, or a damaged one")
def a_checkpoint_that_is_cut_off(place: Place) -> list[str]:
    whole = (place.run / "checkpoints" / "last.ckpt").read_bytes()
    Path("cut.ckpt").write_bytes(whole[: len(whole) // 2])
    return ["validate", *place.fit("--ckpt_path", "cut.ckpt")[1:5], "--ckpt_path", "cut.ckpt"]


class _Payload:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("harm"),)


@says("strange.ckpt", "could run code", "--weights_only false")
def a_checkpoint_with_code(place: Place) -> list[str]:
    torch.save({"state_dict": {}, "loops": _Payload()}, "strange.ckpt", pickle_module=pickle)
    return place.fit("--ckpt_path", "strange.ckpt")


@says("tensor.ckpt", "no checkpoint of a run")
def a_file_of_tensors(place: Place) -> list[str]:
    torch.save({"weight": torch.zeros(2)}, "tensor.ckpt")
    return place.fit("--ckpt_path", "tensor.ckpt")


@says("--ckpt_path", "not the one that the checkpoint is of", "LoRA -> ", "full.Full", "config.yaml")
def a_checkpoint_of_another_adapter(place: Place) -> list[str]:
    return place.fit("--ckpt_path", str(place.run / "checkpoints" / "last.ckpt"))


@says("--ckpt_path", "not the one that the checkpoint is of", "model.adapter.r: 16 -> 4", "config.yaml")
def a_checkpoint_of_another_rank(place: Place) -> list[str]:
    checkpoint = str(place.run / "checkpoints" / "last.ckpt")
    return place.fit("--model.adapter", "LoRA", "--model.adapter.r", "4", "--ckpt_path", checkpoint)


@says("--ckpt_path", "is finished", "start a new run", "max_epochs")
def a_run_that_is_finished(place: Place) -> list[str]:
    where = ["--trainer.default_root_dir", str(place.run), "--ckpt_path", "last"]
    return place.fit("--model.adapter", "LoRA", *where)


@says("--ckpt_path", "the end of the run", "raise trainer.max_epochs")
def a_new_run_of_no_step(place: Place) -> list[str]:
    checkpoint = str(place.run / "checkpoints" / "last.ckpt")
    return place.fit("--model.adapter", "LoRA", "--ckpt_path", checkpoint)


@says("--ckpt_path last", "there is no run in", "--ckpt_path auto")
def the_last_checkpoint_of_an_empty_folder(place: Place) -> list[str]:
    return place.fit("--trainer.default_root_dir", "empty", "--ckpt_path", "last")


@says("--ckpt_path last", "which run's", "--trainer.default_root_dir")
def the_last_checkpoint_to_validate(place: Place) -> list[str]:
    return ["validate", *place.fit("--ckpt_path", "last")[1:]]


@says("trainer", "ends before its first step", "raise trainer.max_epochs")
def a_run_of_no_time(place: Place) -> list[str]:
    return place.fit("--trainer.max_time", "00:00:00:00")


@says("trainer.default_root_dir", "already holds a run", "--ckpt_path")
def a_folder_that_holds_a_run(place: Place) -> list[str]:
    return place.fit("--trainer.default_root_dir", str(place.run))


@says("trainer.default_root_dir: good.jsonl", "can't be made", "choose another")
def a_run_folder_that_is_a_file(place: Place) -> list[str]:
    return place.fit("--trainer.default_root_dir", "good.jsonl")


# ----------------------------------------------------------------------------------- generate and export


@says("gone", "no such folder", "run folder")
def generating_from_nothing(place: Place) -> list[str]:
    return ["generate", "gone", "--prompt", "a"]


@says("neither a run (config.yaml) nor a model (config.json", "run folder")
def generating_from_another_folder(place: Place) -> list[str]:
    Path("photos").mkdir()
    return ["generate", "photos", "--prompt", "a"]


@says("broken-run", "no model yet", "lightning-sft export broken-run")
def generating_from_an_unfinished_run(place: Place) -> list[str]:
    shutil.rmtree(place.broken_run() / "model")
    return ["generate", "broken-run", "--prompt", "a"]


@says("--prompt", "the prompt is empty")
def an_empty_prompt(place: Place) -> list[str]:
    return ["generate", str(place.model), "--prompt", " \n"]


@says("--prompt", "context is 256", "shorten it")
def a_prompt_longer_than_the_context(place: Place) -> list[str]:
    return ["generate", str(place.model), "--prompt", "zq" * 200]


@says("--max_new_tokens", "at least 1")
def an_answer_of_no_tokens(place: Place) -> list[str]:
    return ["generate", str(place.model), "--prompt", "a", "--max_new_tokens", "0"]


@says("--temperature", "0 or more")
def a_negative_temperature(place: Place) -> list[str]:
    return ["generate", str(place.model), "--prompt", "a", "--temperature", "-1"]


@says("--top_p", "more than 0")
def a_top_p_of_0(place: Place) -> list[str]:
    return ["generate", str(place.model), "--prompt", "a", "--temperature", "1", "--top_p", "0"]


@says("--raw", "--system")
def a_system_message_without_a_template(place: Place) -> list[str]:
    return ["generate", str(place.model), "--prompt", "a", "--raw", "--system", "b"]


@says("no option is named 'promt'", "did you mean prompt?")
def an_unknown_option_of_generate(place: Place) -> list[str]:
    return ["generate", str(place.model), "--promt", "a"]


@says("the base of", "/gone", "no such folder")
def an_adapter_whose_base_is_gone(place: Place) -> list[str]:
    config = place.broken_run() / "model" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "/gone"}))
    return ["generate", "broken-run", "--prompt", "a"]


@says("broken-run/model", "adapter can't be loaded", "complete and undamaged")
def adapter_weights_that_are_cut_off(place: Place) -> list[str]:
    weights = place.broken_run() / "model" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    return ["generate", "broken-run", "--prompt", "a"]


@says("broken-run/model", "no weights", "adapter_model.safetensors")
def an_adapter_without_weights(place: Place) -> list[str]:
    (place.broken_run() / "model" / "adapter_model.safetensors").unlink()
    return ["export", "broken-run", "--merge", "--output", "merged"]


@says("gone", "no such folder")
def exporting_nothing(place: Place) -> list[str]:
    return ["export", "gone"]


@says("neither a run (config.yaml) nor a model (config.json")
def exporting_another_folder(place: Place) -> list[str]:
    Path("photos").mkdir()
    return ["export", "photos"]


@says("full", "not empty", "--output")
def exporting_to_a_folder_with_something_in_it(place: Place) -> list[str]:
    Path("full").mkdir()
    place.file("full/letter.txt", "mine")
    return ["export", str(place.run), "--merge", "--output", "full"]


@says("good.jsonl", "a file, not a folder", "--output")
def exporting_to_a_file(place: Place) -> list[str]:
    return ["export", str(place.run), "--output", "good.jsonl"]


@says("a whole model", "nothing to merge")
def merging_a_whole_model(place: Place) -> list[str]:
    return ["export", str(place.model), "--merge"]


@says("gone.ckpt", "no such checkpoint")
def exporting_a_checkpoint_that_is_not_there(place: Place) -> list[str]:
    return ["export", str(place.run), "--ckpt_path", "gone.ckpt", "--output", "new"]


@says("good.jsonl", "no checkpoint")
def exporting_a_checkpoint_that_is_none(place: Place) -> list[str]:
    return ["export", str(place.run), "--ckpt_path", "good.jsonl", "--output", "new"]


@says("only a run has checkpoints")
def exporting_a_checkpoint_of_a_model(place: Place) -> list[str]:
    return ["export", str(place.model), "--ckpt_path", "good.jsonl"]


@says("dtype", "'float32', 'bfloat16', 'float16'", "'int8'")
def merging_into_an_unknown_type(place: Place) -> list[str]:
    return ["export", str(place.run), "--merge", "--dtype", "int8"]


@says("broken-run/config.yaml, line 2", "malformed YAML")
def exporting_a_run_with_a_malformed_config(place: Place) -> list[str]:
    place.file(str(place.broken_run() / "config.yaml"), "model: {base: x\n")
    shutil.rmtree("broken-run/model")
    return ["export", "broken-run"]


@says("broken-run/config.yaml", "'bse'", "did you mean model.base?")
def exporting_a_run_with_an_unknown_key(place: Place) -> list[str]:
    place.file(str(place.broken_run() / "config.yaml"), "model: {bse: x}\n")
    shutil.rmtree("broken-run/model")
    return ["export", "broken-run"]


# -------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize(("mistake", "pieces"), MISTAKES, ids=[mistake.__name__ for mistake, _ in MISTAKES])
def test_a_mistake_is_told_clearly_and_leaves_nothing(
    place: Place, capsys: pytest.CaptureFixture[str], mistake: Mistake, pieces: tuple[str, ...]
) -> None:
    argv = mistake(place)
    text = message(capsys, argv)
    assert [piece for piece in pieces if piece not in text] == [], text
    assert not text.count("  → ") > 1


def test_a_name_of_two_plugins_is_an_error_with_both_class_paths(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install_format(Path("site"), "stranger-one", "Namesake", "namesake_one")
    install_format(Path("site"), "stranger-two", "Namesake", "namesake_two")
    monkeypatch.syspath_prepend(Path("site").resolve())
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    config = place.file("my.yaml", "data: {train: [{path: good.jsonl, format: Namesake}]}")
    text = message(capsys, place.fit("--config", config, train=None))
    assert "my.yaml, data.train: the name Namesake is used more than once" in text
    assert "format Namesake (stranger-one 2.5) and format Namesake (stranger-two 2.5)" in text
    assert "give the full class path: namesake_one.Namesake or namesake_two.Namesake" in text


FAULTY = '''\
from lightning_sft import Conversation, DataFormat, Message


class {name}(DataFormat):
    """Fails at the second row."""

    def matches(self, columns):
        return False

    def convert(self, row):
        {body}
'''


@pytest.mark.parametrize(
    ("name", "body", "fault"),
    [
        ("Raises", "return [Conversation((Message('user', row['nothing']),))]", "KeyError: 'nothing'"),
        ("GivesDicts", "return [{'role': 'user'}]", "gave a dict instead of a Conversation"),
        ("GivesNothing", "return None", "TypeError"),
    ],
)
def test_a_plugins_fault_names_it_its_distribution_its_version_and_the_row(
    place: Place,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    body: str,
    fault: str,
) -> None:
    install(
        Path("site"),
        "faulty-formats",
        {"lightning_sft.formats": {name: f"{name.lower()}_mod:{name}"}},
        {f"{name.lower()}_mod": FAULTY.format(name=name, body=body)},
    )
    monkeypatch.syspath_prepend(Path("site").resolve())
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    config = place.file("my.yaml", f"data: {{train: [{{path: good.jsonl, format: {name}}}]}}")
    text = message(capsys, place.fit("--config", config, train=None))
    assert "good.jsonl, row 1" in text
    assert f"format {name} (faulty-formats 2.5)" in text
    assert fault in text


def test_a_refused_continuation_leaves_the_earlier_run_as_it_was(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    run = place.broken_run()
    shutil.rmtree(run / "model")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    where = ["--trainer.default_root_dir", str(run), "--ckpt_path", "last"]
    message(capsys, place.fit("--model.adapter", "LoRA", "--model.adapter.r", "4", *where))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_an_existing_empty_folder_is_not_taken_for_a_run(place: Place) -> None:
    Path("mine").mkdir()
    assert main(place.fit("--trainer.default_root_dir", "mine", "--trainer.limit_train_batches", "1")) == 0
    assert (Path("mine") / "model" / "config.json").is_file()
