"""The abstract bases that plug-ins subclass.

A plug-in's typed `__init__` parameters with their docstrings are its options in YAML and in `--help`. A class that
renames one keeps the old key working, with a warning, by a class attribute: `renamed_options = {"old": "new"}`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_sft.conversation import Conversation, Meta, Row, Segments
from lightning_sft.errors import SFTError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from lightning_sft.evaluation.requests import Answered, Item, ItemText
    from lightning_sft.evaluation.results import Results


class DataFormat(ABC):
    """Turns one row of a data file into conversations."""

    @abstractmethod
    def matches(self, columns: frozenset[str]) -> bool:
        """Whether a file with these columns is in this format; used by `format: auto`."""

    @abstractmethod
    def convert(self, row: Row) -> Iterable[Conversation | Segments]:
        """The row's conversations: usually one. Pure: the same row always gives the same result.

        Raises:
            SFTError: The row can't be converted: what is wrong, and `where` the key. The file and the row
                number are added by the caller.
        """

    def fits(self, row: Row) -> bool:
        """Whether this row, the first of its source, is in this format; used by `format: auto`.

        By default what `matches` says of its columns. A format that shares its columns with another one tells
        them apart here, by the values.
        """
        return self.matches(frozenset(row))

    def gather(self, rows: Iterable[tuple[Meta, Row]]) -> Iterable[tuple[Meta, Row]]:
        """The rows that `convert` gets, made of all rows of the source: by default the same ones.

        For formats that spread a conversation over several rows. Each result has the place of one of the rows
        that it is made of, and errors name it.

        Raises:
            SFTError: The rows don't belong together; says which.
        """
        return rows

    def to_row(self, item: Conversation | Segments) -> dict[str, object]:
        """The row of which `convert` makes exactly this item, in JSON types; for `lightning-sft data convert`.

        Without this method a format can be read only.

        Raises:
            SFTError: The format has no place for something in the item: says what it is, and `where`.
        """
        raise SFTError(f"rows can't be written in the format {type(self).__name__}, only read")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a filter says of a conversation; `Verdict()` keeps it.

    Args:
        reason: Why it is dropped, in words that are the same for all that are dropped for it: the ledger counts by
            reason. None: it is kept.
        score: What was measured, where that is a number.
        detail: What it is about this conversation: what was found in it, or which other one it is like.
    """

    reason: str | None = None
    score: float | None = None
    detail: str | None = None

    @property
    def keep(self) -> bool:
        """Whether the conversation is kept."""
        return self.reason is None


class Filter(ABC):
    """Decides which conversations are trained on; it changes none of them.

    The verdict depends on the conversation alone. What depends on those before it is a `SetFilter`.
    """

    @abstractmethod
    def judge(self, conversation: Conversation | Segments) -> Verdict:
        """Whether to keep a conversation, or text as it stands. Pure; called in several processes.

        It isn't asked about what a filter before it has dropped, unless that is a `SetFilter`, which decides later.

        Raises:
            SFTError: Nothing can be said of it: what is wrong. The file and the row number are added by the caller.
        """


class SetFilter(Filter):
    """A filter whose verdict depends on the conversations before: on duplicates, say.

    The set is seen once, in order. What takes time belongs into `look`, which the processes share.
    """

    @abstractmethod
    def look(self, conversation: Conversation | Segments) -> object:
        """What has to be known of a conversation: small, as it goes through pickle. Pure.

        Raises:
            SFTError: As `judge` does.
        """

    @abstractmethod
    def begin(self) -> Callable[[Any], Verdict]:
        """A judge of one set, to be asked in order with what `look` made of each conversation.

        What was seen belongs into the judge, not into the filter: another set has a judge of its own. It isn't asked
        about what a filter before this one has dropped.
        """

    def judge(self, conversation: Conversation | Segments) -> Verdict:
        """The verdict if it were the first of its set."""
        return self.begin()(self.look(conversation))


@dataclass(frozen=True, slots=True)
class RateGroup:
    """Parameters that are trained at the same rate, from the same step on.

    Args:
        name: What the log calls it.
        scale: Factor of `model.learning_rate`.
        start: The optimizer step, from 0, from which they are trained.
    """

    name: str = "all"
    scale: float = 1.0
    start: int = 0


class Adapter(ABC):
    """Decides which of the model's parameters are trained, and how they are exported."""

    default_learning_rate: float = 1e-5
    """The peak learning rate where the configuration gives none."""

    new_token_ids: Sequence[int] = ()
    """Rows of the input and the output embedding to train in any case (`model.new_tokens`); set before `prepare`."""
    looks_at_rows: bool = False
    """Whether `initialize` is to be called at the start of a run."""
    saves_memory: bool = False
    """Whether `plan` suggests this adapter, with its default options, where training doesn't fit into memory."""

    @abstractmethod
    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model to train: parameters to train have `requires_grad`, all others do not."""

    @abstractmethod
    def export(self, model: PreTrainedModel, folder: Path) -> None:
        """Write what was trained to `folder`, as safetensors that transformers or peft load."""

    def rate_group(self, name: str) -> RateGroup:
        """The group of a trained parameter, by its name in the prepared model: by default one for all."""
        return RateGroup()

    @property
    def has_rate_groups(self) -> bool:
        """Whether `rate_group` may tell parameters apart, so that `--print_config` shows rates: if it is overridden."""
        return type(self).rate_group is not Adapter.rate_group

    def quantization(self) -> object | None:
        """The transformers quantisation config to load the base with, or None."""
        return None

    def initialize(
        self, model: PreTrainedModel, batches: Iterable[Any], forward: Callable[[Any], None]
    ) -> None:
        """Set what begins with the training rows; called with `looks_at_rows`, if no checkpoint is gone on from.

        Only values may change, no shapes, and on all ranks alike.

        Args:
            model: The prepared model, on its device, in evaluation mode.
            batches: The rank's first micro-batches, as often as wanted. Their `attention_mask` is None where rows are
                flattened.
            forward: Computes a batch, for hooks in the model to see.

        Raises:
            SFTError: The adapter looks at rows and doesn't say what for.
        """
        raise SFTError(
            f"the {type(self).__name__} adapter has looks_at_rows and no initialize()",
            where="model.adapter",
            fix="its author has to define initialize(), or leave looks_at_rows out",
        )

    def initial_state(self) -> dict[str, Tensor]:
        """What `initialize` found that the trained parameters don't hold: checkpoints keep it. Nothing by default."""
        return {}

    def load_initial_state(self, model: PreTrainedModel, state: dict[str, Tensor]) -> None:
        """Make of the prepared model what `initialize` made of it; trained parameters are loaded afterwards.

        Called once or more, also after `initialize`.

        Raises:
            SFTError: The adapter has an initial state and doesn't say what to do with it.
        """
        raise SFTError(
            f"the {type(self).__name__} adapter has an initial_state() and no load_initial_state()",
            where="model.adapter",
            fix="its author has to define both, or neither",
        )

    @contextmanager
    def base_model(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """Within this context `model` computes what the base computed before training.

        Raises:
            SFTError: This adapter changes the base's own weights, so the base is gone.
        """
        raise SFTError(
            f"the {type(self).__name__} adapter trains the base's own weights, so the base's outputs are gone",
            fix="use an adapter that leaves the base as it was, such as LoRA",
        )
        yield model


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The trained tokens of one chunk, as a loss sees them; `n` tokens, vocabulary `V`.

    Args:
        logits: Float `[n, V]`, in at least float32, with the model's soft cap and scale applied.
        targets: Int `[n]`: the id that each position has to predict.
        weights: Float `[n]`: the loss weight of each target; the caller applies them.
    """

    logits: Tensor
    targets: Tensor
    weights: Tensor


class Loss(ABC):
    """A loss per token. The engine takes Σ weight · loss over the optimizer step, divided by Σ weight."""

    @abstractmethod
    def per_token(self, batch: TokenBatch) -> Tensor:
        """The unweighted loss of each token: float `[n]`, differentiable in `batch.logits`."""

    def as_cross_entropy(self) -> float | None:
        """The label smoothing, if `per_token` is cross-entropy: a fused kernel may then stand in for it.

        A subclass that has a `per_token` of its own is asked only if it has this of its own, too.
        """
        return None


class Evaluator(ABC):
    """Asks a model for something, and judges what it answers.

    It knows no model and no tokenizer: prompts are text, or messages that the model's chat template renders. Its
    constructor is cheap; data is read in `requests`.
    """

    needs_base: bool = False
    """Whether the base is asked the same, and `score_beside` called instead of `score`."""

    @abstractmethod
    def requests(self) -> Sequence[Item]:
        """The items with what the model is asked for each. Pure: the same ones every time, in the same order.

        Raises:
            SFTError: Its data is missing or malformed; says where.
        """

    @abstractmethod
    def score(self, answered: Sequence[Answered]) -> Results:
        """Records and scores of all items, answered, in the order of `requests`. Pure, and cheap."""

    def texts(self) -> Iterable[ItemText]:
        """What its items say, each with an id: training data is tested for overlap with it.

        By default each item's `text` and `answer`, in the order of `requests`, whose errors it raises.
        """
        return [item.exposed for item in self.requests()]

    def score_beside(self, answered: Sequence[Answered], base: Sequence[Answered]) -> Results:
        """As `score`, with the base's answers to the same items."""
        return self.score(answered)
