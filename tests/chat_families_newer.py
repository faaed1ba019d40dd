"""Chat templates in the styles of further families: tools, reasoning, rewritten history, odd spacing."""

from __future__ import annotations

from chat_families import IM, Family

LLAMA2 = """\
{%- set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' if messages[0].role == 'system' else '' %}
{%- for m in (messages[1:] if system else messages) %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must take turns') }}{% endif %}
    {%- if m.role == 'user' %}
        {{- bos_token + '[INST] ' + ((system if loop.first else '') + m.content) | trim + ' [/INST]' }}
    {%- else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}
{%- endfor %}"""

LLAMA31 = """\
{{- bos_token }}
{%- for m in messages %}
    {%- set role = 'ipython' if m.role == 'tool' else m.role %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
    {%- if tools and loop.first %}
        {{- 'Functions:\\n' }}{% for tool in tools %}{{ tool | tojson(indent=4) + '\\n\\n' }}{% endfor %}
    {%- endif %}
    {{- m.content | trim }}
    {%- for call in m.tool_calls or [] %}
        {{- '{"name": "' + call.function.name + '", "parameters": ' + call.function.arguments | tojson + '}' }}
    {%- endfor %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

MISTRAL3 = """\
{{- bos_token }}
{%- set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {%- if tools and loop.index0 == ns.last %}
            {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + (system if loop.index0 == ns.last else '') + m.content + '[/INST]' }}
    {%- elif m.tool_calls %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in m.tool_calls %}
            {{- call.function | tojson + (', ' if not loop.last else ']') }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}
    {%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS] {"content": ' + m.content + '}[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}"""
"""Tools and the system message go before the last user message, so that history changes."""

COMMAND_R = """\
{{- bos_token }}
{%- for m in messages %}
    {%- set name = {'user': 'USER', 'assistant': 'CHATBOT', 'system': 'SYSTEM'}[m.role] %}
    {{- '<|START_OF_TURN_TOKEN|><|' + name + '_TOKEN|>' + m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"""

DEEPSEEK_R1 = """\
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'system' %}{{ m.content }}
    {%- elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}
    {%- elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end｜>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""
"""The generation prompt opens a thought that the rendering leaves out."""

QWEN3 = """\
{%- set ns = namespace(last=messages | length - 1) %}
{%- for m in messages[::-1] if m.role == 'user' %}
    {%- if loop.first %}{% set ns.last = messages.index(m) %}{% endif %}
{%- endfor %}
{%- if tools %}
    {{- '<|im_start|>system\\n' + (messages[0].content + '\\n\\n' if messages[0].role == 'system' else '') }}
    {{- '<tools>' }}{% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}{{ '\\n</tools><|im_end|>\\n' }}
{%- elif messages and messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- set content = m.content %}
    {%- if m.role == 'user' or m.role == 'system' and not loop.first %}
        {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set thought = m.reasoning_content or '' %}
        {%- if not thought and '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}{{ content }}{% endif %}
        {%- for call in m.tool_calls or [] %}
            {{- '\\n' if content or not loop.first }}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""Thoughts before the last user message are dropped, and the last turn has an empty one where it has none."""

GPT_OSS = """\
{%- if tools %}{{ '<|start|>developer<|message|>' + tools | tojson + '<|end|>' }}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- if m.reasoning_content and (loop.last or m.tool_calls) %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|>' }}
        {%- endif %}
        {%- if m.tool_calls %}
            {{- '<|start|>assistant to=functions.' + m.tool_calls[0].function.name }}
            {{- '<|channel|>commentary json<|message|>' + m.tool_calls[0].function.arguments | tojson + '<|call|>' }}
        {%- else %}
            {{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
            {{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
        {%- endif %}
    {%- elif m.role == 'tool' %}{{ '<|start|>functions to=assistant<|message|>' + m.content + '<|end|>' }}
    {%- else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""
"""Ends the last turn, a call and an earlier turn with three different tokens."""

GRANITE = """\
{%- for m in messages %}
    {{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"""

TULU = """\
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|assistant|>\\n' + m.content + eos_token }}{% if not loop.last %}{{ '\\n' }}{% endif %}
    {%- else %}{{ '<|' + m.role + '|>\\n' + m.content + '\\n' }}{% endif %}
    {%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}
{%- endfor %}"""

OPENCHAT = """\
{{- bos_token }}
{%- for m in messages %}
    {{- 'GPT4 Correct ' + m.role.title() + ': ' + m.content + '<|end_of_turn|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}"""

PHI4 = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""

EXAONE = """\
{%- if messages and messages[0].role != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}
{%- for m in messages %}
    {{- '[|' + m.role + '|]' + m.content + ('\\n' if m.role == 'user' else '[|endofturn|]\\n') }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"""

INTERNLM = """\
{{- bos_token }}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

SMOLLM = """\
{%- if messages and messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM.<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
    {%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""A default system message, and generation tags."""

BAICHUAN = """\
{%- for m in messages %}
    {%- if m.role == 'system' %}{{ m.content }}
    {%- elif m.role == 'user' %}{{ '<reserved_106>' + m.content }}
    {%- elif m.role == 'assistant' %}{{ '<reserved_107>' + m.content + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<reserved_107>' }}{% endif %}"""

REFORMATTING = """\
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {{- m.content | trim | replace('\\r\\n', '\\n') | replace('\\t', '    ') | upper }}
    {{- ' <|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

ORCA = """\
{%- for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"""

_HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_ALL = frozenset({"tools", "reasoning", "any order", "no history"})
_IN_TURN = _ALL - {"any order"}  # an assistant that speaks twice is history to itself
R1_TOKENS = ("<｜User｜>", "<｜Assistant｜>", "<｜end｜>", "<think>", "</think>")
_CHANNELS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
_QWEN = (*IM, "<think>", "</think>", "<tool_call>", "</tool_call>")

NEWER = {
    "llama2": Family(LLAMA2, markers=("[INST] ", " [/INST]", "<</SYS>>\n\n"), can=frozenset()),
    "llama3.1": Family(
        LLAMA31,
        "<|eot_id|>",
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", '{"name": "'),
        _HEADERS,
        can=_ALL - {"reasoning"},
    ),
    "command-r": Family(
        COMMAND_R,
        "<|END_OF_TURN_TOKEN|>",
        ("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",),
        ("<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|USER_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    ),
    "granite": Family(
        GRANITE,
        markers=("<|start_of_role|>assistant<|end_of_role|>",),
        added=("<|start_of_role|>", "<|end_of_role|>"),
    ),
    "tulu": Family(TULU, markers=("<|assistant|>\n",), can=frozenset()),
    "openchat": Family(OPENCHAT, "<|end_of_turn|>", ("GPT4 Correct Assistant:",), ("<|end_of_turn|>",)),
    "phi4": Family(PHI4, "<|im_end|>", ("<|im_start|>assistant<|im_sep|>",), (*IM, "<|im_sep|>")),
    "exaone": Family(
        EXAONE,
        "[|endofturn|]",
        ("[|assistant|]",),
        ("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]"),
        can=frozenset({"any order"}),
    ),
    "internlm": Family(INTERNLM, "<|im_end|>", ("<|im_start|>assistant\n",), IM),
    "smollm": Family(SMOLLM, "<|im_end|>", ("<|im_start|>assistant\n",), IM, can=frozenset({"any order"})),
    "baichuan": Family(BAICHUAN, markers=("<reserved_107>",), added=("<reserved_106>", "<reserved_107>")),
    "reformatting": Family(REFORMATTING, "<|im_end|>", ("<|im_start|>assistant\n",), IM),
    "orca": Family(
        ORCA,
        "<|end|>",
        ("<|assistant|>",),
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
}
"""They keep history as it is."""

REWRITING = {
    "mistral3": Family(MISTRAL3, markers=("[INST] ", "[/INST]"), can=frozenset({"tools"})),
    "qwen3": Family(QWEN3, "<|im_end|>", ("<|im_start|>assistant\n", "<think>\n"), _QWEN, can=_IN_TURN),
    "gpt-oss": Family(
        GPT_OSS, "<|return|>", ("<|start|>assistant", "<|end|>", "<|call|>"), _CHANNELS, can=_IN_TURN
    ),
}
"""They render a turn differently once others follow."""
