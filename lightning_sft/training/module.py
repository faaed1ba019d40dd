"""The LightningModule: a causal LM, its adapter, and the exact masked loss."""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sft import assets, plugins
from lightning_sft.bases import Adapter, Loss
from lightning_sft.errors import SFTError
from lightning_sft.rendering import RenderPolicies
from lightning_sft.training import advisor, optimizers, strategies
from lightning_sft.training import schedule as schedules
from lightning_sft.training.compiling import compile_blocks
from lightning_sft.training.devices import peak_flops
from lightning_sft.training.fingerprint import frozen_digest
from lightning_sft.training.fsdp2 import as_forward, part_of, shard, whole_parameters
from lightning_sft.training.guard import GuardedModule, OnBadLoss, Watch, refuse_bad_weights
from lightning_sft.training.head import NLL
from lightning_sft.training.heap import bound_kernel_caches
from lightning_sft.training.initial import initialize
from lightning_sft.training.layout import Layout, batch_loss, causal_lm, find_layout, stock_attention
from lightning_sft.training.memory import checkpoint_layers, explained
from lightning_sft.training.metrics import TokenLoss, TokenPerplexity
from lightning_sft.training.models import absolute, keeping_compilers, load_model, save_quantization
from lightning_sft.training.new_tokens import check_trained, grow
from lightning_sft.training.preflight import check_trainer, preflight
from lightning_sft.training.resuming import Resumable
from lightning_sft.training.router_loss import RouterLoss, router_loss
from lightning_sft.training.throughput import Throughput, is_logged, log_step
from lightning_sft.training.without_weights import WithoutWeights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import transformers  # by itself: jsonargparse runs this block, and the class takes a second to import
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

    from lightning_sft.data.batch import Batch
    from lightning_sft.data.datamodule import SFTDataModule

_BETAS = (0.9, 0.999)
_EVERY_TURN = RenderPolicies()
_PRECISION_DTYPES = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}


class SFTModule(GuardedModule, Resumable, WithoutWeights):
    """Fine-tunes a causal language model on the trained tokens of its batches.

    The loss of an optimizer step is Σ weight · loss over all its tokens, on every rank and in every
    micro-batch of its accumulation window, divided by Σ weight, which the batch plan knows beforehand.

    Args:
        base: The pre-trained model: a local Hugging Face folder, a Hub id, or `tiny`, the embedded one.
        adapter: Which parameters are trained; every one by default (`Full`).
        loss: The loss per token; `CrossEntropy` by default.
        revision: Branch, tag or commit of the base on the Hub.
        tokenizer: Folder or Hub id of another tokenizer than the base's own.
        new_tokens: Special tokens that the base doesn't know: the tokenizer gets those that it lacks, the embeddings
            grow where they have no row, and the rows are trained with any adapter.
        chat_template: A Jinja file, or one of the shipped templates (plain, alpaca, chatml); by default the
            tokenizer's own, or `plain` if it has none.
        chat_template_kwargs: Options of the chat template, such as `enable_thinking: false`; exported as its defaults.
        render: Which parts of a conversation are trained.
        dtype: Type of the loaded weights; by default what `trainer.precision` implies: bfloat16 for
            `bf16-true`, float16 for `16-true`, else float32.
        trust_remote_code: Run model code that comes with the base. Only for sources you trust.
        gradient_checkpointing: Keep only each layer's input and compute the rest again: less memory for one more
            forward pass.
        router_aux_loss: The load-balancing loss of mixture-of-experts models: true, false or a coefficient; by
            default as the base's configuration says (`output_router_logits`, `router_aux_loss_coef`).
        preflight: Before the first step, try layout, gradients, memory and checkpoints on this model and these rows.
        on_bad_loss: What follows a loss or gradient that is NaN or infinite: `stop`, or go on without the step
            (`skip`). It is never applied.
        learning_rate: Peak learning rate; by default the adapter's (LoRA 2e-4, Full 1e-5).
        weight_decay: Decay of weight matrices; norms and biases are not decayed.
        betas: AdamW's coefficients of the running averages.
        optimizer: Another optimizer than AdamW: its class, and its options but for rate and decay, which are these.
        schedule: Course of the learning rate after warmup.
        warmup: Warmup as a fraction of all steps (0.03) or a number of steps (100).
        final_learning_rate: Where `cosine` and `linear` end, as a fraction of the peak.
        compile: Compile the decoder's blocks with `torch.compile`: slow first steps, faster ones after.
        silenced_advice: Rules of the advisor that don't warn (full-rate, epochs, …), or `all`.
    """

    def __init__(
        self,
        base: str,
        adapter: Adapter | None = None,
        loss: Loss | None = None,
        revision: str | None = None,
        tokenizer: str | None = None,
        new_tokens: list[str] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        render: RenderPolicies = _EVERY_TURN,
        dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None,
        trust_remote_code: bool = False,
        gradient_checkpointing: bool = False,
        router_aux_loss: bool | float | None = None,
        preflight: bool = True,
        on_bad_loss: OnBadLoss = "stop",
        learning_rate: float | None = None,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = _BETAS,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        schedule: schedules.Schedule = "cosine",
        warmup: float = 0.03,
        final_learning_rate: float = 0.0,
        compile: bool = False,
        silenced_advice: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.base = assets.model_path(base)
        self.adapter: Adapter = plugins.default("adapters")() if adapter is None else adapter
        self.loss: Loss = plugins.default("losses")() if loss is None else loss
        self.revision = revision
        self.tokenizer_name = tokenizer
        self.new_tokens = new_tokens or []
        self.chat_template = chat_template
        self.chat_template_kwargs = chat_template_kwargs
        self.render = render
        self.load_dtype = dtype
        self.trust_remote_code = trust_remote_code
        self.gradient_checkpointing = gradient_checkpointing
        self.router_aux_loss = router_aux_loss
        self.router: RouterLoss | None = None
        self.preflight = preflight
        self.watch = Watch(on_bad_loss)
        self.learning_rate = self.adapter.default_learning_rate if learning_rate is None else learning_rate
        self.weight_decay = weight_decay
        self.betas = betas
        self.optimizer = optimizer
        self.schedule: schedules.Schedule = schedule
        self.warmup = warmup
        self.final_learning_rate = final_learning_rate
        self.compiled = compile
        self.silenced_advice = silenced_advice
        _check_options(self)
        bound_kernel_caches()
        self.model: transformers.PreTrainedModel | None = None
        self.restored: int | None = None  # the step whose weights the run ends with, if not the last
        self.metrics = nn.ModuleDict(
            {
                stage: nn.ModuleDict({"loss": TokenLoss(), "perplexity": TokenPerplexity()})
                for stage in ("val", "test")
            }
        )
        self._step_loss: Tensor | None = None
        self.throughput = Throughput()

    # -------------------------------------------------------------------------------- the model's parts

    @cached_property
    def layout(self) -> Layout:
        """How this model takes its batches; found by trying it when first asked."""
        with torch.no_grad():
            trial = partial(find_layout, self.loaded, int(self.tokenizer.pad_token_id))
            layout = as_forward(self.loaded, trial)
        if layout.padded_because:
            rank_zero_info(f"Rows are padded, not flattened: {layout.padded_because}.")
        if self.compiled:
            compile_blocks(causal_lm(self.loaded))
        return layout

    @property
    def data(self) -> SFTDataModule:
        """The data module of the run at hand: prepared examples, plans and ledger."""
        return cast("SFTDataModule", vars(self.trainer)["datamodule"])

    @property
    def loaded(self) -> transformers.PreTrainedModel:
        """The model, with its adapter.

        Raises:
            RuntimeError: It isn't loaded yet.
        """
        if self.model is None:
            raise RuntimeError("the model is not loaded yet; Lightning does it in configure_model()")
        return self.model

    def configure_model(self) -> None:
        """Load the base and put the adapter in, unless there is a model; shard it where the strategy does.

        Raises:
            SFTError: The base can't be loaded, or nothing of it would be trained.
        """
        if self.model is not None:
            shard(self)
            return
        if self._trainer is not None:
            strategies.check(self.trainer, self.adapter, self.optimizer)
        model = load_model(
            self.base,
            dtype=self.weights_dtype,
            revision=self.revision,
            quantization=self.adapter.quantization(),
            trust_remote_code=self.trust_remote_code,
        )
        self.assemble(model)
        self.frozen = frozen_digest(self)
        shard(self)

    def assemble(self, model: transformers.PreTrainedModel) -> None:
        """Put the adapter into the base, and set what is trained and recomputed.

        Raises:
            SFTError: Nothing of it would be trained.
        """
        model.name_or_path = absolute(self.base)
        grow(model, self.rows)
        self.adapter.new_token_ids = self.rows.trained
        with keeping_compilers():
            self.model = self.adapter.prepare(model)
        check_trained(causal_lm(self.model), self.rows, plugins.describe(self.adapter))
        for config in getattr(self.model, "peft_config", {}).values():
            config.revision = self.revision
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise SFTError(
                f"{plugins.describe(self.adapter)} leaves no parameter to train",
                where="model.adapter",
                fix="change its options",
            )
        self.router = router_loss(self.model, self.router_aux_loss)
        if self.gradient_checkpointing:
            checkpoint_layers(self.model)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moved, never cast: Lightning's `*-true` precisions would round metric sums, RoPE tables and adapters.

        The weights are loaded in their type; see `dtype`.
        """
        kwargs.pop("dtype", None)
        return super().to(*args, **kwargs)

    @property
    def weights_dtype(self) -> torch.dtype:
        """The type of the loaded weights: `dtype`, or what the trainer's precision implies."""
        if self.load_dtype is not None:
            chosen: torch.dtype = getattr(torch, self.load_dtype)
            return chosen
        precision = str(self.trainer.precision) if self._trainer is not None else "32-true"
        return _PRECISION_DTYPES.get(precision, torch.float32)

    def restore(self, weights: dict[str, Tensor], step: int) -> None:
        """Take the weights of this step, as a checkpoint's `state_dict` holds them; the run ends with them."""
        parameters = dict(self.named_parameters())
        with torch.no_grad():
            for name, value in weights.items():
                parameters[name].copy_(part_of(value, parameters[name]))
        self.restored = step

    def export(self, folder: Path) -> None:
        """Write adapter or model, tokenizer, chat template and generation config: rank 0, but all ranks call this."""
        refuse_bad_weights(self)
        with whole_parameters(self.loaded):
            if self.global_rank == 0:
                self._write(folder)

    def _write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        generation = causal_lm(self.loaded).generation_config
        generation.eos_token_id = list(self.renderer.stop_token_ids)
        generation.pad_token_id = self.tokenizer.pad_token_id
        try:
            generation.validate(strict=True)
        except ValueError:
            # Llama 2, for one, ships a temperature without do_sample; transformers loads that, and won't save it.
            generation.do_sample = True
        self.tokenizer.chat_template = self.renderer.chat_template
        with stock_attention(self.loaded):
            self.adapter.export(self.loaded, folder)
        if (quantization := self.adapter.quantization()) is not None:
            save_quantization(quantization, folder)
        generation.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    # ------------------------------------------------------------------------------------------- steps

    def on_fit_start(self) -> None:
        """Refuse what would make the plan's step sizes wrong, try model and rows (`preflight`), and give advice.

        Raises:
            SFTError: Accumulation changes over the run, Lightning would replace the batch order, or preflight fails.
        """
        super().on_fit_start()
        check_trainer(self.trainer)
        if self.trainer.ckpt_path is None:
            initialize(self)
        if self.preflight:
            preflight(self)
        advisor.tell(self)
        self.throughput.meter(self.loaded, peak_flops(self.device))

    def weighted_loss(self, batch: Batch, loss: Loss) -> Tensor:
        """Σ weight · loss over the batch's targets: a scalar, in at least float32."""
        router = self.router if torch.is_grad_enabled() else None
        self.watch.batch = batch
        with explained(self):
            compute = partial(batch_loss, self.loaded, batch, self.layout, loss, router)
            return as_forward(self.loaded, compute)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The micro-batch's share of the step's loss, scaled so that gradients add up to d(Σ w·loss / N).

        Lightning divides by the accumulation and DDP takes the mean over ranks: both are undone here. A router
        loss is a mean over the window's micro-batches and the ranks.
        """
        accumulate, world = self.trainer.accumulate_grad_batches, self.trainer.world_size
        share = self.weighted_loss(batch, self.loss) / batch.num_items
        scaled = share * (accumulate * world)
        if self.router is not None:
            window = min(accumulate, self.trainer.num_training_batches - batch_idx // accumulate * accumulate)
            scaled = scaled + self.router.take() * (accumulate / window)
        self.watch.saw(batch, scaled)
        self._step_loss = share.detach() if self._step_loss is None else self._step_loss + share.detach()
        self.throughput.add(batch)
        last = batch_idx + 1 == self.trainer.num_training_batches
        if (batch_idx + 1) % accumulate == 0 or last:
            if last or is_logged(self.trainer):
                log_step(self, self._step_loss)
            self._step_loss = None
        return scaled

    def on_train_start(self) -> None:
        """Begin a window."""
        super().on_train_start()
        self._step_loss = None

    def on_train_epoch_start(self) -> None:
        """Leave what happened between epochs out of the tokens per second."""
        self.throughput.restart()

    def on_validation_start(self) -> None:
        """Leave validation out, too."""
        super().on_validation_start()
        self.throughput.pause()

    def on_validation_end(self) -> None:
        """Go on counting."""
        self.throughput.resume()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the batch to `val/loss` (the negative log-likelihood per token) and `val/perplexity`."""
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the batch to `test/loss` and `test/perplexity`."""
        self._evaluate("test", batch)

    def predict_step(self, batch: Callable[[SFTModule], object], batch_idx: int) -> object:
        """Evaluate: `lightning-sft evaluate` is a prediction whose only batch is what to do with the module."""
        return batch(self)

    def _evaluate(self, stage: str, batch: Batch) -> None:
        total, weight = self.weighted_loss(batch, NLL), batch.weights.sum()
        for name, metric in self.metrics[stage].items():  # type: ignore[operator]
            metric.update(total, weight)
            self.log(f"{stage}/{name}", metric, prog_bar=name == "loss", on_epoch=True, batch_size=1)

    # --------------------------------------------------------------------------------------- optimizer

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over what is trained, with the schedule stepped after every optimizer step."""
        return optimizers.configure(self)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave out what isn't trained yet, and bad numbers."""
        optimizers.hold_back(optimizer, self.trainer.global_step)
        super().on_before_optimizer_step(optimizer)

    def total_steps(self) -> int:
        """Optimizer steps of the whole run; 0 if the trainer sets no end."""
        from lightning_sft.data.datamodule import SFTDataModule

        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, SFTDataModule):
            return data.total_steps()
        return int(self.trainer.estimated_stepping_batches)


def _check_options(module: SFTModule) -> None:
    """Refuse what no run could be made of, before anything is loaded."""
    schedules.warmup_steps(module.warmup, 1)
    advisor.check_names(module.silenced_advice)
    for option in ("learning_rate", "weight_decay", "final_learning_rate"):
        value = getattr(module, option)
        if not 0 <= value < float("inf"):
            raise SFTError(f"{option} is {value}", where=f"model.{option}", fix="give a number of 0 or more")
    if not all(0 <= beta < 1 for beta in module.betas):
        raise SFTError(f"betas are {module.betas}", where="model.betas", fix="give numbers from 0 to below 1")
    if module.optimizer is not None:
        optimizers.check(module.optimizer, betas_given=tuple(module.betas) != _BETAS)
