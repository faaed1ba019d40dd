"""Probes on two processes, whole or sharded, measure what they measure on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PROMPTS = [
    {"prompt": f"say {n}", "format": "json", "first": "The boat is red.", "second": "The boat is blue now."}
    for n in range(3)
]


def probes(prompts: str) -> list[dict]:
    few = {"max_new_tokens": 4}
    return [
        {"class_path": "MemorizationProbe", "init_args": {"examples": 8}},
        {"class_path": "DriftProbe"},
        {"class_path": "SampleGenerations", "init_args": {"path": prompts, **few}},
        {"class_path": "RefusalProbe", "init_args": {"harmful": prompts, "harmless": prompts, **few}},
        {"class_path": "BiasProbe", "init_args": {"pairs": prompts}},
        {"class_path": "FormatProbe", "init_args": {"path": prompts, **few}},
        {
            "class_path": "EvaluateDuringFit",
            "init_args": {
                "evaluators": [{"class_path": "Perplexity", "init_args": {"path": "tiny:general"}}], "items": 4
            },
        },
    ]  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A function that trains a few steps and gives the histories of all probes, by file."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    known: dict[tuple[str, str | None], dict[str, list[dict]]] = {}

    def run(adapter: str, strategy: str | None) -> dict[str, list[dict]]:
        if (adapter, strategy) in known:
            return known[adapter, strategy]
        ranks = 1 if strategy is None else 2
        config = yaml.safe_load((ROOT / "configs/retention.yaml").read_text())
        config["data"]["train"][0]["limit"] = 160
        config["data"]["val"][0]["limit"] = 32
        config["data"]["batch_size"] = 32 // ranks
        config["model"] |= {"adapter": adapter, "learning_rate": 1e-3, "preflight": False}
        config["trainer"]["callbacks"][0]["init_args"]["every_n_steps"] = 2
        config["trainer"]["callbacks"] += probes(str(folder / "prompts.jsonl"))
        where = folder / f"{adapter}-{strategy}"
        options = {"devices": ranks, "max_epochs": 1, "default_root_dir": str(where)}
        config["trainer"] |= options | ({"strategy": strategy} if strategy else {})
        path = folder / f"{adapter}-{strategy}.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "lightning_sft", "fit", "--config", str(path)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stdout + done.stderr
        known[adapter, strategy] = {
            path.stem: json.loads(path.read_text())["history"] for path in sorted(where.glob("*.json"))
            if path.stem not in ("ledger", "goldens")
        }  # fmt: skip
        return known[adapter, strategy]

    return run


def flat(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(each, f"{path}/{key}")
    else:
        yield path, value


@pytest.mark.parametrize("adapter", ["Full", "LoRA"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_measure_what_one_does(strategy, adapter, measured):
    one, two = measured(adapter, None), measured(adapter, strategy)
    assert len(one) == 8
    assert [record["step"] for record in one["forgetting"]] == [0, 2, 4, 5]
    assert one["forgetting"][-1]["retention"] < 1
    assert one["drift"][-1]["all"] > 0
    for name, history in one.items():
        found, expected = dict(flat(two[name])), dict(flat(history))
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if isinstance(value, float):
                assert found[key] == pytest.approx(value, abs=1e-4), (name, key)
            else:
                assert found[key] == value, (name, key)
