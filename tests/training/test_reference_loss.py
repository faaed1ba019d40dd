"""The loss and its gradients equal a reference written with transformers alone."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.nn import functional as F

from lightning_sft import Conversation, Message, Renderer, SFTModule
from lightning_sft.data.batch import flatten
from lightning_sft.training.layout import causal_lm

FLATTENED = ["llama", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "gpt2", "gpt_neox", "cohere", "granite"]
PADDED = ["falcon", "bloom", "mamba"]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
WINDOW = 8


def conversations() -> list[Conversation]:
    texts = [
        ("hello there, how are you?", "the assistant answers: hello, hello there, how are you? " * 2),
        ("the user asks", "ok"),
        ("and the assistant? " * 3, "answers 🙂 and answers and the user asks"),
    ]
    return [
        Conversation((Message("system", "be kind"), Message("user", asked), Message("assistant", answered)))
        for asked, answered in texts
    ]


def reference_loss(folder, examples, dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Row by row, eager attention, full logits, cross-entropy on the response tokens; nothing of ours."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    )
    total, count = torch.zeros((), dtype=dtype), 0
    for example in examples:
        ids = torch.from_numpy(example.input_ids).long()
        labels = ids.masked_fill(torch.from_numpy(example.weights) == 0, -100)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        total = total + F.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100)
        count += int((labels[1:] != -100).sum())
    loss = total / count
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def our_loss(folder, examples, dtype):
    module = SFTModule(base=str(folder), dtype=str(dtype).removeprefix("torch."))
    module.configure_model()
    module.train()
    batch = module.layout.collate(examples, sum(float(e.weights.sum()) for e in examples))
    loss = module.weighted_loss(batch, module.loss) / batch.num_items
    loss.backward()
    named = causal_lm(module.model).named_parameters()
    return module, loss.detach(), {name: p.grad for name, p in named if p.grad is not None}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    difference = sum(float((a[k].double() - b[k].double()).norm() ** 2) for k in a) ** 0.5
    return difference / sum(float(b[k].double().norm() ** 2) for k in b) ** 0.5


@pytest.fixture
def float64_throughout(monkeypatch):
    """transformers rounds softmaxes and norms to float32 even in a float64 model; here it doesn't."""
    softmax, to, single = F.softmax, torch.Tensor.to, torch.Tensor.float

    def exact_softmax(input, dim=None, dtype=None, **kwargs):
        return softmax(input, dim=dim, dtype=None if input.dtype == torch.float64 else dtype, **kwargs)

    def exact_to(self, *args, **kwargs):
        rounds = (
            self.dtype == torch.float64
            and self.requires_grad
            and torch.float32 in (*args, kwargs.get("dtype"))
        )
        return self if rounds else to(self, *args, **kwargs)

    monkeypatch.setattr(F, "softmax", exact_softmax)
    monkeypatch.setattr(torch.Tensor, "to", exact_to)
    monkeypatch.setattr(
        torch.Tensor, "float", lambda x: exact_to(x, torch.float32) if x.requires_grad else single(x)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", FLATTENED + PADDED)
def test_loss_and_gradients_equal_the_reference(name, dtype, model_folder, tokenizer, float64_throughout):
    examples = Renderer(tokenizer).render_all(conversations())
    assert max(map(len, examples)) > 3 * WINDOW, "the rows must be longer than three sliding windows"
    expected, expected_gradients = reference_loss(model_folder(name), examples, dtype)
    module, loss, gradients = our_loss(model_folder(name), examples, dtype)
    assert (module.layout.padded_because is None) == (name in FLATTENED), module.layout.padded_because
    assert loss.item() == pytest.approx(expected.item(), rel=TOLERANCE[dtype])
    assert distance(gradients, expected_gradients) <= {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]


@pytest.mark.parametrize("name", PADDED)
def test_a_model_that_would_leak_on_flattened_rows_is_caught_and_says_why(name, model_folder, tokenizer):
    examples = Renderer(tokenizer).render_all(conversations())
    expected, _ = reference_loss(model_folder(name), examples, torch.float32)
    module, loss, _ = our_loss(model_folder(name), examples, torch.float32)
    assert name in module.layout.padded_because
    flattened = flatten(examples, sum(float(e.weights.sum()) for e in examples))
    flattened.segments = None  # as if the layout had not noticed
    wrong = module.weighted_loss(flattened, module.loss) / flattened.num_items
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert abs(wrong.item() - expected.item()) > 1e-3, "this model has no teeth: a leak would go unseen"
