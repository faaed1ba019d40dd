"""Optimizers by class path: the groups they get, the rates of a run, what they keep, and what is refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lightning_sft import Adapter, RateGroup, SFTDataModule, SFTError, SFTModule
from lightning_sft.training import optimizers
from lightning_sft.training.schedule import factor
from lightning_sft_adapters.full import Full
from lightning_sft_adapters.lora import LoRA

QUIET = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False,
    "enable_model_summary": False, "log_every_n_steps": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"instruction": f"say {n}", "output": f"{n} "}) + "\n" for n in range(8))
    )
    return str(path)


class Steps(Callback):
    """Keeps the trained parameters before training and after each optimizer step, and what was logged."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.logged: list[dict[str, float]] = []

    def on_train_start(self, trainer, module):
        self.weights.append({name: p.detach().clone() for name, p in module.loaded.named_parameters()})

    def on_train_batch_end(self, trainer, module, *args):
        self.on_train_start(trainer, module)
        self.logged.append({key: float(value) for key, value in trainer.callback_metrics.items()})


def run(base: Path, rows: str, **options):
    steps = Steps()
    torch.manual_seed(0)
    module = SFTModule(base=str(base), **{"learning_rate": 1e-2, "warmup": 0, **options})
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[steps])
    trainer.fit(module, SFTDataModule(train=rows, batch_size=2))
    return module, trainer, steps


class ByLayer(Adapter):
    """Trains the two blocks: the second from the first step on, the first from the third, at a tenth of the rate."""

    def prepare(self, model):
        model.requires_grad_(False)
        model.model.layers.requires_grad_(True)
        return model

    def rate_group(self, name):
        return RateGroup("second") if ".layers.1." in name else RateGroup("first", scale=0.1, start=2)

    def export(self, model, folder):
        model.save_pretrained(folder)


def test_each_group_has_its_rate_and_begins_at_its_step(model_folder, rows, caplog) -> None:
    module, trainer, steps = run(model_folder("llama"), rows, adapter=ByLayer(), weight_decay=0.1)
    optimizer = trainer.optimizers[0]
    of = {
        name: (group["rate"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
        for name, each in module.loaded.named_parameters()
        if each is p
    }
    assert of == {
        name: ("second" if ".layers.1." in name else "first", 0.0 if "norm" in name else 0.1)
        for name, p in module.loaded.named_parameters()
        if ".layers." in name
    }
    for step in range(4):
        before, after = steps.weights[step], steps.weights[step + 1]
        moved = {name for name, p in after.items() if not torch.equal(p, before[name])}
        begun = [".layers.1."] if step < 2 else [".layers.1.", ".layers.0."]
        assert moved == {name for name in after if any(each in name for each in begun)}
        peak = 1e-2 * factor(step, schedule="cosine", total_steps=4, warmup=0, final=0.0)
        assert steps.logged[step]["train/learning_rate"] == pytest.approx(peak)
        assert steps.logged[step]["train/learning_rate/second"] == pytest.approx(peak)
        assert steps.logged[step]["train/learning_rate/first"] == pytest.approx(0.1 * peak if step > 1 else 0)
    ages = {
        group["rate"]: float(optimizer.state[group["params"][0]]["step"]) for group in optimizer.param_groups
    }
    assert ages == {"second": 4, "first": 2}


def test_a_group_that_begins_later_moves_as_if_it_had_been_frozen_until_then(model_folder, rows) -> None:
    """The other group's steps don't depend on gradients that are dropped: clipping sees only what is trained."""

    class Frozen(ByLayer):
        def prepare(self, model):
            super().prepare(model)
            model.model.layers[0].requires_grad_(False)
            return model

    def first_steps(adapter: Adapter) -> dict[str, torch.Tensor]:
        steps = Steps()
        module = SFTModule(
            base=str(model_folder("llama")), adapter=adapter, learning_rate=1e-2, schedule="constant"
        )
        trainer = Trainer(**QUIET, max_steps=2, callbacks=[steps], gradient_clip_val=0.5)
        trainer.fit(module, SFTDataModule(train=rows, batch_size=2))
        return steps.weights[-1]

    late, frozen = first_steps(ByLayer()), first_steps(Frozen())
    assert all(torch.equal(late[name], frozen[name]) for name in late)


class AllLater(ByLayer):
    def rate_group(self, name):
        return RateGroup(start=1)


def test_a_run_that_trains_nothing_at_first_is_refused(model_folder, rows) -> None:
    with pytest.raises(SFTError, match="no parameter is trained in the first step"):
        run(model_folder("llama"), rows, adapter=AllLater())


# --------------------------------------------------------------------------------------- by class path


def test_an_optimizer_is_made_of_its_options_with_the_models_rate_and_decay(model_folder, rows) -> None:
    chosen = partial(torch.optim.SGD, momentum=0.5)
    _, trainer, steps = run(
        model_folder("llama"),
        rows,
        optimizer=chosen,
        weight_decay=0.1,
        schedule="constant",
        adapter=LoRA(r=2),
    )
    optimizer = trainer.optimizers[0]
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.defaults["momentum"] == 0.5
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {(1e-2, 0.1)}
    moved = {name for name, p in steps.weights[-1].items() if not torch.equal(p, steps.weights[0][name])}
    assert moved == {name for name in steps.weights[0] if "lora_" in name}


def test_the_default_is_a_fused_adamw_and_one_by_name_is_the_same(model_folder, rows) -> None:
    _, default, plain = run(model_folder("llama"), rows, adapter=LoRA(r=2))
    _, named, same = run(model_folder("llama"), rows, adapter=LoRA(r=2), optimizer=partial(torch.optim.AdamW))
    for trainer in (default, named):
        assert trainer.optimizers[0].defaults["fused"]
    assert all(torch.equal(p, same.weights[-1][name]) for name, p in plain.weights[-1].items())


@pytest.mark.parametrize("adapter", [Full, partial(LoRA, r=2)], ids=["Full", "LoRA"])
def test_muon_gets_the_hidden_matrices_and_adamw_the_rest(adapter, model_folder, rows) -> None:
    chosen = partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
    module, trainer, steps = run(model_folder("llama"), rows, optimizer=chosen, adapter=adapter())
    optimizer = trainer.optimizers[0]
    by_muon = {
        name
        for name, p in module.loaded.named_parameters()
        if "momentum_buffer" in optimizer.state.get(p, {})
    }
    trained = {name: p for name, p in module.loaded.named_parameters() if p.requires_grad}
    hidden = {n for n, p in trained.items() if p.ndim == 2 and "embed_tokens" not in n and "lm_head" not in n}
    assert by_muon == hidden
    assert {n for n, p in trained.items() if "exp_avg" in optimizer.state[p]} == set(trained) - hidden
    moved = {name for name, p in steps.weights[-1].items() if not torch.equal(p, steps.weights[0][name])}
    assert moved == set(trained)


def test_two_optimizers_as_one_are_those_two_also_after_loading() -> None:
    def parts(seed: int):
        torch.manual_seed(seed)
        a, b = torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(3))
        return a, b, [torch.optim.Muon([a], lr=0.1), torch.optim.AdamW([b], lr=0.1)]

    a, b, apart = parts(0)
    c, d, together = parts(0)
    one = optimizers.Together(*together)
    schedule = torch.optim.lr_scheduler.LambdaLR(one, lambda step: 0.5**step)
    for step in range(4):
        if step == 2:  # as a resumed run does: a new one, that loads the state of the old
            e, f, fresh = parts(1)
            with torch.no_grad():
                e.copy_(c), f.copy_(d)
            again = optimizers.Together(*fresh)
            again.load_state_dict(one.state_dict())
            c, d, one = e, f, again
            schedule = torch.optim.lr_scheduler.LambdaLR(one, lambda step: 0.5**step, last_epoch=1)
        for each in (a, b, c, d):
            each.grad = torch.full_like(each, 0.1) + each.detach()
        for each in apart:
            each.param_groups[0]["lr"] = 0.1 * 0.5**step
            each.step()
        one.step()
        schedule.step()
        assert torch.equal(a, c)
        assert torch.equal(b, d)


@pytest.mark.parametrize(
    ("chosen", "per_value"),
    [
        (None, 8),
        (torch.optim.AdamW, 8),
        (partial(torch.optim.SGD, momentum=0.9), 4),
        (torch.optim.SGD, 0),
        (torch.optim.Muon, 4),
    ],
)
def test_what_an_optimizer_keeps_is_measured(chosen, per_value, model_folder) -> None:
    module = SFTModule(base=str(model_folder("llama")), adapter=LoRA(r=2), optimizer=chosen)
    module.configure_model()
    assert optimizers.state_bytes(module) == pytest.approx(per_value, abs=0.01)


class Switching(torch.optim.SGD):
    """Has two modes, as schedule-free optimizers do."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": partial(torch.optim.SGD, lr=0.1)}, "lr would be set in two places"),
        ({"optimizer": partial(torch.optim.AdamW, weight_decay=0.1)}, "weight_decay would be set"),
        ({"optimizer": torch.optim.SGD, "betas": (0.8, 0.9)}, "model.betas is for the default"),
        ({"optimizer": torch.optim.Rprop, "weight_decay": 0.1}, "Rprop knows no weight decay"),
        ({"optimizer": torch.optim.LBFGS}, "can't be made"),
        ({"optimizer": partial(torch.optim.SGD, momentum=-1)}, "momentum"),
        ({"optimizer": Switching}, "evaluates with other weights than it trains with"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(options, message, model_folder, rows) -> None:
    with pytest.raises(SFTError, match=message):
        run(model_folder("llama"), rows, **options)
