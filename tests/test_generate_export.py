"""What a run exports is a model like any other: transformers and peft load it, from anywhere."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lightning_sft.__main__ import main

ROWS = [{"instruction": f"say {n}", "output": f"hello {n}"} for n in range(12)]
PROMPT = [{"role": "user", "content": "say 3"}]


@dataclass(frozen=True)
class Run:
    """A finished run of the adapter."""

    adapter: str
    folder: Path
    base: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"


@pytest.fixture(scope="module")
def runs(model_folder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A run of each adapter, on a base given by a relative path, which learns to answer in a few steps."""
    here = tmp_path_factory.mktemp("runs")
    base = Path(shutil.copytree(model_folder("llama"), here / "base"))
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        for adapter, rate in (("LoRA", "0.02"), ("Full", "0.01")):
            argv = ["fit", "--model.base", "base", "--data.train", "rows.jsonl", "--model.adapter", adapter]
            argv += ["--model.learning_rate", rate, "--trainer.max_steps", "20", "--trainer.max_epochs", "-1"]
            argv += ["--trainer.default_root_dir", adapter, "--trainer.enable_progress_bar", "false"]
            assert main(argv) == 0
            made[adapter] = Run(adapter, here / adapter, base)
    return made


@pytest.fixture(params=["LoRA", "Full"])
def run(request: pytest.FixtureRequest, runs: dict[str, Run], elsewhere: Path) -> Run:
    """A run, seen from another folder than it was made in."""
    return runs[request.param]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(folder: Path):
    """The model as a user of transformers and peft loads it."""
    import peft
    import transformers

    if not (folder / "adapter_config.json").is_file():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    base = peft.PeftConfig.from_pretrained(folder).base_model_name_or_path
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, folder).eval()


def load_tokenizer(folder: Path):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


def logits(folder: Path) -> torch.Tensor:
    """Logits on fixed random tokens."""
    ids = torch.randint(3, 290, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return load(folder)(input_ids=ids).logits


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether they agree to 1e-5 of the largest logit."""
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


def generate(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What `generate` prints."""
    capsys.readouterr()
    assert main(["generate", *argv]) == 0
    return capsys.readouterr().out


def generate_with_transformers(folder: Path, text: str, *, special: bool = False, new: int = 24) -> str:
    """The same answer without lightning-sft; the stop tokens are those of the folder's generation config."""
    tokenizer, model = load_tokenizer(folder), load(folder)
    if hasattr(model, "peft_config"):
        import transformers

        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    inputs = tokenizer(text, add_special_tokens=special, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=new)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


def prompt_text(folder: Path, messages: list[dict[str, str]] = PROMPT) -> str:
    return load_tokenizer(folder).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


# -------------------------------------------------------------------------------------------- the folder


def test_the_folder_holds_all_that_a_model_needs(run: Run) -> None:
    names = {path.name for path in run.model.iterdir()}
    needed = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    weights = {"adapter_config.json", "adapter_model.safetensors"}
    needed |= weights if run.adapter == "LoRA" else {"config.json", "model.safetensors"}
    assert needed <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".ckpt"))]


def test_nothing_in_the_folder_mentions_our_attention(run: Run) -> None:
    from lightning_sft.training import attention

    assert [path.name for path in run.model.glob("*.json") if attention.NAME in path.read_text()] == []
    assert "attn_implementation" not in "".join(path.read_text() for path in run.model.glob("*config.json"))


def test_an_adapters_base_is_an_absolute_path(runs: dict[str, Run]) -> None:
    config = json.loads((runs["LoRA"].model / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(runs["LoRA"].base)


def test_the_exported_tokenizer_gives_the_prompt_of_training(run: Run) -> None:
    from lightning_sft import Message, Renderer

    renderer = Renderer(load_tokenizer(run.base))
    text = prompt_text(run.model)
    assert text == renderer.generation_prompt([Message("user", "say 3")])
    assert text == "<|im_start|>user\nsay 3<|im_end|>\n<|im_start|>assistant\n"


def test_generation_stops_on_the_end_of_turn_and_on_eos(run: Run) -> None:
    tokenizer = load_tokenizer(run.model)
    config = json.loads((run.model / "generation_config.json").read_text())
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert sorted(config["eos_token_id"]) == sorted(stops)
    assert config["pad_token_id"] == tokenizer.pad_token_id


# ---------------------------------------------------------------------------------------------- generate


def test_the_run_and_plain_transformers_give_the_same_answer(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    text = prompt_text(run.model)
    expected = generate_with_transformers(run.model, text)
    assert expected.startswith("hello")  # it has learnt something, and to stop
    assert generate(capsys, str(run.folder), "--prompt", "say 3") == expected + "\n"
    assert generate(capsys, str(run.model), "--prompt", "say 3") == expected + "\n"


def test_a_base_model_can_generate_too(
    runs: dict[str, Run], elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = runs["Full"].base
    expected = generate_with_transformers(base, prompt_text(base), new=8)
    assert generate(capsys, str(base), "--prompt", "say 3", "--max_new_tokens", "8") == expected + "\n"


def test_the_prompt_can_come_from_standard_input(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(capsys, str(run.folder), "--prompt", "say 3")
    monkeypatch.setattr("sys.stdin", io.StringIO("say 3\n"))
    assert generate(capsys, str(run.folder)) == expected


def test_a_raw_prompt_is_continued_without_the_template(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    text = "<|im_start|>user\nsay 3<|im_end|>\n<|im_start|>assistant\nhel"
    expected = generate_with_transformers(run.model, text, special=True)
    assert generate(capsys, str(run.folder), "--raw", "--prompt", text) == expected + "\n"


def test_a_system_message_comes_first(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    system = "be brief, say hi"
    text = prompt_text(run.model, [{"role": "system", "content": system}, *PROMPT])
    assert system in text
    expected = generate_with_transformers(run.model, text)
    assert generate(capsys, str(run.folder), "--prompt", "say 3", "--system", system) == expected + "\n"


def test_sampling_depends_on_the_seed_alone(runs: dict[str, Run], capsys: pytest.CaptureFixture[str]) -> None:
    def sample(seed: int) -> str:
        argv = ["--prompt", "say 3", "--temperature", "1.5", "--max_new_tokens", "16", "--seed", str(seed)]
        return generate(capsys, str(runs["Full"].base), *argv)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_the_answer_is_streamed(runs: dict[str, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    class Screen(io.StringIO):
        def write(self, text: str) -> int:
            written.append(text)
            return len(text)

    monkeypatch.setattr("sys.stdout", Screen())
    base = str(runs["Full"].base)
    assert main(["generate", base, "--prompt", "one two three", "--max_new_tokens", "60"]) == 0
    assert len([text for text in written if text.strip()]) > 1


def test_the_answer_ends_where_the_context_does(
    runs: dict[str, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(runs["Full"].base)
    assert generate(capsys, base, "--prompt", "zq" * 110, "--max_new_tokens", "9999")


# ------------------------------------------------------------------------------------------------ export


def test_export_without_more_says_where_the_model_is(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    assert main(["export", str(run.folder)]) == 0
    assert str(run.model) in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == before


def test_export_copies_to_another_folder(run: Run, elsewhere: Path) -> None:
    assert main(["export", str(run.folder), "--output", "deep/copy"]) == 0
    copied = {path.name: path.read_bytes() for path in (elsewhere / "deep" / "copy").iterdir()}
    assert copied == {path.name: path.read_bytes() for path in run.model.iterdir()}


def test_a_checkpoint_exports_what_the_run_exported(run: Run, elsewhere: Path) -> None:
    checkpoint = str(run.folder / "checkpoints" / "last.ckpt")
    assert main(["export", str(run.folder), "--ckpt_path", checkpoint, "--output", "again"]) == 0
    assert torch.equal(logits(elsewhere / "again"), logits(run.model))
    exported = {path.name: path.read_bytes() for path in (elsewhere / "again").iterdir()}
    assert exported == {path.name: path.read_bytes() for path in run.model.iterdir()}


def test_a_run_is_trained_on_from_its_record_anywhere(runs: dict[str, Run], elsewhere: Path) -> None:
    run = runs["LoRA"].folder
    argv = [
        "fit",
        "--config",
        str(run / "config.yaml"),
        "--ckpt_path",
        str(run / "checkpoints" / "last.ckpt"),
    ]
    argv += ["--trainer.max_steps", "24", "--trainer.default_root_dir", "longer"]
    assert main(argv) == 0
    assert not torch.equal(logits(elsewhere / "longer" / "model"), logits(runs["LoRA"].model))


def test_an_unfinished_run_exports_its_last_checkpoint(run: Run, elsewhere: Path) -> None:
    unfinished = Path(shutil.copytree(run.folder, elsewhere / "unfinished"))
    shutil.rmtree(unfinished / "model")
    assert main(["export", str(unfinished)]) == 0
    assert torch.equal(logits(unfinished / "model"), logits(run.model))


def test_the_merged_model_has_the_adapters_logits(runs: dict[str, Run], elsewhere: Path) -> None:
    run = runs["LoRA"]
    assert main(["export", str(run.folder), "--merge", "--output", "merged"]) == 0
    merged = logits(elsewhere / "merged")
    assert same(merged, logits(run.model))
    assert not same(merged, logits(run.base))
    assert not (elsewhere / "merged" / "adapter_config.json").exists()
    assert prompt_text(elsewhere / "merged") == prompt_text(run.model)
    generation = json.loads((elsewhere / "merged" / "generation_config.json").read_text())
    assert (
        generation["eos_token_id"]
        == json.loads((run.model / "generation_config.json").read_text())["eos_token_id"]
    )


def test_the_merged_model_generates_what_the_adapter_does(
    runs: dict[str, Run], elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs["LoRA"]
    assert main(["export", str(run.model), "--merge", "--output", "merged"]) == 0
    expected = generate(capsys, str(run.folder), "--prompt", "say 3")
    assert generate(capsys, "merged", "--prompt", "say 3") == expected


def test_merging_puts_the_model_beside_the_adapter(runs: dict[str, Run], elsewhere: Path) -> None:
    run = Path(shutil.copytree(runs["LoRA"].folder, elsewhere / "run"))
    assert main(["export", str(run), "--merge"]) == 0
    assert (run / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merged_weights_have_the_type_asked_for(runs: dict[str, Run], elsewhere: Path, dtype: str) -> None:
    from safetensors.torch import load_file

    assert main(["export", str(runs["LoRA"].folder), "--merge", "--dtype", dtype, "--output", "merged"]) == 0
    weights = load_file(elsewhere / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {getattr(torch, dtype)}
    assert json.loads((elsewhere / "merged" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_whole_model_is_stored_in_half_precision(runs: dict[str, Run], elsewhere: Path, dtype: str) -> None:
    from safetensors.torch import load_file

    run = runs["Full"]
    assert main(["export", str(run.folder), "--dtype", dtype, "--output", "half"]) == 0
    trained, stored = (
        load_file(run.model / "model.safetensors"),
        load_file(elsewhere / "half" / "model.safetensors"),
    )
    assert stored.keys() == trained.keys()
    assert all(torch.equal(stored[name], trained[name].to(getattr(torch, dtype))) for name in trained)
    assert json.loads((elsewhere / "half" / "config.json").read_text())["dtype"] == dtype
    assert main(["verify", "half", "--goldens_file", str(run.folder / "goldens.json")]) == 0


def without_weights(run: Path) -> None:
    (run / "model" / "adapter_model.safetensors").unlink()


def with_damaged_weights(run: Path) -> None:
    path = run / "model" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("options", "change", "said"),
    [
        ([], without_weights, "the model has no weights"),
        ([], with_damaged_weights, "the weights are damaged"),
        (["--output", "file/x"], None, "file: this is a file, not a folder"),
        (["--merge", "--output", "file/x"], None, "file: this is a file, not a folder"),
        (["--merge", "--tolerance", "-1", "--output", "deep/x"], None, "what would be written is not"),
        (["--merge", "--max_shard_size", "much"], None, "'much' is no size"),
        (["--license", "my own"], None, "no licence's id"),
        (["--dtype", "bfloat16"], None, "an adapter is stored as it was trained"),
        (["--ckpt_path", "best"], None, "checkpoints has last.ckpt"),
    ],
)
def test_a_mistake_leaves_nothing_behind(
    options: list[str],
    change,
    said: str,
    runs: dict[str, Run],
    elsewhere: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Path(shutil.copytree(runs["LoRA"].folder, elsewhere / "run"))
    (elsewhere / "file").touch()
    if change is not None:
        change(run)
        options = ["--output", "copy"]
    before = sorted(elsewhere.rglob("*"))
    assert main(["export", "run", *options]) == 2
    assert said in capsys.readouterr().err
    assert sorted(elsewhere.rglob("*")) == before


def test_a_disk_that_is_full_leaves_nothing_behind(
    runs: dict[str, Run], elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        assert main(["export", str(runs["LoRA"].folder), "--merge", "--output", "merged"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "it can't be written" in capsys.readouterr().err
    assert list(elsewhere.iterdir()) == []
