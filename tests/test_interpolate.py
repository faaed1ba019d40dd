"""Points between base and tuned model: their weights and losses by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from lightning_sft import SFTError
from lightning_sft.__main__ import main
from lightning_sft.export import export
from lightning_sft.interpolate import interpolate
from lightning_sft.run_folder import CHECKPOINTS
from lightning_sft.verify import verify


@pytest.fixture
def copy(tuned_runs, tmp_path):
    """A function that copies a run."""

    def copied(adapter: str) -> Path:
        return Path(shutil.copytree(tuned_runs[adapter], tmp_path / adapter))

    return copied


@pytest.fixture
def general(tmp_path) -> str:
    path = tmp_path / "general.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("hello there", "how are you? " * 5))
    )
    return str(path)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def losses(folder: Path, run: Path, texts: list[str]) -> tuple[float, float]:
    """Validation and general loss of a model folder, row by row."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    golden = json.loads((run / "goldens.json").read_text())
    rows = [(e["input_ids"], e["weights"]) for e in golden["examples"]]
    found = []
    for part in (rows, [(ids, [1.0] * len(ids)) for ids in (tokenizer(text)["input_ids"] for text in texts)]):
        total = count = 0.0
        for ids, weight in part:
            with torch.no_grad():
                log_p = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
            own = log_p.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            total -= float((own * torch.tensor(weight[1:], dtype=torch.float64)).sum())
            count += sum(weight[1:])
        found.append(total / count)
    return found[0], found[1]


@pytest.mark.parametrize("adapter", ["Full", "LoRA"])
def test_a_point_has_the_weights_between(adapter, copy, general, model_folder, tmp_path):
    run = copy(adapter)
    interpolate(str(run), points="0,0.25,1", general=general, write=0.25, output=str(tmp_path / "quarter"))
    tuned, found_in = run / "model", tmp_path / "quarter"
    if adapter == "LoRA":
        export(str(run), str(tmp_path / "merged"), merge=True)
        tuned = tmp_path / "merged"
    base, end, found = (weights(folder) for folder in (model_folder("llama"), tuned, tmp_path / "quarter"))
    assert any(not torch.equal(base[name], end[name]) for name in base)
    for name in base:
        assert torch.allclose(found[name], base[name] + 0.25 * (end[name] - base[name]), atol=1e-6), name
    points = json.loads((run / "interpolation.json").read_text())
    texts = [json.loads(line)["text"] for line in Path(general).read_text().splitlines()]
    for point, folder in zip(points, (model_folder("llama"), tmp_path / "quarter", tuned), strict=True):
        expected = losses(folder, run, texts)
        assert (point["validation"], point["general"]) == pytest.approx(expected, rel=1e-5)
    assert (run / "interpolation.png").read_bytes().startswith(b"\x89PNG")
    stops = [
        json.loads((place / "generation_config.json").read_text()) for place in (found_in, run / "model")
    ]
    assert stops[0]["eos_token_id"] == stops[1]["eos_token_id"]


def test_the_model_that_is_written_says_what_it_is_and_is_verified_by_its_own_score(copy, general, capsys):
    run = copy("LoRA")
    interpolate(str(run), points="0,1", general=general, write=0.5, average=["last.ckpt"])
    folder = run / "interpolated-0.5"
    base, half, tuned = json.loads((run / "interpolation.json").read_text())
    assert (base["alpha"], half["alpha"], tuned["alpha"]) == (0, 0.5, 1)
    card = (folder / "README.md").read_text()
    assert "base + 0.5 · (tuned − base)" in card
    assert "mean of these checkpoints: last.ckpt" in card
    assert f"| validation loss (nats per token) | {half['validation']:.4g} |" in card
    assert f"| loss on general text (nats per token) | {half['general']:.4g} |" in card
    assert "## Scores of the tuned model" in card
    export(str(folder), dtype="bfloat16")
    assert "base + 0.5" in (run / "model-bfloat16" / "README.md").read_text()
    capsys.readouterr()
    for model in (folder, run / "model-bfloat16"):
        verify(str(model))
        assert f"α = 0.5 between base and tuned model had {half['validation']:.6g}" in capsys.readouterr().out
    golden = json.loads((run / "goldens.json").read_text())  # a run in fewer bits allows the point no more
    (run / "goldens.json").write_text(json.dumps({**golden, "quantized": True, "dtype": "bfloat16"}))
    off = {**half, "validation": half["validation"] * 1.01, "average": []}
    (folder / "interpolation.json").write_text(json.dumps(off))
    with pytest.raises(SFTError, match="loss on 4 val examples"):
        verify(str(folder))
    (folder / "interpolation.json").write_text("[]")
    with pytest.raises(SFTError, match="isn't as `interpolate` writes it"):
        verify(str(folder))


@pytest.mark.parametrize("adapter", ["Full", "LoRA"])
def test_checkpoints_are_averaged(adapter, copy, general, tmp_path):
    run = copy(adapter)
    last = run / CHECKPOINTS / "last.ckpt"
    saved = torch.load(last, weights_only=True)
    name = next(iter(saved["state_dict"]))
    saved["state_dict"][name] = saved["state_dict"][name] + 1.0
    torch.save(saved, run / CHECKPOINTS / "other.ckpt")
    options = {"points": "1", "general": general, "write": 1.0}
    interpolate(str(run), **options, output=str(tmp_path / "mean"), average=["last.ckpt", "other.ckpt"])
    interpolate(str(run), **options, output=str(tmp_path / "alone"), average=["last.ckpt"])
    mean, alone = weights(tmp_path / "mean"), weights(tmp_path / "alone")
    moved = [key for key in mean if not torch.allclose(mean[key], alone[key])]
    assert len(moved) == 1
    if adapter == "Full":
        assert torch.allclose(mean[moved[0]], alone[moved[0]] + 0.5, atol=1e-6)


def test_mistakes_are_told(copy, tmp_path, general):
    run = copy("LoRA")
    other, before = copy("Full") / CHECKPOINTS / "last.ckpt", sorted(run.rglob("*"))
    for options, says in (
        ({"points": "a"}, "no values of α"),
        ({"average": [str(other)]}, "the checkpoints lack"),
        ({"write": 1.0, "output": str(other.parent)}, "the folder is not empty"),
        ({"write": 1.0, "output": str(other / "x")}, "this is a file"),
        ({"average": ["none.ckpt"]}, "no such checkpoint"),
        ({"general": str(tmp_path / "none.jsonl")}, "no such file"),
    ):
        with pytest.raises(SFTError, match=says):
            interpolate(str(run), **{"general": general, **options})
    assert sorted(run.rglob("*")) == before
    with pytest.raises(SFTError, match="no run folder"):
        interpolate(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"use_dora": True}, "magnitude"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight"),
        ({"trainable_token_indices": [3]}, "trainable_tokens"),
    ],
)
def test_what_is_not_scaled_is_no_point_between(options, part, copy, general, model_folder):
    run = copy("LoRA")
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    base.name_or_path = str(model_folder("llama"))
    config = LoraConfig(target_modules=["q_proj"], **options)
    get_peft_model(base, config).save_pretrained(run / "model")
    with pytest.raises(SFTError, match=f"trained .*{part}.*, which isn't scaled"):
        interpolate(str(run), general=general)
    if part == "trainable_tokens":  # rows that the base hasn't
        written = yaml.safe_load((run / "config.yaml").read_text())
        written["model"]["new_tokens"] = ["<new>"]
        (run / "config.yaml").write_text(yaml.safe_dump(written))
        interpolate(str(run), points="1", general=general)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_was_trained_on_a_quantised_base_is_merged_and_interpolated(
    kind, model_folder, tmp_path, general
):
    """By the commands alone; what `interpolate` writes at 1 is what `export --merge` writes."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"instruction": f"say {n}", "output": "how are you?"}) + "\n" for n in range(8))
    )
    run = str(tmp_path / "run")
    options = {
        "model.base": model_folder("wide"), "model.adapter": "QLoRA", "model.adapter.quant_type": kind,
        "data.train": rows, "data.batch_size": 4, "model.learning_rate": 0.01, "trainer.accelerator": "cpu",
        "trainer.max_steps": 4, "trainer.default_root_dir": run,
    }  # fmt: skip
    assert main(["fit", *(f"--{key}={value}" for key, value in options.items())]) == 0
    assert main(["export", run, "--merge"]) == 0
    interpolate(run, points="1", general=general, write=1.0)
    merged, found = weights(tmp_path / "run" / "merged"), weights(tmp_path / "run" / "interpolated-1")
    assert merged.keys() == found.keys()
    assert all(torch.allclose(merged[name], found[name], atol=1e-6) for name in merged)
    for folder in ("model", "merged", "interpolated-1"):
        assert main(["verify", f"{run}/{folder}"]) == 0
