"""`lightning-sft generate`: one answer of a trained model, as it is being written."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightning_sft.conversation import Message
from lightning_sft.errors import SFTError


def generate(
    source: str,
    prompt: str | None = None,
    system: str | None = None,
    raw: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> None:
    """Print the answer of a model to a prompt while it is generated.

    Args:
        source: A run folder, or a model folder (a whole model or an adapter).
        prompt: What the user says; read from standard input if not given.
        system: A system message to put before it.
        raw: Continue the prompt's text as it is, without the chat template.
        max_new_tokens: Most tokens of the answer.
        temperature: Sampling temperature; 0 takes the likeliest token each time.
        top_p: Sample from the likeliest tokens that make up this probability.
        seed: Seed of the sampling.
        trust_remote_code: Run model code that comes with the model. Only for sources you trust.

    Raises:
        SFTError: There is no model or no prompt, the prompt leaves no room for an answer, or an option is out
            of range.
    """
    from lightning_sft.run_folder import model_folder

    _check(max_new_tokens, temperature, top_p)
    if raw and system is not None:
        raise SFTError("--raw leaves out the chat template, which --system needs", fix="give one of them")
    folder = model_folder(source)
    text = _prompt(prompt)

    import torch
    from transformers import TextStreamer

    from lightning_sft.rendering import Renderer
    from lightning_sft.training.models import context_length, load_tokenizer, load_trained

    tokenizer = load_tokenizer(str(folder), trust_remote_code=trust_remote_code, key="source")
    renderer = Renderer(tokenizer)
    if not raw:
        messages = (
            [Message("user", text)] if system is None else [Message("system", system), Message("user", text)]
        )
        text = renderer.generation_prompt(messages)
    model = load_trained(folder, trust_remote_code=trust_remote_code).to(
        "cuda" if torch.cuda.is_available() else "cpu"
    )
    inputs = tokenizer(text, add_special_tokens=raw, return_tensors="pt", verbose=False).to(model.device)
    length = inputs["input_ids"].shape[1]
    context = context_length(model.config, tokenizer)
    room = max_new_tokens if context is None else min(max_new_tokens, context - length)
    if room < 1:
        raise SFTError(
            f"the prompt has {length} tokens, the model's context is {context}",
            where="--prompt",
            fix="shorten it",
        )
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    model.generate(
        **inputs,
        max_new_tokens=room,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        eos_token_id=list(renderer.stop_token_ids),
        pad_token_id=tokenizer.pad_token_id,
        **({"do_sample": False} | sampling),
    )


def _check(max_new_tokens: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 1:
        raise SFTError(f"it is {max_new_tokens}", where="--max_new_tokens", fix="give at least 1")
    if not 0 <= temperature < float("inf"):
        raise SFTError(f"it is {temperature}", where="--temperature", fix="give 0 or more")
    if not 0 < top_p <= 1:
        raise SFTError(f"it is {top_p}", where="--top_p", fix="give more than 0 and at most 1")


def _prompt(prompt: str | None) -> str:
    if prompt is None:
        if sys.stdin.isatty():
            raise SFTError("no prompt", fix='give --prompt "...", or pipe one in')
        prompt = sys.stdin.read().rstrip("\n")
    if not prompt.strip():
        raise SFTError("the prompt is empty", where="--prompt", fix="write something")
    return prompt


def command(argv: Sequence[str]) -> None:
    """Parse the command line and generate."""
    from lightning_sft import command_line

    command_line.quieten()
    command_line.call(generate, argv, "generate")
