"""The model card says what the run folder says, and a model is uploaded only when it is asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from lightning_sft import SFTError, model_card
from lightning_sft.export import export


@pytest.fixture
def run(tuned_runs, tmp_path) -> Path:
    return Path(shutil.copytree(tuned_runs["LoRA"], tmp_path / "run"))


def parts(folder: Path) -> tuple[dict, str]:
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_a_run_writes_a_card_with_data_training_and_scores(run):
    front, text = parts(run / "model")
    assert front == {
        "library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lightning-sft", "sft", "lora"],
        "license": "unknown",
    }  # fmt: skip
    source = json.loads((run / "ledger.json").read_text())["train"]["sources"][0]
    assert f"| {source['rows']:,} | {source['examples']:,} | {source['trained_tokens']:,} |" in text
    assert "| learning_rate | 0.01 |" in text
    assert "| seed | 0 |" in text
    assert "(not on the Hub)" in text
    assert str(run.parent) not in text  # no paths of this machine
    assert "Not stated" in text


def test_what_was_not_forgotten_and_the_hubs_base_are_in_it(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["base"] = "org/base"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    record = {"retention": 0.9, "retention_interval": [0.8, 0.95], "domains": {"facts": {"retention": 0.7}}}
    (run / "forgetting.json").write_text(json.dumps({"history": [{}, record]}))
    model_card.write(run / "model", run, license="apache-2.0")
    front, text = parts(run / "model")
    assert front["base_model"] == "org/base"
    assert front["base_model_relation"] == "adapter"
    assert front["license"] == "apache-2.0"
    assert "| retention of the base's knowledge | 0.900 (95 %: 0.800 to 0.950) |" in text
    assert "| retention, facts | 0.700 |" in text


def test_a_base_that_was_moved_is_not_taken_for_the_hubs(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["base"] = "/home/somebody/models/base"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    model_card.write(run / "model", run)
    front, text = parts(run / "model")
    assert "base_model" not in front
    assert "somebody" not in text


def test_a_merged_model_has_a_card_of_its_own_and_files_of_the_size_asked_for(run):
    export(str(run), merge=True, license="mit", max_shard_size="20KB")
    front, _ = parts(run / "merged")
    card = ModelCard.load(run / "merged" / "README.md").data.to_dict()  # the Hub's own reading
    expected = {"license": "mit", "library_name": "transformers", "pipeline_tag": "text-generation"}
    assert {name: card[name] for name in expected} == expected
    assert (front["library_name"], front["license"]) == ("transformers", "mit")
    index = json.loads((run / "merged" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1


def test_it_is_uploaded_only_when_asked_for(run, monkeypatch):
    import huggingface_hub

    calls = []

    class Hub:
        def create_repo(self, name, **options):
            calls.append((name, options))
            if "/" not in name:
                raise OSError("no")
            return type("Made", (), {"repo_id": name, "__str__": lambda self: f"https://hub/{name}"})()

        def upload_folder(self, folder_path, repo_id):
            calls.append((folder_path, repo_id))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    export(str(run))
    assert not calls
    export(str(run), push_to_hub="me/model")
    assert calls == [("me/model", {"private": True, "exist_ok": True}), (str(run / "model"), "me/model")]
    with pytest.raises(SFTError, match="the Hub didn't take it"):
        export(str(run), push_to_hub="model")
