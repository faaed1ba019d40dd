"""`fit`, `validate`, `test` and `evaluate`: LightningCLI over SFTModule, SFTDataModule and the named plug-ins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_sft import assets, command_line, plugins, recorded_paths, resume, run_folder
from lightning_sft.bases import Evaluator
from lightning_sft.blame import blame
from lightning_sft.data.datamodule import SFTDataModule
from lightning_sft.data.sources import Source
from lightning_sft.errors import SFTError
from lightning_sft.evaluation.trainer import SFTTrainer
from lightning_sft.printed_rates import rates_behind_config
from lightning_sft.ranks import is_first_process
from lightning_sft.training import strategies
from lightning_sft.training.checkpoints import AtomicCheckpointIO, LastCheckpoint
from lightning_sft.training.launching import use_launcher
from lightning_sft.training.metrics_file import MetricsFile
from lightning_sft.training.models import is_adapter, load_checkpoint
from lightning_sft.training.module import SFTModule
from lightning_sft.training.progress import Progress
from lightning_sft.training.resuming import end_also_when_killed, position

_TWICE = re.compile(r"more than one stateful callback of type `(\w+)`")


class Parser(command_line.CommandParser, LightningArgumentParser):
    """LightningCLI's parser, with errors for people."""

    def add_class_arguments(self, theclass: Any, nested_key: str | None = None, **kwargs: Any) -> list[str]:
        """Without sub-configs for `data`: a file that is given there is data, not to be parsed as options."""
        if nested_key == "data":
            kwargs["sub_configs"] = False
        return super().add_class_arguments(theclass, nested_key, **kwargs)


class SFTCommand(LightningCLI):
    """The commands that train and validate, on one YAML."""

    folder: Path | None = None
    resumed: resume.Resume | None = None
    steps_done = 0
    draws_seed = False
    writer: run_folder.RunFolder | None = None

    def __init__(self, argv: Sequence[str], callbacks: Sequence[Callback] = ()) -> None:
        self.asked, self.further = argv[0], callbacks
        try:
            super().__init__(
                SFTModule,
                SFTDataModule,
                trainer_class=SFTTrainer,
                args=list(argv),
                save_config_callback=None,
                seed_everything_default=0,
                trainer_defaults={"log_every_n_steps": 10, "enable_model_summary": False},
                parser_class=Parser,
                parser_kwargs={"prog": "lightning-sft"},
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
            )
        except BaseException as error:
            if isinstance(error, SFTError):
                raise command_line.in_config(error, argv) from error
            begun = self.writer is not None and self.writer.started
            fault = blame(error)
            if fault is not None and fault.in_constructor and isinstance(error, ValueError):
                raise SFTError(
                    str(fault), fix="change its options; `lightning-sft plugins NAME` shows them"
                ) from error
            if fault is not None:
                raise
            if isinstance(error, MisconfigurationException) or (isinstance(error, ValueError) and not begun):
                raise SFTError(
                    str(error), where="trainer", fix="change the trainer's options; --help lists them"
                ) from error
            if isinstance(error, RuntimeError) and (twice := _TWICE.search(str(error))):
                raise SFTError(
                    f"two callbacks of the class {twice[1]} would keep their state in one place",
                    where="trainer.callbacks",
                    fix="take one out, or give each a `name` of its own where the class has that option",
                ) from error
            if isinstance(error, SystemExit) and _was_interrupted(self):
                _tell_how_to_go_on(self.folder)
                raise KeyboardInterrupt from None  # Lightning exits with 1
            raise
        finally:
            if self.folder is not None:
                run_folder.release(self.folder)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning's is static
        """The one that is asked for, as each parser takes time to make, and its parameters that are not options."""
        return {self.asked: {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Show the default adapter and loss as what they are; add when checkpoints are made, and the evaluators."""
        parser.add_class_arguments(LastCheckpoint, "checkpoints")
        parser.add_argument("--evaluators", type=list[Evaluator], default=[], help="What `evaluate` asks.")
        for key, kind in (("model.adapter", "adapters"), ("model.loss", "losses")):
            default = plugins.default(kind)
            parser.set_defaults({key: {"class_path": f"{default.__module__}.{default.__qualname__}"}})

    def _parse_ckpt_path(self) -> None:
        """Leave the options as given: LightningCLI would take hyperparameters from the checkpoint."""
        self.draws_seed = self.config[self.config.subcommand].seed_everything is True

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint, claim the run folder, and set the run's end where no option sets it."""
        chosen = self.config[self.subcommand]
        for part in ("train", "val", "test"):
            _refuse_broken_list(f"data.{part}", chosen.data[part])
        strategies.check_options(chosen.trainer)
        if self.subcommand != "fit":
            if chosen.ckpt_path is not None:
                chosen.ckpt_path = str(
                    resume.evaluated(str(chosen.ckpt_path), chosen.trainer.default_root_dir)
                )
                load_checkpoint(Path(chosen.ckpt_path), weights_only=chosen.weights_only is not False)
            return
        trainer = chosen.trainer
        set_end(trainer)
        asked = chosen.ckpt_path
        if asked is not None:
            self._resume(str(asked))
        if trainer.fast_dev_run:
            return
        if self.resumed is not None and self.resumed.folder is not None:
            trainer.default_root_dir = str(self.resumed.folder)
        name = Path(str(chosen.config[0])).stem if chosen.config else "run"
        again = asked == resume.LAST_RUN_OR_NEW or (
            self.resumed is not None and self.resumed.folder is not None
        )
        self.folder = run_folder.claim(trainer.default_root_dir, name, resuming=again)
        trainer.default_root_dir = str(self.folder)
        if again:
            command_line.quieten_continuing(self.folder)

    def _resume(self, asked: str) -> None:
        """Find the checkpoint, and the run that it is of."""
        config = self.config.fit
        told = run_folder.told()
        if told is not None and asked in (resume.LAST_RUN, resume.LAST_RUN_OR_NEW):
            checkpoint = resume.last_of(told)
            self.resumed = resume.Resume(checkpoint, told) if checkpoint.is_file() else None
        else:
            self.resumed = resume.continued(
                asked,
                config.trainer.default_root_dir,
                yaml.safe_load(self._dumped()),
                any_seed=self.draws_seed,
            )
        config.ckpt_path = None
        if self.resumed is None:
            return
        config.ckpt_path = str(self.resumed.checkpoint)
        saved = load_checkpoint(self.resumed.checkpoint, weights_only=config.weights_only is not False)
        if self.resumed.folder is not None:
            self.steps_done = int(saved["global_step"])
            epoch, batch = position(saved)
            if is_first_process():
                print(
                    f"Continuing {self.resumed.folder} after step {self.steps_done} (epoch {epoch + 1}, batch {batch})."
                )
            if self.draws_seed:
                old = command_line.read_config(str(self.resumed.folder / run_folder.CONFIG))
                config.seed_everything = old.get("seed_everything", config.seed_everything)
                self._set_seed()

    def _dumped(self) -> str:
        """The run's configuration as YAML; a run that was continued has that of its beginning."""
        config = recorded_paths.absolute(self.config.fit)
        config.pop("config", None)
        if self.resumed is not None and self.resumed.folder is not None:
            config.ckpt_path = None
        return str(self._parser(self.subcommand).dump(config, skip_none=False))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer, with what every run has: progress, checkpoints, metrics, the run folder."""
        given = dict(self._get(self.config_init, "trainer"))
        callbacks = [*_as_list(given["callbacks"]), *self.further]
        if given["enable_progress_bar"] is not False and not _has(callbacks, ProgressBar):
            callbacks.append(Progress())
        if self.folder is None:
            kwargs.setdefault("logger", given["logger"] or False)
            kwargs.setdefault("enable_checkpointing", _has(callbacks, ModelCheckpoint))
            return self._checked(super().instantiate_trainer(callbacks=callbacks, **kwargs))
        keeps = given["enable_checkpointing"] is not False
        if keeps and self._is_validated() and not _has(callbacks, ModelCheckpoint):
            callbacks.append(self._best())
        kwargs.setdefault("enable_checkpointing", _has(callbacks, Checkpoint))
        if given["logger"] is None or given["logger"] is True:
            kwargs.setdefault("logger", MetricsFile(self.folder, self.steps_done))
        plugins = _as_list(given["plugins"])
        if not _has(plugins, CheckpointIO):
            kwargs.setdefault("plugins", [*plugins, AtomicCheckpointIO()])
        self.model.exact_resume = self.resumed is None or self.resumed.folder is not None
        self.writer = run_folder.RunFolder(self._dumped())
        callbacks.insert(0, self.writer)  # before the user's: a callback that fails must not cost the model
        if keeps:
            callbacks.insert(0, self._get(self.config_init, "checkpoints"))  # before any hook of a next batch
        return self._checked(super().instantiate_trainer(callbacks=callbacks, **kwargs))

    def _checked(self, trainer: Trainer) -> Trainer:
        """The trainer, if its strategy and precision go with the adapter."""
        asked = self._get(self.config_init, "trainer")["precision"]
        precision = None if asked is None else str(asked)
        strategies.check(trainer, self.model.adapter, self.model.optimizer, precision)
        use_launcher(trainer)
        end_also_when_killed(trainer)
        return trainer

    def _is_validated(self) -> bool:
        return bool(self.datamodule.sources["val"]) or self.datamodule.val_split is not None

    def _best(self) -> ModelCheckpoint:
        """The best checkpoint by validation loss."""
        assert self.folder is not None
        return ModelCheckpoint(
            dirpath=self.folder / run_folder.CHECKPOINTS,
            filename="epoch{epoch}-step{step}",
            auto_insert_metric_name=False,
            monitor="val/loss",
            save_on_train_epoch_end=False,  # but after validation, whose loss no checkpoint holds
            enable_version_counter=False,  # a run that is continued makes the same one again
        )

    def before_evaluate(self) -> None:
        """Hand the evaluators on, with their options for the record."""
        dumped = yaml.safe_load(self._parser("evaluate").dump(self.config.evaluate, skip_none=False))
        assert isinstance(self.trainer, SFTTrainer)
        self.trainer.evaluators = self._get(self.config_init, "evaluators")
        self.trainer.evaluator_configs = dumped["evaluators"]

    def after_fit(self) -> None:
        """Say where everything is.

        Raises:
            SFTError: There was nothing to do, as when the checkpoint is from the run's end.
        """
        if self.writer is not None and not self.writer.started:
            raise SFTError(
                "the checkpoint is from the end of the run, so there is nothing left to train"
                if self.resumed
                else "the run ends before its first step",
                where=f"--ckpt_path {self.resumed.checkpoint}" if self.resumed else "trainer",
                fix="raise trainer.max_epochs, max_steps or max_time",
            )
        if self.folder is not None and self.trainer.is_global_zero:
            merge = " --merge" if is_adapter(self.folder / run_folder.MODEL) else ""
            print(
                f"\nThe run is in {self.folder}: "
                "config.yaml, metrics.csv, ledger.json, checkpoints/, model/\n"
                f'Try it:   lightning-sft generate {self.folder} --prompt "..."\n'
                f"Export:   lightning-sft export {self.folder}{merge}"
            )


def run(argv: Sequence[str], callbacks: Sequence[Callback] = ()) -> None:
    """Run `fit`, `validate`, `test` or `evaluate` with these arguments, the command's name first.

    Args:
        argv: The arguments.
        callbacks: Further callbacks, behind those of the configuration and in none of its files.

    Raises:
        SFTError: Something that the user gave is at fault.
        SystemExit: With 2 if the arguments or a config file can't be parsed.
    """
    command_line.quieten()
    argv = [assets.config_path(argument) for argument in argv]
    command_line.check_configs(argv)
    plugins.load_named(plugins.named_in(argv))
    if any(argument.split("=")[0].endswith("help") or argument == "-h" for argument in argv):
        _load_all_that_can_be()
    prints = argv[0] == "fit" and any(argument.split("=")[0] == "--print_config" for argument in argv)
    with rates_behind_config() if prints else nullcontext():
        SFTCommand(argv, callbacks)


def _load_all_that_can_be() -> None:
    """So that help lists them."""
    for plugin in plugins.discover():
        with suppress(SFTError):
            plugin.load()


def set_end(trainer: Any) -> None:
    """Three epochs, where the trainer's options set no end of the run."""
    if trainer.max_epochs is None and trainer.max_steps == -1 and trainer.max_time is None:
        trainer.max_epochs = 3


def _was_interrupted(command: SFTCommand) -> bool:
    trainer = getattr(command, "trainer", None)
    return trainer is not None and bool(trainer.interrupted)


def _tell_how_to_go_on(folder: Path | None) -> None:
    if folder is not None and resume.last_of(folder).is_file():
        print(f"\nContinue: add --trainer.default_root_dir {folder} --ckpt_path last")


def _refuse_broken_list(key: str, value: object) -> None:
    """Say what is wrong with a list of sources that the parser has taken for a path.

    Raises:
        SFTError: The list's own problem.
    """
    for path in filter(lambda each: isinstance(each, str), _as_list(value)):
        if path.lstrip().startswith(("[", "{")) and not Path(path).exists():
            parser = command_line.CommandParser()
            parser.add_argument(f"--{key}", type=Source if path.lstrip()[0] == "{" else list[Source])
            parser.parse_args([f"--{key}={path}"])


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _has(callbacks: Sequence[object], kind: type) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)
