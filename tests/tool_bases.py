"""Tiny random bases whose chat templates call tools in the forms of well-known families. The templates are written for
the tests."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from tests.tiny import SPECIALS, VOCABULARY, save_directory

MARKERS = ["[TOOL_CALLS]", "<|tool_call|>", "<|calls|>", "<|sep|>", "<|end_calls|>"]

_OFFER = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
)
_TALK = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.tool_calls %}CALLS{% else %}{{ message.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _template(calls: str) -> str:
    return _OFFER + _TALK.replace("CALLS", calls)


TEMPLATES = {
    "hermes": _template(
        "{% if message.content %}{{ message.content + '\n' }}{% endif %}{% for call in message.tool_calls %}"
        '{{ "<tool_call>\n{\\"name\\": \\"" + call.function.name + "\\", \\"arguments\\": " }}'
        "{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% if not loop.last %}{{ '\n' }}{% endif %}"
        "{% endfor %}"
    ),
    "llama": _template(
        "{% if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
        "{% set call = message.tool_calls[0].function %}"
        '{{ "{\\"name\\": \\"" + call.name + "\\", \\"parameters\\": " }}{{ call.arguments | tojson }}{{ "}" }}'
    ),
    "mistral": _template(
        "[TOOL_CALLS] [{% for call in message.tool_calls %}"
        "{% if call.id is not defined or call.id | length != 9 %}"
        "{{ raise_exception('ids have 9 characters') }}{% endif %}"
        '{{ "{\\"name\\": \\"" + call.function.name + "\\", \\"arguments\\": " + (call.function.arguments | tojson) }}'
        '{{ ", \\"id\\": \\"" + call.id + "\\"}" }}{% if not loop.last %}{{ ", " }}{% endif %}{% endfor %}]'
    ),
    "granite": _template("<|tool_call|>{{ message.tool_calls | map(attribute='function') | list | tojson(indent=4) }}"),
    "deepseek": _template(
        "<|calls|>{% for call in message.tool_calls %}"
        "{{ 'function<|sep|>' + call.function.name + '\n```json\n' + call.function.arguments + '\n```' }}"
        "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}<|end_calls|>"
    ),
    "function tag": _template(
        "{% for call in message.tool_calls %}"
        "{{ '<function=' + call.function.name + '>' + (call.function.arguments | tojson) + '</function>' }}{% endfor %}"
    ),
    "qwen coder": _template(
        "{% if message.content %}{{ message.content + '\n\n' }}{% endif %}{% for call in message.tool_calls %}"
        "{{ '<tool_call>\n<function=' + call.function.name + '>\n' }}"
        "{% for key, value in call.function.arguments.items() %}"
        "{{ '<parameter=' + key + '>\n' + (value if value is string else value | string) + '\n</parameter>\n' }}"
        "{% endfor %}{{ '</function>\n</tool_call>' }}{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    ),
    "glm": _template(
        "{% for call in message.tool_calls %}{{ '\n<tool_call>' + call.function.name }}"
        "{% for key, value in call.function.arguments.items() %}"
        "{{ '\n<arg_key>' + key + '</arg_key>\n<arg_value>' }}"
        "{{ value if value is string else value | tojson }}</arg_value>{% endfor %}{{ '\n</tool_call>' }}{% endfor %}"
    ),
    "minimax": _template(
        "{{ '<calls>\n' }}{% for call in message.tool_calls %}{{ '<invoke name=\"' + call.function.name + '\">\n' }}"
        "{% for key, value in call.function.arguments.items() %}{{ '<parameter name=\"' + key + '\">' }}"
        "{{ value if value is string else value | tojson }}{{ '</parameter>\n' }}{% endfor %}"
        "{{ '</invoke>\n' }}{% endfor %}</calls>"
    ),
    "control tokens": _template(
        "{% for call in message.tool_calls %}<|calls|>{{ call.function.name }}"
        "{% for key, value in call.function.arguments.items() %}{{ '<|sep|>' + key }}<|tool_call|>"
        "{{ value if value is string else value | tojson }}<|sep|>end{% endfor %}<|end_calls|>{% endfor %}"
    ),
}
XML = _template(
    "{% for call in message.tool_calls %}<function={{ call.function.name }}>"
    "{% for key, value in call.function.arguments.items() %}<{{ key }}>{{ value }}</{{ key }}>{% endfor %}{% endfor %}"
)
NOTHING_MARKS = _template(
    "{% set call = message.tool_calls[0].function %}{{ call.name }} {{ call.arguments | tojson }}"
)
LEFT_OUT = _template("nothing")
OWN_OBJECT = _template(
    "{% set call = message.tool_calls[0].function %}call:{{ call.name }}{{ '{' }}"
    "{% if call.arguments is mapping %}"
    "{% for key, value in call.arguments.items() %}{{ key }}:"
    '{% if value is string %}"{{ value }}"{% else %}{{ value }}{% endif %}'
    "{% if not loop.last %}, {% endif %}{% endfor %}"
    "{% else %}{{ call.arguments }}{% endif %}{{ '}' }}"
)
CHANNELS = TEMPLATES["hermes"].replace(
    "{% else %}{{ message.content }}", "{% else %}<|sep|>final:{{ message.content }}"
)
CUT_IDS = TEMPLATES["mistral"].replace("length != 9", "length < 9").replace("call.id +", "call.id[-9:] +")
PRINTED = TEMPLATES["hermes"].replace("call.function.arguments | tojson", "call.function.arguments")


def save_tool_base(directory: Path, template: str) -> Path:
    """A tiny random Llama with this chat template, and with MARKERS as control tokens."""
    size = len(VOCABULARY) + len(MARKERS)
    save_directory(directory, num_hidden_layers=2, max_position_embeddings=4096, vocab_size=size)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIALS[1:], *MARKERS]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return directory
