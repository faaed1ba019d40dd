"""`lightning-sft export`: the trained adapter or model as a folder that transformers and peft load."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning_sft import folders
from lightning_sft.errors import SFTError

if TYPE_CHECKING:
    from lightning_sft.training.module import SFTModule


def export(
    source: str,
    output: str | None = None,
    merge: bool = False,
    ckpt_path: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    tolerance: float = 0.01,
    max_shard_size: str = "5GB",
    license: str | None = None,
    push_to_hub: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write a run's adapter or model to a folder, or merge an adapter into its base.

    Args:
        source: A run folder, or an adapter's folder to merge.
        output: Where to write; by default `model/` in the run folder, or `merged/` with `--merge`.
        merge: Add the adapter to its base: a whole model, which
            `AutoModelForCausalLM.from_pretrained` loads.
        ckpt_path: The checkpoint of the run to export, a path or its name (`last`); by default what the run exported
            at its end, or its last checkpoint if it didn't get there.
        dtype: Type of the weights of a merged or whole model; by default the stored one.
        tolerance: How far the written model may be from the trained one: the mean divergence (KL) of the next token's
            distribution on held-out text, in nats. Nothing is written above it.
        max_shard_size: Largest file of the weights that are merged or converted, such as 5GB.
        license: The licence's id for the model card, such as apache-2.0.
        push_to_hub: Also upload it to this repository of the Hugging Face Hub, `owner/name`; a new one is private.
        trust_remote_code: Run model code that comes with the base. Only for sources you trust.

    Raises:
        SFTError: There is nothing to export, `output` already holds something, or it can't be written.
    """
    from lightning_sft import merging, model_card, run_folder
    from lightning_sft.training.models import is_adapter

    _check(max_shard_size, license)
    run, is_run = Path(source), (Path(source) / run_folder.CONFIG).is_file()
    if ckpt_path is not None and not is_run:
        raise SFTError("only a run has checkpoints", where=source, fix="give a run folder with --ckpt_path")
    if is_run and (ckpt_path is not None or not (run / run_folder.MODEL).is_dir()):
        checkpoint = run_folder.checkpoint(run, ckpt_path or run_folder.LAST, "--ckpt_path")
        folder = run / run_folder.MODEL if ckpt_path is None else run / f"model-{checkpoint.stem}"
        if output is not None and not merge and dtype is None:
            folder = Path(output)
        folders.free(folder)
        folders.write_whole(folder, restore(run, checkpoint, trust_remote_code=trust_remote_code).export)
        print(f"{checkpoint} → {folder}")
        model_card.write(folder, run, license=license)
    else:
        folder = run_folder.model_folder(source)
    if not is_run and (folder.resolve().parent / run_folder.CONFIG).is_file():
        run, is_run = folder.resolve().parent, True
    _intact(folder)
    if merge and not is_adapter(folder):
        raise SFTError("this is already a whole model, there is nothing to merge", where=str(folder))
    if dtype is not None and not merge and is_adapter(folder):
        raise SFTError(
            "an adapter is stored as it was trained", where="--dtype", fix="add --merge, or leave it out"
        )
    if merge or dtype is not None:
        made = (
            Path(output) if output is not None else folder.with_name("merged" if merge else f"model-{dtype}")
        )
        folders.free(made)
        parity: list[merging.Parity] = []

        def write(place: Path) -> None:
            parity.append(
                merging.write(
                    folder, place, dtype=dtype, tolerance=tolerance, max_shard_size=max_shard_size,
                    trust_remote_code=trust_remote_code,
                )
            )  # fmt: skip

        folders.write_whole(made, write)
        print(f"{'merged ' if merge else ''}{folder} → {made}\n{parity[0]}")
        folder = made
    elif output is not None and folder != Path(output):
        folders.write_whole(folders.free(Path(output)), partial(_copied, folder))
        print(f"{folder} → {output}")
        folder = Path(output)
    elif output is None:
        print(f"the exported model is in {folder}")
    if is_run and (merge or dtype is not None or license is not None):
        model_card.write(folder, run, license=license)
    if push_to_hub is not None:
        print(f"{folder} → {_push(folder, push_to_hub)}")


def _check(max_shard_size: str, license: str | None) -> None:
    if not re.fullmatch(r"\d+(\.\d+)? ?([KMGT]B)", max_shard_size) or not float(max_shard_size[:-2]):
        raise SFTError(f"{max_shard_size!r} is no size", where="--max_shard_size", fix="give one such as 5GB")
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise SFTError(
            f"{license!r} is no licence's id",
            where="--license",
            fix="give one that the Hub knows, such as apache-2.0, cc-by-4.0, llama3.1, or other",
        )


def _copied(folder: Path, output: Path) -> None:
    shutil.copytree(folder, output)


def _intact(folder: Path) -> None:
    """Refuse a model whose weights aren't all there.

    Raises:
        SFTError: A file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    fix = "copy the model anew, or export the run's checkpoint: --ckpt_path last"
    named: set[str] = set()
    for index in folder.glob("*.safetensors.index.json"):
        named |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    if missing := sorted(name for name in named if not (folder / name).is_file()):
        raise SFTError(f"the model lacks {missing[0]}", where=str(folder), fix=fix)
    files = sorted(folder.glob("*.safetensors"))
    if not files and not any(folder.glob("*.bin")):
        expected = "adapter_model" if (folder / "adapter_config.json").exists() else "model"
        raise SFTError(f"the model has no weights: no {expected}.safetensors", where=str(folder), fix=fix)
    for path in files:
        try:
            with safe_open(str(path), "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise SFTError(f"the weights are damaged: {error}", where=str(path), fix=fix) from error


def _push(folder: Path, repository: str) -> str:
    """Upload a folder to the Hub; returns the address.

    Raises:
        SFTError: The Hub refuses, or can't be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = HfApi()
    try:
        made = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(folder_path=str(folder), repo_id=made.repo_id)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError, RuntimeError) as error:
        raise SFTError(
            f"the Hub didn't take it: {error}",
            where=f"--push_to_hub {repository}",
            fix="check the name (owner/name), the network, and HF_TOKEN, which needs the right to write",
        ) from error
    return str(made)


def restore(run: Path, checkpoint: Path, *, trust_remote_code: bool = False) -> SFTModule:
    """The module of a run with the parameters of one of its checkpoints.

    The run's configuration may be a stranger's, so what it says of `trust_remote_code` doesn't count.

    Raises:
        SFTError: There is no such checkpoint, or it doesn't fit the run's configuration.
    """
    import torch

    from lightning_sft import command_line, plugins, run_folder
    from lightning_sft.training.models import load_checkpoint
    from lightning_sft.training.module import SFTModule

    if not checkpoint.is_file():
        raise SFTError(
            "no such checkpoint", where=str(checkpoint), fix="the run may have been stopped before its first"
        )
    saved = load_checkpoint(checkpoint)
    config = command_line.read_config(str(run / run_folder.CONFIG))
    options = {"model": config.get("model")}
    if isinstance(options["model"], dict):
        options["model"] = {**options["model"], "trust_remote_code": trust_remote_code}
    plugins.load_named([str(options)])
    parser = command_line.CommandParser()
    parser.add_class_arguments(SFTModule, "model")
    try:
        module: SFTModule = parser.instantiate(parser.parse_object(options)).model
    except SFTError as error:
        raise error.at(str(run / run_folder.CONFIG)) from error
    seed = config.get("seed_everything")
    with torch.random.fork_rng(devices=[]):  # frozen parts that were drawn are drawn again
        torch.manual_seed(seed if type(seed) is int else 0)
        module.configure_model()
    try:
        module.on_load_checkpoint(saved)
    except SFTError as error:
        raise SFTError(error.what, where=str(checkpoint), fix=error.fix) from error
    module.load_state_dict(saved["state_dict"], strict=False)
    return module


def command(argv: Sequence[str]) -> None:
    """Parse the command line and export."""
    from lightning_sft import command_line

    command_line.quieten()
    command_line.call(export, argv, "export")
