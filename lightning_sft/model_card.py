"""The model card of an exported model (`README.md`, as the Hugging Face Hub reads it): made of the run folder.

Data with what became of each source's rows, the training's settings, scores, and what was not forgotten; the licence
is for whoever publishes it to say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_sft import __version__, goldens

FILE = "README.md"
_SETTINGS = ("learning_rate", "schedule", "warmup", "weight_decay", "betas", "train_on_eot", "dtype")


def write(model: Path, run: Path, *, license: str | None = None) -> None:
    """Write the card of the run's model.

    Args:
        model: The model's folder, whole or an adapter.
        run: The run folder, with as much of config, ledger and figures as there is.
        license: The licence's id, as the Hub knows it; None: it isn't known.
    """
    partial = model / f"{FILE}.partial"
    partial.write_text("\n".join(_card(model, run, license or "unknown")) + "\n", encoding="utf-8")
    partial.replace(model / FILE)


def _card(model: Path, run: Path, license: str) -> Iterator[str]:
    import yaml

    config = _read_yaml(run / "config.yaml")
    options: dict[str, Any] = config.get("model") or {}
    base = str(options.get("base", "unknown"))
    adapter = _plugin(options.get("adapter"))
    is_adapter = (model / "adapter_config.json").is_file()
    point = goldens.point(model)
    front: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lightning-sft", "sft", *(["lora"] if is_adapter else [])],
        "license": license,
    }
    on_hub = "/" in base and not Path(base).is_absolute() and not Path(base).exists()
    if on_hub:
        front["base_model"] = base
        front["base_model_relation"] = "merge" if point else "adapter" if is_adapter else "finetune"
    yield f"---\n{yaml.safe_dump(front, sort_keys=False).rstrip()}\n---\n"
    yield f"# {run.resolve().name}\n"
    name = base if on_hub else f"`{Path(base).name}` (not on the Hub)"
    yield f"{adapter} of {name}, supervised fine-tuning with lightning-sft {__version__}.\n"
    yield from _between(point)
    yield from _data(run)
    yield from _training(config, options)
    yield from _scores(run, "Scores of the tuned model" if point else "Scores")
    yield "## Licence\n"
    yield (
        "Not stated: see those of the base model and of the data.\n"
        if license == "unknown"
        else f"{license}; see also those of the base model and of the data.\n"
    )


def _between(point: dict[str, Any]) -> Iterator[str]:
    """What a point of an interpolation is, and its own scores."""
    if not point:
        return
    yield "## Between base and tuned model\n"
    yield f"The weights are base + {point['alpha']:g} · (tuned − base) (WiSE-FT, Wortsman et al., 2022).\n"
    if point["average"]:
        names = ", ".join(Path(name).name for name in point["average"])
        yield f"The tuned model is the mean of these checkpoints: {names}.\n"
    yield "| | |"
    yield "|---|---|"
    yield f"| validation loss (nats per token) | {point['validation']:.4g} |"
    yield f"| loss on general text (nats per token) | {point['general']:.4g} |\n"


def _data(run: Path) -> Iterator[str]:
    ledger = _read_json(run / "ledger.json")
    if not ledger:
        return
    yield "## Data\n"
    yield "| part | source | format | rows | examples | trained tokens | context tokens | lost tokens |"
    yield "|---|---|---|---|---|---|---|---|"
    for part, account in ledger.items():
        for source in account.get("sources", []):
            losses = [*source["truncated"].values(), *source["dropped"].values()]
            numbers = (
                source["rows"], source["examples"], source["trained_tokens"], source["context_tokens"],
                sum(loss["tokens"] for loss in losses),
            )  # fmt: skip
            shown = " | ".join(f"{number:,}" for number in numbers)
            yield f"| {part} | {Path(source['source']).name} | {source['format']} | {shown} |"
    yield ""
    for account in ledger.values():
        for source in account.get("sources", []):
            for filter, reasons in source.get("filtered", {}).items():
                for reason, count in reasons.items():
                    name = Path(source["source"]).name
                    yield f"- {filter} left out {count:,} conversations of {name}: {reason}\n"


def _training(config: dict[str, Any], options: dict[str, Any]) -> Iterator[str]:
    if not config:
        return
    trainer, data = config.get("trainer") or {}, config.get("data") or {}
    settings = {key: options.get(key) for key in _SETTINGS}
    settings |= {key: data.get(key) for key in ("batch_size", "batch_tokens", "packing", "max_length")}
    settings |= {
        key: trainer.get(key)
        for key in (
            "max_epochs",
            "max_steps",
            "accumulate_grad_batches",
            "gradient_clip_val",
            "precision",
            "strategy",
        )
    }
    adapter = options.get("adapter")
    if isinstance(adapter, dict):
        settings |= {f"adapter.{key}": value for key, value in (adapter.get("init_args") or {}).items()}
    yield "## Training\n"
    yield "| option | value |"
    yield "|---|---|"
    for key, value in settings.items():
        if value not in (None, False, "", -1):
            yield f"| {key} | {value} |"
    yield f"| seed | {config.get('seed_everything')} |\n"


def _scores(run: Path, title: str) -> Iterator[str]:
    lines = []
    metrics = run / "metrics.csv"
    if metrics.is_file():
        from lightning_sft.training.metrics_file import read_rows

        rows = read_rows(metrics)
        for name in ("train/loss", "val/loss", "val/perplexity"):
            if values := [row[name] for row in rows if row.get(name)]:
                lines.append(f"| {name} (last) | {float(values[-1]):.4g} |")
    history = _read_json(run / "forgetting.json").get("history") or []
    if history:
        last = history[-1]
        low, high = last["retention_interval"]
        lines.append(
            f"| retention of the base's knowledge | {last['retention']:.3f} (95 %: {low:.3f} to {high:.3f}) |"
        )
        lines += [
            f"| retention, {name} | {each['retention']:.3f} |" for name, each in last["domains"].items()
        ]
    if lines:
        yield f"## {title}\n"
        yield "| | |"
        yield "|---|---|"
        yield from lines
        yield ""


def _plugin(given: object) -> str:
    name = given.get("class_path") if isinstance(given, dict) else given
    return str(name).rpartition(".")[2] if name else "Fine-tuning"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
