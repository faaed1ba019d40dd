"""Two processes, through the command: the same losses, model and checkpoints as one, under every strategy."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_run import STOP, losses, metrics, weights, write_config

from lightning_sft.__main__ import main

pytestmark = pytest.mark.slow

ADAPTERS = {
    "Full": "Full",
    "LoRA": {"class_path": "LoRA", "init_args": {"r": 4}},
    "EVA": {"class_path": "LoRA", "init_args": {"r": 4, "init": "eva"}},
    "CorDA": {"class_path": "LoRA", "init_args": {"r": 4, "init": "corda"}},
    "QLoRA": {"class_path": "QLoRA", "init_args": {"r": 4, "compute_dtype": "float32"}},
    "unfreezing": {"class_path": "Full", "init_args": {"unfreeze_every": 2, "layer_decay": 0.5}},
}
FAMILY = {"Full": "gemma2", "QLoRA": "wide"}  # the embeddings of one of them are tied
RECOMPUTED = ["--model.gradient_checkpointing", "true"]
COMPILED = ["--model.compile", "true", "--trainer.callbacks", "[]"]  # generation would compile for minutes
WAYS = [
    ("Full", "ddp", []),
    ("Full", "fsdp2", []),
    ("Full", "fsdp2_offload", RECOMPUTED),
    ("LoRA", "ddp", RECOMPUTED),
    ("LoRA", "fsdp2", RECOMPUTED),
    ("LoRA", "fsdp2", [*RECOMPUTED, *COMPILED]),
    ("QLoRA", "ddp", []),
    ("QLoRA", "ddp", COMPILED),
    ("unfreezing", "ddp", []),
    ("unfreezing", "fsdp2", []),
    ("EVA", "ddp", []),
    ("CorDA", "ddp", []),
]
SECONDS = 10 * 60


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "LIGHTNING_SFT_"))}
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def fit(
    folder: Path, config: Path, *arguments: str, strategy: str = "ddp", **more: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lightning_sft", "fit", "--config", str(config), *arguments]
    return subprocess.run(
        [*command, "--trainer.devices", "2", "--trainer.strategy", strategy], env=environment(**more), cwd=folder,
        capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip


def config_of(folder: Path, adapter: str, model_folder: Any, **data: Any) -> Path:
    """Eight rows a step on two ranks; the last accumulation window of an epoch is only half of one."""
    return write_config(
        folder, model_folder(FAMILY.get(adapter, "llama")), model={"adapter": ADAPTERS[adapter]}, data=data,
        trainer={"callbacks": [{"class_path": "asking.Asking"}], "gradient_clip_val": 0.5},
    )  # fmt: skip


@pytest.fixture(scope="module")
def one_process(model_folder, tmp_path_factory):
    """A function from an adapter to the run of one process, with batches of twice the size."""
    made: dict[str, Path] = {}

    def run(adapter: str) -> Path:
        if adapter not in made:
            folder = tmp_path_factory.mktemp("one")
            config = config_of(folder, adapter, model_folder, batch_size=4)
            assert (
                main(["fit", "--config", str(config), "--trainer.default_root_dir", str(folder / "run")]) == 0
            )
            made[adapter] = folder / "run"
        return made[adapter]

    return run


def close(run: Path, expected: Path) -> None:
    """The same losses at every step and validation, and the same model, up to rounding."""
    for name in ("train/loss", "val/loss"):
        found, wanted = ([float(row[name]) for row in metrics(each) if row[name]] for each in (run, expected))
        assert found == pytest.approx(wanted, rel=1e-5)
        assert len(wanted) == {"train/loss": 6, "val/loss": 2}[name]
    mine, theirs = weights(run), weights(expected)
    assert mine.keys() == theirs.keys()
    assert all(torch.allclose(mine[name], theirs[name], atol=2e-4) for name in mine)


def checkpoint(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return found


@pytest.mark.parametrize(
    ("adapter", "strategy", "options"),
    WAYS,
    ids=lambda value: "+".join(value[::2]) if isinstance(value, list) else value,
)
def test_two_processes_train_as_one_does(adapter, strategy, options, model_folder, one_process, tmp_path):
    config = config_of(tmp_path, adapter, model_folder)
    done = fit(tmp_path, config, *options, strategy=strategy)
    assert done.returncode == 0, done.stdout + done.stderr
    run, expected = tmp_path / "runs" / "my-1", one_process(adapter)
    assert list((tmp_path / "runs").iterdir()) == [run]
    close(run, expected)
    wanted = json.loads((expected / "asked-0.json").read_text())
    asked = [json.loads(path.read_text()) for path in run.glob("asked-*.json")]
    assert len(asked) == (0 if "[]" in options else 2)
    for each in asked:
        assert each["scores"] == pytest.approx(wanted["scores"], rel=1e-4)
        assert each["answers"] == wanted["answers"]
        assert each["norms"] == pytest.approx(wanted["norms"], rel=1e-4)
        assert len(each["norms"]) == 6
    mine, theirs = checkpoint(run), checkpoint(expected)
    assert {n: t.shape for n, t in mine["state_dict"].items()} == {
        n: t.shape for n, t in theirs["state_dict"].items()
    }
    moments = [each["optimizer_states"][0]["state"] for each in (mine, theirs)]
    assert moments[0].keys() == moments[1].keys()
    for index, values in moments[0].items():
        assert torch.allclose(values["exp_avg"], moments[1][index]["exp_avg"], atol=1e-5)


def test_a_run_goes_on_under_another_strategy_as_if_it_had_not_changed(
    model_folder, tmp_path, capsys, monkeypatch
):
    config = write_config(tmp_path, model_folder("llama"))  # with dropout
    assert fit(tmp_path, config, "--trainer.default_root_dir", "whole").returncode == 0
    run = tmp_path / "run"
    chain = [("fsdp2", "step:2", 0), ("ddp", "step:4", 2), ("fsdp2", "", 4)]
    for strategy, stop, begins in chain:
        arguments = ["--trainer.default_root_dir", "run", "--ckpt_path", "auto"]
        done = fit(tmp_path, config, *arguments, strategy=strategy, **({STOP: stop} if stop else {}))
        assert (done.returncode == 0) == (not stop), done.stdout + done.stderr
        assert (f"after step {begins} " in done.stdout) == (begins > 0)
        assert checkpoint(run)["global_step"] == (int(stop[5:]) if stop else 6)
        if stop == "step:2":
            monkeypatch.chdir(tmp_path)
            assert main(["fit", "--config", str(config), *arguments]) == 2
            message = capsys.readouterr().err
            assert "processes: 2 -> 1" in message
            assert "lightning-sft export" in message
    found, wanted = losses(run), losses(tmp_path / "whole")
    assert [float(found[step]) for step in range(6)] == pytest.approx(
        [float(wanted[step]) for step in range(6)], rel=1e-5
    )


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def test_two_nodes_have_one_run_folder(model_folder, one_process, tmp_path):
    """As torchrun starts them, one on each node; the second one is told nothing by the first."""
    config, port = config_of(tmp_path, "LoRA", model_folder), free_port()
    nodes = []
    for rank in (0, 1):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1",
            "--node_rank", str(rank), "--master_addr", "127.0.0.1", "--master_port", port,
            "-m", "lightning_sft", "fit", "--config", str(config),
            "--trainer.devices", "1", "--trainer.num_nodes", "2", "--trainer.strategy", "fsdp2",
        ]  # fmt: skip
        nodes.append(
            subprocess.Popen(
                command,
                env=environment(),
                cwd=tmp_path,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    outputs = [node.communicate(timeout=SECONDS)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["my-1"]
    assert ["The run is in" in output for output in outputs] == [True, False]
    close(tmp_path / "runs" / "my-1", one_process("LoRA"))
