"""Chat templates in the styles of well-known families, and small tokenizers that have their tokens.

`law` is the loss mask's definition, computed without the renderer: transformers renders the history with
the generation prompt, and the conversation through the turn; what lies between is trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby

from lightning_sft import Conversation, Message, Meta, Renderer
from lightning_sft.example import Example

BOS, EOS = "<s>", "</s>"

META = Meta("rows.json", 7)


@dataclass(frozen=True)
class Family:
    """A template with what it needs and can do.

    Args:
        template: The Jinja text, or the name of a shipped template.
        stop: The token that ends an assistant turn.
        markers: Further texts of the template, for conversations that imitate it.
        added: Tokens that the tokenizer needs beyond BOS and EOS.
        rstrip: Whether the added tokens swallow the whitespace after them.
        can: Which of "tools", "reasoning", "any order" (of roles) and "no history" the template renders.
    """

    template: str
    stop: str = EOS
    markers: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    rstrip: bool = False
    can: frozenset[str] = frozenset({"any order", "no history"})


CHATML = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA3 = """\
{{- bos_token }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

MISTRAL = """\
{{- bos_token }}
{%- set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{%- for m in (messages[1:] if system else messages) %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant must take turns') }}
    {%- endif %}
    {%- if m.role == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}
    {%- else %}{{ m.content + eos_token }}{% endif %}
{%- endfor %}"""

GEMMA = """\
{{- bos_token }}
{%- set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{%- for m in (messages[1:] if system else messages) %}
    {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
    {{- (system if loop.first else '') + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

PHI3 = """\
{% for m in messages %}{% if m.role == 'system' %}{{ '<|system|>\\n' + m.content + '<|end|>\\n' }}\
{% elif m.role == 'user' %}{{ '<|user|>\\n' + m.content + '<|end|>\\n' }}\
{% elif m.role == 'assistant' %}{{ '<|assistant|>\\n' + m.content + '<|end|>\\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

ZEPHYR = """\
{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

VICUNA = """\
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'system' %}{{ m.content + ' ' }}
    {%- elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}
    {%- elif m.role == 'assistant' %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""

DEEPSEEK = """\
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'system' %}{{ m.content }}
    {%- elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}
    {%- elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content + '<｜end｜>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"""

ALPACA = """\
{{- 'Below is an instruction.\\n\\n' }}
{%- for m in messages %}
    {%- if m.role == 'system' %}{{ m.content + '\\n\\n' }}
    {%- elif m.role == 'user' %}{{ '### Instruction:\\n' + m.content + '\\n\\n' }}
    {%- elif m.role == 'assistant' %}{{ '### Response:\\n' + m.content + eos_token + '\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"""

QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' + (messages[0].content + '\\n\\n' if messages[0].role == 'system' else '') }}
    {{- '# Tools\\n\\n<tools>' }}{% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages and messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' or m.role == 'system' and not loop.first %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if m.reasoning_content %}
            {{- '<think>\\n' + m.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- m.content }}
        {%- for call in m.tool_calls or [] %}
            {{- '\\n' if m.content or not loop.first }}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

IM = ("<|im_start|>", "<|im_end|>")
_PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_ALL = frozenset({"tools", "reasoning", "any order", "no history"})
_HISTORY = frozenset({"any order"})

FAMILIES = {
    "chatml": Family(CHATML, "<|im_end|>", ("<|im_start|>assistant\n",), IM),
    "llama3": Family(
        LLAMA3,
        "<|eot_id|>",
        ("<|start_header_id|>assistant<|end_header_id|>\n\n",),
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "mistral": Family(MISTRAL, markers=("[INST] ", " [/INST]"), can=frozenset()),
    "gemma": Family(
        GEMMA,
        "<end_of_turn>",
        ("<start_of_turn>model\n",),
        ("<start_of_turn>", "<end_of_turn>"),
        can=_HISTORY,
    ),
    "phi3": Family(PHI3, "<|end|>", ("<|assistant|>\n", EOS), _PHI, rstrip=True),
    "zephyr": Family(ZEPHYR, markers=("<|assistant|>\n",)),
    "vicuna": Family(VICUNA, markers=(" ASSISTANT:",)),
    "deepseek": Family(
        DEEPSEEK, "<｜end｜>", ("<｜Assistant｜>",), ("<｜User｜>", "<｜Assistant｜>", "<｜end｜>")
    ),
    "alpaca-like": Family(ALPACA, markers=("### Response:\n",)),
    "qwen": Family(
        QWEN,
        "<|im_end|>",
        ("<|im_start|>assistant\n", "<think>\n", "</tool_call>"),
        (*IM, "<think>", "</think>", "<tool_call>", "</tool_call>"),
        can=_ALL,
    ),
    "shipped plain": Family("plain", markers=("### Assistant:\n", "<think>\n"), can=_ALL),
    "shipped alpaca": Family("alpaca", markers=("### Response:\n",), can=_HISTORY),
    "shipped chatml": Family("chatml", "<|im_end|>", ("<|im_start|>assistant\n",), IM),
}

TOKENIZERS = ("bytes", "trimmed", "pieces")
"""Byte-level BPE; the same with offsets that leave out spaces (Llama 3's); SentencePiece-like BPE."""

_TEXT = "the user asks and the assistant answers: hello there, how are you? I am fine, thank you."


@cache
def build_tokenizer(
    kind: str, added: tuple[str, ...] = (), *, rstrip: bool = False, lstrip: bool = False, text: str = _TEXT
):
    """A small tokenizer with BOS, EOS (which is also the padding) and these added tokens, not all special."""
    import transformers
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    if kind == "pieces":
        raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        raw.normalizer = normalizers.Sequence([])
        steps = [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
        raw.decoder = decoders.Sequence(steps)
        alphabet, special = [], ["<unk>", BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256))]
    else:
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        if kind == "trimmed":
            raw.post_processor = processors.ByteLevel(trim_offsets=True)
        alphabet, special = pre_tokenizers.ByteLevel.alphabet(), [BOS, EOS]
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([text] * 4, trainer)
    if kind == "pieces":  # the byte tokens are ordinary ones, not to be found in a text
        import json

        state = json.loads(raw.to_str())
        state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
        raw = Tokenizer.from_str(json.dumps(state))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=BOS, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False
    )
    tokenizer.add_tokens(
        [
            AddedToken(token, rstrip=rstrip, lstrip=lstrip, normalized=False, special=number % 2 == 0)
            for number, token in enumerate(added)
        ]
    )
    return tokenizer


def make_renderer(tokenizer, template: str, **policies) -> Renderer:
    """A renderer for this template's text (or the name of a shipped one)."""
    if template.isalpha():
        return Renderer(tokenizer, template, **policies)
    tokenizer.chat_template = template
    return Renderer(tokenizer, **policies)


def chatml(template: str = CHATML, kind: str = "bytes", **policies) -> Renderer:
    """A renderer for a template with ChatML's tokens."""
    return make_renderer(build_tokenizer(kind, IM), template, **policies)


def conversation(*messages, tools=()) -> Conversation:
    """Messages given as (role, content) or (role, content, weight), or as they are."""
    made = [m if isinstance(m, Message) else Message(m[0], m[1], weight=(*m, None)[2]) for m in messages]
    return Conversation(tuple(made), tuple(tools), META)


PAIR = conversation(("user", "hi"), ("assistant", "hello"))


def as_dicts(conversation: Conversation) -> list[dict]:
    """The messages as transformers takes them."""
    messages = []
    for m in conversation.messages:
        message = {"role": m.role, "content": m.content, "reasoning_content": m.reasoning, "name": m.name}
        message["tool_call_id"] = m.tool_call_id
        calls = [
            {"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in m.tool_calls
        ]
        messages.append({k: v for k, v in {**message, "tool_calls": calls or None}.items() if v is not None})
    return messages


def template_ids(tokenizer, conversation: Conversation, template: str) -> list[int]:
    """The ids that transformers makes of the conversation."""
    tools = list(conversation.tools) or None
    return tokenizer.apply_chat_template(
        as_dicts(conversation), tools=tools, chat_template=template, tokenize=True, return_dict=False
    )


def law(tokenizer, conversation: Conversation, template: str, stop: str) -> Iterator[tuple[str, str]]:
    """(prompt, what the model must produce after it) of each assistant turn, by transformers alone."""
    messages = as_dicts(conversation)

    def text(part: list[dict], **options: bool) -> str:
        return tokenizer.apply_chat_template(
            [part],
            tools=list(conversation.tools) or None,
            chat_template=template,
            tokenize=False,
            **options,
        )[0]

    whole = text(messages)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = text(messages[:index], add_generation_prompt=True)
            through = text(messages[: index + 1])
            through = through[: through.rindex(stop) + len(stop)]
            assert whole.startswith(through)
            assert through.startswith(prompt)
            yield prompt, through[len(prompt) :]


def trained_turns(tokenizer, example: Example) -> list[tuple[str, str]]:
    """(text before, text) of each run of trained tokens of an example."""
    ids, turns, position = example.input_ids.tolist(), [], 0
    for trained, run in groupby(example.weights > 0):
        end = position + len(list(run))
        if trained:
            before, through = tokenizer.decode(ids[:position]), tokenizer.decode(ids[:end])
            assert through.startswith(before)
            turns.append((before, through[len(before) :]))
        position = end
    return turns


def swallowed(text: str, added: tuple[str, ...]) -> str:
    """`text` as it is decoded where the added tokens swallow the whitespace after them."""
    return re.sub(f"({'|'.join(map(re.escape, added))})\\s+", r"\1", text)
