"""`lightning-sft verify`: whether an exported model is the one that was trained, by transformers and peft alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_sft import goldens
from lightning_sft.errors import SFTError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOLERANCES = {"float64": 1e-6, "float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}
"""How far the loss may be off, relative, by the type of the weights."""

_DEQUANTIZED = 2e-2
"""The same for a merged model whose base was quantised in training: it computed in 16 bits, or in 8."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was compared.

    Args:
        name: What.
        passed: Whether it agrees.
        detail: What was found.
    """

    name: str
    passed: bool
    detail: str


def verify(
    model: str,
    goldens_file: str | None = None,
    tolerance: float | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Compare an exported model with what the run has measured of it.

    It is loaded with plain transformers (and peft, for an adapter): does it give the run's loss on golden examples,
    does its tokenizer with its chat template give the same token ids, and does generation stop where turns end?

    Args:
        model: A run folder, or a folder that was exported or merged from one.
        goldens_file: The run's `goldens.json`; by default the one in or above the model's folder.
        tolerance: How far the loss may be off, relative; by default as the type of the weights allows.
        trust_remote_code: Run model code that comes with the model. Only for sources you trust.

    Raises:
        SFTError: Something differs, or there is nothing to compare with.
    """
    from lightning_sft.run_folder import model_folder

    folder = model_folder(model)
    path = Path(goldens_file) if goldens_file else _find(Path(model), folder)
    checks = compare(folder, goldens.read(path), tolerance=tolerance, trust_remote_code=trust_remote_code)
    for check in checks:
        print(f"{'ok    ' if check.passed else 'FAILED'}  {check.name}: {check.detail}")
    if failed := [check.name for check in checks if not check.passed]:
        raise SFTError(
            f"the model is not the one that was trained: {', '.join(failed)}",
            where=str(folder),
            fix="export it again from the run; a merged or converted one may need a wider --tolerance or dtype",
        )


def compare(
    folder: Path, golden: dict[str, Any], *, tolerance: float | None = None, trust_remote_code: bool = False
) -> list[Check]:
    """Every check of the model in a folder against a run's golden examples."""
    from transformers import AutoTokenizer

    from lightning_sft.training.models import load_trained

    owner = "the run"
    if point := goldens.point(folder):  # between base and tuned model, with a loss of its own
        owner = f"α = {point['alpha']:g} between base and tuned model"
        golden = {**golden, "loss": point["validation"], "dtype": "float32", "quantized": False}
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    model = load_trained(folder, trust_remote_code=trust_remote_code)
    dtype = str(model.dtype).removeprefix("torch.")
    if tolerance is None:
        tolerance = max(_TOLERANCES.get(dtype, 2e-2), _TOLERANCES.get(golden["dtype"], 2e-2))
        if golden.get("quantized") and not goldens.is_quantized(model):
            tolerance = max(tolerance, _DEQUANTIZED)
    loss = _loss(model, golden, dtype, tolerance, owner)
    return [_tokens(tokenizer, golden), _stops(folder, golden), loss]


def _find(*near: Path) -> Path:
    folders = [place for each in near for place in (each, each.resolve().parent)]
    for folder in folders:
        if (folder / goldens.FILE).is_file():
            return folder / goldens.FILE
    raise SFTError(
        f"there is no {goldens.FILE} in it or above it",
        where=str(near[0]),
        fix="give that of the run folder with --goldens_file",
    )


def _tokens(tokenizer: PreTrainedTokenizerBase, golden: dict[str, Any]) -> Check:
    name, asked = "tokens", golden["conversations"]
    for number, each in enumerate(asked, 1):
        try:
            found = tokenizer.apply_chat_template(each["messages"], tokenize=True, return_dict=False)
        except Exception as error:  # whatever a template raises
            return Check(name, False, f"conversation {number} can't be rendered: {error}")
        if list(found) != each["input_ids"]:
            first = next(
                (i for i, (a, b) in enumerate(zip(found, each["input_ids"], strict=False)) if a != b),
                min(len(found), len(each["input_ids"])),
            )
            return Check(name, False, f"conversation {number} differs at token {first}")
    return Check(name, True, f"{len(asked)} conversations give the same ids")


def _stops(folder: Path, golden: dict[str, Any]) -> Check:
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(str(folder)).eos_token_id
    except OSError:
        return Check("stop tokens", False, "there is no generation_config.json")
    ids = set(found if isinstance(found, list) else [found])
    missing = sorted(set(golden["stop_tokens"]) - ids)
    if missing:
        return Check("stop tokens", False, f"generation doesn't stop at {missing}")
    return Check("stop tokens", True, f"generation stops at {sorted(golden['stop_tokens'])}")


def _loss(model: PreTrainedModel, golden: dict[str, Any], dtype: str, tolerance: float, owner: str) -> Check:
    found, expected = golden_loss(model, golden), golden["loss"]
    off = abs(found - expected) / max(abs(expected), 1e-9)
    what = f"{found:.6g} ({dtype}), {owner} had {expected:.6g} ({golden['dtype']}): {off:.1e} apart, relative"
    return Check(f"loss on {len(golden['examples'])} {golden['part']} examples", off <= tolerance, what)


def golden_loss(model: PreTrainedModel, golden: dict[str, Any]) -> float:
    """Σ weight · −log p / Σ weight of a run's golden examples, one at a time, in plain transformers."""
    import torch

    total = weight = 0.0
    with torch.no_grad():
        for example in golden["examples"]:
            ids = torch.tensor([example["input_ids"]], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
            weights = torch.tensor(example["weights"][1:], dtype=torch.float64, device=model.device)
            nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            total += float((weights * nll).sum())
            weight += float(weights.sum())
    return total / weight


def command(argv: Sequence[str]) -> None:
    """Parse the command line and verify."""
    from lightning_sft import command_line

    command_line.quieten()
    command_line.call(verify, argv, "verify")
