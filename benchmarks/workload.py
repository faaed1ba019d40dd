"""What every side of a benchmark trains: one model, one set of rows, already rendered.

A folder with `model/` (a Llama with random weights and a tokenizer), `raw.jsonl` (the rows as they were),
`rows.jsonl` (token ids and labels, in the order of lightning-sft's plan) and `workload.json` (the settings).
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{%- if tools %}{{ '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.content %}{{ m.content }}{% endif %}"
    "{%- for call in m.tool_calls or [] %}{{ (call.function | tojson) }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML with tools and tool calls."""


@dataclass
class Workload:
    """The settings of a run.

    Args:
        folder: Where everything is.
        base: The model's folder.
        format: The data format of `raw.jsonl`.
        batch_size: Rows a step.
        warmup: Steps that don't count.
        steps: Steps that count.
        precision: Lightning's name of it; the other sides do the same.
        lora: Train LoRA adapters (r 16, alpha 32, every linear layer) and not the whole model.
    """

    folder: str
    base: str
    format: str
    batch_size: int
    warmup: int
    steps: int
    precision: str
    lora: bool = False

    @property
    def total(self) -> int:
        """Steps in all."""
        return self.warmup + self.steps

    @property
    def raw(self) -> str:
        """The rows as they were."""
        return str(Path(self.folder) / "raw.jsonl")

    def rows(self) -> list[dict[str, list[int]]]:
        """`input_ids` and `labels` (−100: not trained) of every row, step by step."""
        return [json.loads(line) for line in (Path(self.folder) / "rows.jsonl").open()]

    def save(self) -> Path:
        """Write the settings; returns the file."""
        path = Path(self.folder) / "workload.json"
        path.write_text(json.dumps(asdict(self)))
        return path


def load(path: str) -> Workload:
    """The settings in a file."""
    return Workload(**json.loads(Path(path).read_text()))


def made_up(count: int = 1200, seed: int = 0) -> list[dict[str, str]]:
    """Rows of words that mean nothing, with lengths like Alpaca's: a short instruction and a long answer."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randint(2, 9))) for _ in range(4000)]

    def text(mean: float) -> str:
        return " ".join(rng.choices(words, k=max(2, int(rng.lognormvariate(0, 0.7) * mean))))

    return [{"instruction": text(12), "input": "", "output": text(110)} for _ in range(count)]


def plugin(kind: str, name: str, **options: Any) -> Any:
    """The plug-in of that name, with these options."""
    from lightning_sft import plugins

    return plugins.find(kind, name).load()(**options)


def read(path: str | Path | None) -> list[dict[str, Any]]:
    """The rows of a JSON or JSONL file, or made-up ones."""
    if path is None:
        return made_up()
    text = Path(path).read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = (
        json.loads(text)
        if text.lstrip().startswith("[")
        else [json.loads(line) for line in text.splitlines()]
    )
    return rows


def make_model(
    folder: Path, rows: list[dict[str, Any]], tokenizer: str | None, shape: dict[str, int]
) -> None:
    """A Llama with random weights, and the tokenizer given, or one made of the rows.

    The vocabulary of the model is `shape`'s, whatever the tokenizer's: ids only have to be below it.
    """
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if tokenizer is not None:
        made = transformers.AutoTokenizer.from_pretrained(tokenizer)
        made.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    else:
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        raw.train_from_iterator(
            (json.dumps(row, ensure_ascii=False) for row in rows),
            trainers.BpeTrainer(
                vocab_size=min(16_000, shape["vocab_size"]),
                special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        made = transformers.PreTrainedTokenizerFast(
            tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>"
        )
    made.chat_template = TEMPLATE
    shape = {**shape, "vocab_size": max(shape["vocab_size"], len(made))}
    config = transformers.LlamaConfig(
        **shape, max_position_embeddings=1024, tie_word_embeddings=False,
        eos_token_id=made.eos_token_id, pad_token_id=made.pad_token_id or made.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    made.model_max_length = 1024
    made.save_pretrained(folder)


def render(work: Workload, rows: list[dict[str, Any]]) -> None:
    """Write `raw.jsonl` and, as lightning-sft renders and orders them, `rows.jsonl`."""
    from lightning_sft import Renderer
    from lightning_sft.data.plan import BatchPlan
    from lightning_sft.data.prepare import prepare
    from lightning_sft.data.sources import Source
    from lightning_sft.training.models import load_tokenizer

    Path(work.raw).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = Source(path=work.raw, format=plugin("formats", work.format))
    renderer = Renderer(load_tokenizer(work.base))
    prepared = prepare([source], renderer, max_length=1024, overlong="drop")
    plan = BatchPlan(prepared.weight_sums, batch_size=work.batch_size, seed=0, epoch=0)
    if plan.micro_batches < work.total:
        raise SystemExit(f"{len(prepared.examples)} rows make {plan.micro_batches} steps, not {work.total}")
    with (Path(work.folder) / "rows.jsonl").open("w") as file:
        for index, micro in enumerate(plan.rank(0)):
            for row in micro.rows if index < work.total else ():
                example = prepared.examples[row]
                ids = example.input_ids.tolist()
                labels = [i if w > 0 else -100 for i, w in zip(ids, example.weights.tolist(), strict=True)]
                file.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")
