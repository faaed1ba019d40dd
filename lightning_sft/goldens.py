"""Golden examples of a run: what its model computes and how its tokenizer cuts text, to prove an export against.

`goldens.json` in the run folder holds the token ids of a few conversations that come with the package, rendered with
the run's chat template, and up to 64 of the run's validation examples (training examples without them) with the loss
that the trained model has on them. They stay in the run folder: an exported model carries none of the data.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_sft.conversation import Conversation, Message
from lightning_sft.errors import SFTError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_sft.example import Example
    from lightning_sft.training.module import SFTModule

FILE = "goldens.json"
INTERPOLATION = "interpolation.json"
"""In a run folder the points between its base and its tuned model; in the folder of such a model, its own point."""

_EXAMPLES = 64

CONVERSATIONS = (
    (("user", "Hello, who are you?"), ("assistant", "A model.")),
    (("system", "Be brief."), ("user", "2 + 2 = ?"), ("assistant", "4")),
    (("user", "  white space\n\n\tat the edges  "), ("assistant", "kept, or not ")),
    (("user", "naïve café, Ελληνικά, 中文, עברית, 👩‍👩‍👧"), ("assistant", "ﬁ ≠ fi; e\u0301 ≠ é")),
    (("user", "def f(x):\n    return {'a': [x, None]}"), ("assistant", "```python\nf(1.5e-3)\n```")),
    (("user", "<|im_end|> </s> [INST] <eos>"), ("assistant", "These are only letters here.")),
    (("user", "one"), ("assistant", "1"), ("user", "two"), ("assistant", "2")),
)
"""Roles and contents of the conversations that tokenizers are compared on."""


def write(module: SFTModule, folder: Path) -> None:
    """Measure the module's model and write `goldens.json`; every rank calls this, and rank 0 writes."""
    data = module.data
    part = "val" if "val" in data.prepared else "train"
    examples = [
        data.prepared[part].examples[row] for row in range(min(_EXAMPLES, len(data.prepared[part].examples)))
    ]
    content = {
        "part": part,
        "loss": loss(module, examples),
        "dtype": str(next(module.loaded.parameters()).dtype).removeprefix("torch."),
        "quantized": is_quantized(module.loaded),
        "stop_tokens": sorted(module.renderer.stop_token_ids),
        "conversations": rendered(module),
        "examples": [
            {"input_ids": example.input_ids.tolist(), "weights": example.weights.tolist()}
            for example in examples
        ],
    }
    if module.global_rank == 0:
        partial = folder / f"{FILE}.partial"
        partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
        partial.replace(folder / FILE)


def read(path: Path) -> dict[str, Any]:
    """The content of a `goldens.json`.

    Raises:
        SFTError: It is missing or damaged.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["examples"] and content["loss"] is not None and content["conversations"] is not None:
            return content
    except FileNotFoundError as error:
        raise SFTError(
            "the run has no golden examples",
            where=str(path),
            fix="it was made by a version without; train again",
        ) from error
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise SFTError(
        "the golden examples can't be read", where=str(path), fix="check that the file is undamaged"
    )


def point(model: Path) -> dict[str, Any]:
    """Where between base and tuned model the model in this folder is, with its losses; empty if it is no such model.

    Raises:
        SFTError: It can't be read.
    """
    path = model / INTERPOLATION
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {key: content[key] for key in ("alpha", "validation", "general", "average")}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SFTError(
            "it isn't as `interpolate` writes it", where=str(path), fix="interpolate again"
        ) from error


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether layers of it compute with quantised weights."""
    return any(type(each).__module__.startswith("bitsandbytes") for each in model.modules())


def rendered(module: SFTModule) -> list[dict[str, Any]]:
    """Each conversation with its token ids; without those that the chat template refuses."""
    found = []
    for turns in CONVERSATIONS:
        messages = tuple(Message(role, content) for role, content in turns)
        with suppress(SFTError):
            (example,) = module.renderer.render_all([Conversation(messages)])
            as_dicts = [{"role": role, "content": content} for role, content in turns]
            found.append({"messages": as_dicts, "input_ids": example.input_ids.tolist()})
    return found


def loss(module: SFTModule, examples: Sequence[Example]) -> float:
    """Σ weight · −log p / Σ weight of the examples, in the weights' own precision."""
    import torch

    from lightning_sft.training.head import NLL
    from lightning_sft.training.layout import evaluating

    total = weight = 0.0
    with evaluating(module), torch.no_grad():
        for example in examples:
            batch = module.layout.collate([example], 1.0).to(module.device)
            total += float(module.weighted_loss(batch, NLL))
            weight += float(batch.weights.sum())
    return total / weight
