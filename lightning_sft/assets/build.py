"""Rebuilds the embedded base model and its data: `make tiny-base`.

The corpus is written, a tokenizer is made for it, a Llama of 0.66 million parameters is started at random, and
lightning-sft itself trains it (`configs/tiny_base.yaml`: raw text, full training). Then the base is measured on what
the quickstart measures, and everything is put beside this file, with seeds, config and scores in `record.json`.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_sft.assets import HERE, MODEL, words
from lightning_sft.assets.corpus import corpus
from lightning_sft.assets.instructions import instructions
from lightning_sft.assets.tickets import tickets
from lightning_sft.assets.world import fact_questions, probed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SEEDS = {
    "corpus": 0,
    "validation": 1,
    "replay": 2,
    "general": 3,
    "instructions": 11,
    "tickets": 5,
    "weights": 0,
}
DOCUMENTS = {"corpus": 12_000, "validation": 100, "replay": 300, "general": 60}
VOCABULARY = 1280
CONTEXT = 512
_PASSAGE = 13  # words
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_data(folder: Path) -> None:
    """The data sets that ship with the model.

    Replay and general text leave out the facts that are asked for, and no passage is in both: what is forgotten of
    general text couldn't be told from what replay has taught again.
    """
    hidden = frozenset(fact.question for fact in probed())
    train, held_out = instructions(SEEDS["instructions"])
    _write(folder / "train.jsonl", train)
    _write(folder / "held_out.jsonl", held_out)
    _write(folder / "facts.jsonl", fact_questions())
    for name, rows in zip(("tickets", "tickets_held_out"), tickets(SEEDS["tickets"]), strict=True):
        _write(folder / f"{name}.jsonl", rows)
    general = _texts(SEEDS["general"], DOCUMENTS["general"], without=hidden)
    known = {run for row in general for run in passages(row["text"])}
    replay = _texts(SEEDS["replay"], 4 * DOCUMENTS["replay"], without=hidden)
    others = [row for row in replay if known.isdisjoint(passages(row["text"]))]
    _write(folder / "general.jsonl", general)
    _write(folder / "replay.jsonl", others[: DOCUMENTS["replay"]])


def write_base(folder: Path, documents: Sequence[str]) -> None:
    """The tokenizer, and a Llama with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(documents)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(SEEDS["weights"])
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer(documents: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word of the world is a token, with and without a space before it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text.replace("<|im_start|>", "").replace("<|im_end|>", "") for text in documents]
    named = [
        *words.NAMES, *words.PLACES, *words.THINGS, *words.COLOURS, *words.FOODS, *words.JOBS, *words.LETTERS,
        *words.HARMS, "Dear", "Sorry",
    ]  # fmt: skip
    both_ways = "\n".join(named) + "\n " + " ".join(named)
    raw.train_from_iterator([*texts, *[both_ways] * 2000], trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=CONTEXT
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build(work: Path) -> None:
    """Everything, in `work`, then into the package."""
    from lightning_sft.__main__ import main

    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    texts = _texts(SEEDS["corpus"], DOCUMENTS["corpus"])
    _write(work / "corpus.jsonl", texts)
    _write(work / "validation.jsonl", _texts(SEEDS["validation"], DOCUMENTS["validation"]))
    write_base(work / "init", [row["text"] for row in texts])
    write_data(HERE / "data")
    if code := main(
        ["fit", "--config", "configs/tiny_base.yaml", "--trainer.default_root_dir", str(work / "run")]
    ):
        sys.exit(code)
    shutil.rmtree(HERE / MODEL, ignore_errors=True)
    shutil.copytree(work / "run" / "model", HERE / MODEL)
    measured = json.loads((work / "run" / "before_after.json").read_text(encoding="utf-8"))["after"]
    record = {"seeds": SEEDS, "documents": DOCUMENTS, "config": "configs/tiny_base.yaml", "scores": measured}
    (HERE / "record.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def passages(text: str) -> set[tuple[str, ...]]:
    """All runs of 13 words, without case and punctuation, as GPT-3's authors compared texts (Brown et al., 2020)."""
    words = re.findall(r"[^\W_]+", text.lower())
    return {tuple(words[start : start + _PASSAGE]) for start in range(len(words) - _PASSAGE + 1)}


def _texts(seed: int, documents: int, *, without: frozenset[str] = frozenset()) -> list[dict[str, str]]:
    return [{"text": text} for text in corpus(seed, documents, without=without)]


def _write(path: Path, rows: Sequence[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    build(Path("build/tiny"))
