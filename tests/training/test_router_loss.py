"""The load-balancing loss is transformers' own, without padding, and averaged over a step's micro-batches."""

from __future__ import annotations

import json

import pytest
import torch
import zoo
from gradient_dump import load_steps
from lightning.pytorch import Trainer

from lightning_sft import SFTDataModule, SFTError, SFTModule
from lightning_sft.training.layout import find_layout, hidden_states
from lightning_sft.training.router_loss import router_loss

EXPERTS = ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "gpt_oss", "phimoe", "jamba", "granitemoehybrid"]


def theirs(model, rows) -> torch.Tensor:
    """What the model itself adds to its loss, on padded rows with a mask."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = torch.from_numpy(row.input_ids), 1
    return model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False).aux_loss


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("name", EXPERTS)
def test_it_is_the_models_own_on_flattened_and_padded_rows_with_its_gradient(name, checkpointed):
    rows = zoo.examples()
    reference = zoo.model(name)
    expected = theirs(reference, rows)
    expected.backward()
    model = zoo.model(name)
    layout = find_layout(model, 0)
    if checkpointed:
        from lightning_sft.training.memory import checkpoint_layers

        checkpoint_layers(model)
    router = router_loss(model, 0.5)
    hidden_states(model, layout.collate(rows, 1.0), own_logits=layout.own_logits, router=router)
    loss = router.take()
    assert loss.item() == pytest.approx(0.5 * expected.item(), rel=1e-5)
    assert router.mean().item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    compared = 0
    for (key, ours), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        if other.grad is not None and other.grad.any():
            apart = float((ours.grad - 0.5 * other.grad).norm() / other.grad.norm())
            assert apart < 1e-3, key
            compared += 1
    assert compared > 2


def test_padding_would_change_it():
    rows = zoo.examples()
    model = zoo.model("mixtral")
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.from_numpy(row.input_ids)
    with_padding = model(input_ids=ids, output_router_logits=True, use_cache=False).aux_loss
    assert abs(with_padding.item() - theirs(model, rows).item()) > 1e-3


@pytest.mark.parametrize(
    ("asked", "in_config", "coefficient"),
    [(None, False, None), (None, True, 0.02), (True, False, 0.02), (False, True, None), (0.3, False, 0.3)],
)
def test_the_option_wins_over_the_configuration(asked, in_config, coefficient):
    model = zoo.model("mixtral", output_router_logits=in_config, router_aux_loss_coef=0.02)
    router = router_loss(model, asked)
    assert (router.coefficient if router is not None else None) == coefficient


@pytest.mark.parametrize("name", ["olmo3", "deepseek_v3"])
def test_a_model_without_such_a_loss_is_refused_if_it_is_asked_for(name):
    assert router_loss(zoo.model(name), None) is None
    with pytest.raises(SFTError, match="load-balancing loss") as caught:
        router_loss(zoo.model(name), 0.1)
    assert caught.value.where == "model.router_aux_loss"
    with pytest.raises(SFTError):
        router_loss(zoo.model(name), True)


@pytest.fixture(scope="module")
def experts(tmp_path_factory, tokenizer) -> tuple[str, str]:
    """The folder of a mixture-of-experts model, and five rows."""
    folder = tmp_path_factory.mktemp("experts")
    model = zoo.model("qwen3_moe")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"instruction": f"say {n}", "output": f"{n} " * (5 * n + 1)} for n in range(5)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "model"), str(folder / "rows.jsonl")


def steps(experts, folder, *, coefficient: float | bool, size: int, accumulate: int):
    """The steps of one epoch at learning rate 0, and what was logged as router loss."""
    from gradient_dump import GradientDump

    module = SFTModule(base=experts[0], router_aux_loss=coefficient, learning_rate=0.0)
    logged = []

    class Log(GradientDump):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            stepped = (batch_idx + 1) % accumulate == 0 or trainer.is_last_batch
            if stepped and "train/router_aux_loss" in trainer.callback_metrics:
                logged.append(float(trainer.callback_metrics["train/router_aux_loss"]))

    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, max_epochs=1,
        enable_model_summary=False, accumulate_grad_batches=accumulate, log_every_n_steps=1,
        callbacks=[Log(str(folder))],
    )  # fmt: skip
    trainer.fit(module, SFTDataModule(train=experts[1], batch_size=size))
    return [ranks[0] for ranks in load_steps(folder)], logged, module, trainer


def test_it_is_a_mean_over_the_micro_batches_of_a_step_and_logged_apart(experts, tmp_path):
    """Five micro-batches in windows of three and two: the router's part of the gradient is the mean of its own."""
    with_it, logged, module, trainer = steps(
        experts, tmp_path / "with", coefficient=0.7, size=1, accumulate=3
    )
    without, none, _, _ = steps(experts, tmp_path / "without", coefficient=False, size=1, accumulate=3)
    assert not none
    assert [step["loss"] for step in with_it] == [step["loss"] for step in without]
    model = module.loaded.train()
    data = trainer.datamodule
    order = [micro.rows for micro in data.plan(0).rank(0)]
    means = []
    for step, plain, window in zip(with_it, without, (order[:3], order[3:]), strict=True):
        values = []
        module.zero_grad()
        for rows in window:
            batch = module.layout.collate([data.prepared["train"].examples[row] for row in rows], 1.0)
            hidden_states(model, batch, own_logits=False, router=module.router)
            loss = module.router.take()
            (loss / len(window)).backward()
            values.append(loss.item() / 0.7)
        means.append(sum(values) / len(values))
        for name, parameter in module.named_parameters():
            part = step["gradients"][name] - plain["gradients"][name]
            expected = parameter.grad if parameter.grad is not None else torch.zeros_like(part)
            assert torch.allclose(
                part, expected, atol=2e-5 * max(1.0, float(step["gradients"][name].abs().max()))
            )
    assert logged == pytest.approx(means, rel=1e-5)


def test_validation_has_no_router_loss(experts):
    losses = []
    for option in (False, 5.0):
        trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        (metrics,) = trainer.validate(
            SFTModule(base=experts[0], router_aux_loss=option), SFTDataModule(val=experts[1]), verbose=False
        )
        losses.append(metrics["val/loss"])
    assert losses[0] == losses[1]
