"""ForgettingProbe on two processes measures what it measures on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(tmp_path):

    config = yaml.safe_load(Path(__file__).parents[2].joinpath("configs/retention.yaml").read_text())
    config["data"]["train"][0]["limit"] = 320
    config["model"]["learning_rate"] = 1e-4
    histories = {}
    for ranks in (1, 2):
        config["data"]["batch_size"] = 32 // ranks
        options = {"devices": ranks, "max_epochs": 1, "default_root_dir": str(tmp_path / f"ranks-{ranks}")}
        config["trainer"] |= options | ({"strategy": "ddp"} if ranks > 1 else {})
        path = tmp_path / f"{ranks}.yaml"
        path.write_text(yaml.safe_dump(config))
        subprocess.run(
            [sys.executable, "-m", "lightning_sft", "fit", "--config", str(path)],
            check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        text = (tmp_path / f"ranks-{ranks}" / "forgetting.json").read_text()
        histories[ranks] = json.loads(text)["history"]
    assert [record["step"] for record in histories[1]] == [0, 10]
    for one, two in zip(histories[1], histories[2], strict=True):
        assert two["retention"] == pytest.approx(one["retention"], abs=1e-4)
        assert two["gain"] == pytest.approx(one["gain"], abs=1e-4)
        for name, values in one["domains"].items():
            for key, value in values.items():
                assert two["domains"][name][key] == pytest.approx(value, abs=1e-3), (name, key)
    assert histories[1][-1]["retention"] < 1
