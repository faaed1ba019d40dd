"""Tiny real models and tokenizers, made on the spot: weights of std 0.3, so that a leak shows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # tests run side by side; threads that wait for each other cost more
SHARED = Path(__file__).parents[2] / "shared"

CHATML = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

CONTEXT = 256


def _common(vocabulary: int) -> dict[str, object]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
    }


def tiny_config(name: str, vocabulary: int):
    """The configuration of a tiny model of this family, with teeth: short windows, strong soft caps."""
    import transformers as t

    common = _common(vocabulary)
    own = {"vocab_size": vocabulary, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    gemma = {"sliding_window": 8, "query_pre_attn_scalar": 8, "head_dim": 8}
    return {
        "llama": lambda: t.LlamaConfig(**common),
        "wide": lambda: t.LlamaConfig(
            **{**common, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
        ),
        "qwen3": lambda: t.Qwen3Config(**common, head_dim=8),
        "gemma2": lambda: t.Gemma2Config(
            **common, **gemma, attn_logit_softcapping=0.5, final_logit_softcapping=0.5
        ),
        "gemma3": lambda: t.Gemma3TextConfig(
            **common, **gemma, layer_types=["sliding_attention", "full_attention"], final_logit_softcapping=0.5
        ),
        "mistral": lambda: t.MistralConfig(**common, sliding_window=8),
        "phi3": lambda: t.Phi3Config(**common, sliding_window=8, pad_token_id=0),
        "gpt2": lambda: t.GPT2Config(
            vocab_size=vocabulary, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        ),
        "gpt_neox": lambda: t.GPTNeoXConfig(
            **own, intermediate_size=48, max_position_embeddings=CONTEXT, tie_word_embeddings=False
        ),
        "cohere": lambda: t.CohereConfig(**common, logit_scale=0.25),
        "granite": lambda: t.GraniteConfig(**common, logits_scaling=4.0),
        "falcon": lambda: t.FalconConfig(**own, alibi=False, max_position_embeddings=CONTEXT),
        "bloom": lambda: t.BloomConfig(vocab_size=vocabulary, hidden_size=32, n_layer=2, n_head=4),
        "mamba": lambda: t.MambaConfig(vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, state_size=4),
    }[name]()  # fmt: skip


def make_model_folder(folder: Path, name: str, tokenizer) -> Path:
    """A model of this family with random weights, saved with the tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(name, len(tokenizer)))
    for key, parameter in model.named_parameters():
        if parameter.ndim > 1 and "A_log" not in key:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Prepared data of the tests isn't kept in the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_SFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer with ChatML markers and pad == eos."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(
        ["the user asks and the assistant answers: hello there, how are you?"] * 4, trainer
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=CONTEXT
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer):
    """A function from a family's name to a saved tiny model of it."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = make_model_folder(tmp_path_factory.mktemp("models") / name, name, tokenizer)
        return made[name]

    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models; tests that need it are skipped where it is absent."""
    if not (SHARED / "real").is_dir():
        pytest.skip(f"real data is not here ({SHARED.name}/real beside the checkout)")
    return SHARED


@pytest.fixture(scope="session")
def tuned_runs(tmp_path_factory, model_folder) -> dict[str, Path]:
    """A run folder of each adapter, of two steps; tests that change one copy it."""
    import json

    from lightning_sft import cli

    folder = tmp_path_factory.mktemp("tuned")
    rows = [{"instruction": f"say {n}", "output": "how are you? " * (1 + n % 3)} for n in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for adapter in ("LoRA", "Full"):
        with pytest.MonkeyPatch.context() as patch:
            for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "LIGHTNING_SFT_RUN_FOLDER"):
                patch.setenv(variable, "0")
            patch.delenv("LIGHTNING_SFT_RUN_FOLDER")
            options = {
                "model.base": model_folder("llama"), "model.adapter": adapter, "model.learning_rate": 0.01,
                "data.train": folder / "rows.jsonl", "data.val_split": 4, "data.batch_size": 4,
                "trainer.accelerator": "cpu", "trainer.max_steps": 2, "trainer.default_root_dir": folder / adapter,
                "trainer.enable_progress_bar": False,
            }  # fmt: skip
            cli.run(["fit", *(f"--{key}={value}" for key, value in options.items())])
        found[adapter] = folder / adapter
    return found
