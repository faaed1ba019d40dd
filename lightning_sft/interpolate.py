"""`lightning-sft interpolate`: models between the base and the tuned one, each with its gain and what it forgot.

The weights of a point are θ0 + α·(θ1 − θ0) (WiSE-FT, Wortsman et al., 2022); for LoRA that is the adapter scaled by α.
With several checkpoints θ1 is the mean of them (model soups, Wortsman et al., 2022). Often a point before 1 keeps
nearly all of the gain and has forgotten less.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lightning_sft import folders
from lightning_sft.errors import SFTError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TEXTS = 64
_POINTS = "0,0.25,0.5,0.75,1"


@dataclass(frozen=True, slots=True)
class Point:
    """A model between base and tuned.

    Args:
        alpha: 0 is the base, 1 the tuned model.
        validation: Σ weight · −log p / Σ weight of the run's golden examples, in nats.
        general: −log p per token of general text, in nats.
    """

    alpha: float
    validation: float
    general: float


def interpolate(
    run: str,
    points: str = _POINTS,
    general: str = "tiny:general",
    average: list[str] | None = None,
    write: float | None = None,
    output: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Score models between a run's base and its tuned model, draw the curve, and write one of them if asked.

    Prints a table and writes `interpolation.json` and `interpolation.png` to the run folder. The model that is written
    is scored, too, and has a card that says what it is; `verify` compares it with that score.

    Args:
        run: The run folder.
        points: The values of α, with commas between; 0 is the base, 1 the tuned model, above 1 goes on.
        general: Text that shows what is forgotten: a data file with a column `text`.
        average: Checkpoints of the run whose mean is the tuned model; by default the model that it exported.
        write: Write the model of this α.
        output: Where to; by default `interpolated-<α>/` in the run folder.
        trust_remote_code: Run model code that comes with the model. Only for sources you trust.

    Raises:
        SFTError: It is no run, has no golden examples, or its adapter can't be scaled.
    """
    import torch

    from lightning_sft import goldens, merging, model_card, run_folder
    from lightning_sft.training.models import load_tokenizer
    from lightning_sft.verify import golden_loss

    if find_spec("matplotlib") is None:
        raise SFTError("the curve is drawn by matplotlib", fix="pip install 'lightning-sft[plots]'")
    folder = Path(run)
    if not (folder / run_folder.CONFIG).is_file():
        raise SFTError("this is no run folder", where=run, fix="give one (runs/...)")
    alphas = _numbers(points) | ({write} if write is not None else set())
    target = Path(output) if output else folder / f"interpolated-{write:g}" if write is not None else None
    if target is not None:
        folders.free(target)
    golden = goldens.read(folder / goldens.FILE)
    model = run_folder.model_folder(run)
    tokenizer = load_tokenizer(str(model), trust_remote_code=trust_remote_code, key="run")
    texts = _texts(general, tokenizer)
    between = _between(folder, model, average or [], trust_remote_code)
    found = []
    for alpha in sorted(alphas):
        with between.at(alpha) as at:
            found.append(Point(alpha, golden_loss(at, golden), _general(at, texts)))
    _show(found, folder)
    if write is None or target is None:
        return

    (point,) = (point for point in found if point.alpha == write)

    def written(place: Path) -> None:
        rows = merging.rows(tokenizer)
        with between.at(write) as at:
            expected = merging.logits(at, rows)
            merging.save(between.whole(at), tokenizer, model, place, stored=torch.float32)
        merging.prove(place, rows, expected, source=model, trust_remote_code=trust_remote_code)
        content = {**asdict(point), "average": average or []}
        (place / goldens.INTERPOLATION).write_text(json.dumps(content) + "\n", encoding="utf-8")

    folders.write_whole(target, written)
    model_card.write(target, folder)
    print(f"α = {write:g} → {target}")


class Full:
    """Between two whole models of one shape.

    Args:
        model: The base; it is changed.
        change: θ1 − θ0 of each parameter that differs.
    """

    def __init__(self, model: PreTrainedModel, change: dict[str, Tensor]) -> None:
        self.model = model
        self.change = change

    @contextmanager
    def at(self, alpha: float) -> Iterator[PreTrainedModel]:
        """The model of this α, within the context."""
        state = dict(self.model.named_parameters())
        before = {name: state[name].detach().clone() for name in self.change}
        try:
            for name, change in self.change.items():
                state[name].data.add_(change, alpha=alpha)
            yield self.model
        finally:
            for name, kept in before.items():
                state[name].data.copy_(kept)

    def whole(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model of a point as one to write."""
        return model


class Scaled:
    """An adapter that adds to the base's weights, scaled.

    Args:
        model: peft's model.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    @contextmanager
    def at(self, alpha: float) -> Iterator[PreTrainedModel]:
        """The model of this α, within the context."""
        layers = _scaled(self.model)
        before = [dict(layer.scaling) for layer in layers]
        try:
            for layer, scaling in zip(layers, before, strict=True):
                layer.scaling.update({name: value * alpha for name, value in scaling.items()})
            yield self.model
        finally:
            for layer, scaling in zip(layers, before, strict=True):
                layer.scaling.update(scaling)

    def whole(self, model: Any) -> PreTrainedModel:
        """The model of a point as one to write: merged."""
        import copy

        from lightning_sft import merging

        return merging.merged(copy.deepcopy(model))


def _scaled(model: Any) -> list[Any]:
    """The layers of an adapter whose contribution has a factor, by the adapter's name."""
    return [layer for layer in model.modules() if isinstance(getattr(layer, "scaling", None), dict)]


def _unscaled(model: Any, *, new_tokens: bool) -> list[str]:
    """What the adapter trained beside its scaled updates; rows of new tokens don't count, as the base has none."""
    from peft import get_peft_model_state_dict

    return [
        name
        for name in get_peft_model_state_dict(model)
        if (model.base_model.prefix not in name or "magnitude" in name)
        and not (new_tokens and "trainable_tokens" in name)
    ]


def _between(run: Path, model: Path, average: Sequence[str], trust_remote_code: bool) -> Full | Scaled:
    import torch

    from lightning_sft import command_line, run_folder
    from lightning_sft.training.models import is_adapter, load_model, load_trained

    found = command_line.read_config(str(run / run_folder.CONFIG)).get("model")
    options: dict[str, Any] = found if isinstance(found, dict) else {}
    if is_adapter(model):
        with TemporaryDirectory() as place:
            source = _averaged_adapter(run, model, average, Path(place) / "averaged") if average else model
            # of a quantised base what is left of its weights: the sum with the adapter isn't quantised either
            peft = load_trained(
                source, dtype=torch.float32, whole_base=True, trust_remote_code=trust_remote_code
            )
        if not _scaled(peft):
            raise SFTError(
                "the adapter isn't scaled", where=str(model), fix="LoRA and its kin can be interpolated"
            )
        if others := _unscaled(peft, new_tokens=bool(options.get("new_tokens"))):
            raise SFTError(
                f"the run trained {others[0]}, which isn't scaled: only the point 1 would be what it says",
                where=str(model),
                fix="LoRA without DoRA, modules_to_save, trainable_tokens and biases can be interpolated",
            )
        return Scaled(peft)
    name = options.get("base")
    if not isinstance(name, str):
        raise SFTError("the run doesn't say what its base is", where=str(run / run_folder.CONFIG))
    from lightning_sft.assets import model_path

    base = load_model(
        model_path(name),
        dtype=torch.float32,
        revision=options.get("revision"),
        trust_remote_code=trust_remote_code,
        key="model.base",
    ).eval()
    before = dict(base.named_parameters())
    if average:
        after = _mean(average, run)
        after = {key.removeprefix("model."): value for key, value in after.items()}
    else:
        tuned = load_model(str(model), dtype=torch.float32, trust_remote_code=trust_remote_code, key="run")
        after = {key: value.detach() for key, value in tuned.named_parameters()}
    if strange := after.keys() - before.keys():
        raise SFTError(
            f"the base has no {min(strange)}",
            where=f"--average: {average[0]}" if average else str(model),
            fix="use checkpoints of this run",
        )
    if any(before[key].shape != value.shape for key, value in after.items()):
        raise SFTError(
            "base and tuned model have other shapes", where=str(run), fix="interpolate without new tokens"
        )
    change = {key: value.float() - before[key].detach() for key, value in after.items()}
    return Full(base, {key: value for key, value in change.items() if value.any()})


def _mean(checkpoints: Sequence[str], run: Path) -> dict[str, Tensor]:
    """The mean of the checkpoints' trained parameters, in float32."""
    from lightning_sft import run_folder
    from lightning_sft.training.models import load_checkpoint

    total: dict[str, Tensor] = {}
    for name in checkpoints:
        state = load_checkpoint(run_folder.checkpoint(run, name, "--average"))["state_dict"]
        if total and state.keys() != total.keys():
            raise SFTError("the checkpoints hold other parameters", where=f"--average: {name}")
        for key, value in state.items():
            total[key] = value.float() / len(checkpoints) + total.get(key, 0)
    return total


def _averaged_adapter(run: Path, model: Path, checkpoints: Sequence[str], folder: Path) -> Path:
    """The exported adapter with the mean of the checkpoints in its place, in the folder."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    path = folder / "adapter_model.safetensors"
    mean, saved = _mean(checkpoints, run), load_file(path)
    named = {key.removeprefix("model.").replace(".default", ""): value for key, value in mean.items()}
    if missing := saved.keys() - named.keys():
        raise SFTError(
            f"the checkpoints lack {min(missing)}", where="--average", fix="use checkpoints of this run"
        )
    save_file(
        {key: named[key].to(value.dtype) for key, value in saved.items()}, path, metadata={"format": "pt"}
    )
    return folder


def _general(model: PreTrainedModel, texts: Sequence[Tensor]) -> float:
    import torch

    total, tokens = 0.0, 0
    with torch.no_grad():
        for ids in texts:
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits[0, :-1].double()
            total += float(
                torch.nn.functional.cross_entropy(logits, ids[0, 1:].to(model.device), reduction="sum")
            )
            tokens += ids.shape[1] - 1
    return total / tokens


def _texts(general: str, tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    import torch

    from lightning_sft.data.sources import Source, read_rows

    found = []
    for meta, row in read_rows(Source(general, limit=_TEXTS)):
        if not isinstance(row.get("text"), str):
            raise SFTError("the row has no text", where=f"--general: {meta}", fix="give a column `text`")
        ids = tokenizer(row["text"], truncation=True, max_length=512)["input_ids"]
        if len(ids) > 1:
            found.append(torch.tensor([ids]))
    if not found:
        raise SFTError(
            "there is no text of two tokens or more", where=f"--general: {general}", fix="give others"
        )
    return found


def _numbers(points: str) -> set[float]:
    try:
        found = {float(each) for each in points.split(",")}
    except ValueError:
        found = set()
    if not found or not all(abs(each) < 10 for each in found):
        raise SFTError(
            f"{points!r} are no values of α", where="--points", fix=f"give numbers, such as {_POINTS}"
        )
    return found


def _show(points: Sequence[Point], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from lightning_sft import goldens

    table = Table("α", "validation loss", "general text loss", title="Between base (0) and tuned (1)")
    best = min(points, key=lambda point: point.validation + point.general)
    for point in points:
        mark = "  least sum" if point is best else ""
        table.add_row(f"{point.alpha:g}", f"{point.validation:.4f}", f"{point.general:.4f}{mark}")
    Console().print(table)
    (folder / goldens.INTERPOLATION).write_text(
        json.dumps([asdict(point) for point in points], indent=1) + "\n", encoding="utf-8"
    )
    _draw(points, folder / "interpolation.png")
    print(f"These figures are in {folder}: {goldens.INTERPOLATION}, interpolation.png")


def _draw(points: Sequence[Point], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([p.general for p in points], [p.validation for p in points], "o-", color="tab:blue")
    for point in points:
        axes.annotate(
            f"α {point.alpha:g}", (point.general, point.validation), xytext=(6, 4), textcoords="offset points"
        )
    axes.set_xlabel("loss on general text: what was forgotten (nats per token)")
    axes.set_ylabel("validation loss: what was learned (nats per token)")
    axes.set_title("Between base and tuned model")
    axes.grid(alpha=0.3)
    axes.margins(0.12)
    figure.savefig(path, dpi=144)


def command(argv: Sequence[str]) -> None:
    """Parse the command line and interpolate."""
    from lightning_sft import command_line

    command_line.quieten()
    command_line.call(interpolate, argv, "interpolate")
