"""Chat templates against transformers' apply_chat_template."""

from __future__ import annotations

import warnings
from datetime import datetime
from typing import Any

import pytest

from control_plane.gateway.text.chat_template import ChatTemplate, plain_messages, select_template
from control_plane.gateway.text.tokenizer import TextTokenizer
from phasewise.core.errors import InvalidRequest, ModelLoadError
from phasewise.core.model_source import ModelSource

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
NOON = datetime(2026, 7, 26, 12).timestamp()

CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# In the manner of Llama 2 and Mistral: strict order of roles.
ALTERNATING = """{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (system + '\n\n' if loop.first and system is defined else '') }}
        {{- message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'].strip() + eos_token }}
    {%- endif %}
{%- endfor %}
"""
# In the manner of Llama 3.1 and Qwen: dates, namespaces, tojson, macros, filters, loop controls, generation blocks.
EVERYTHING = """{%- set ns = namespace(count=0, names=[]) %}
{%- macro header(role) %}<|{{ role | upper }}|>{% endmacro %}
{% if strftime_now is defined %}
Today: {{ strftime_now("%d %b %Y") }}
{% endif %}
{% if tools is not none %}tools{% endif %}
{% for message in messages %}
    {% if message.role == "ignored" %}{% continue %}{% endif %}
    {% if ns.count > 4 %}{% break %}{% endif %}
    {% set ns.count = ns.count + 1 %}
{{ header(message.role) }} {{ message.content | trim | tojson }} {{ {"b": "é<&>", "a": [none]} | tojson(indent=2) }}
    {% if message.role == "assistant" %}
    {% generation %}{{ message.content }}{% endgeneration %}

    {% endif %}
    {{- message.name | default("nobody") }}
{% endfor %}
{{ dict(x=1).x }}{{ ns.count }}{% if add_generation_prompt %}{{ header("assistant") }}{% endif %}
"""
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Was kostet <das>? ☕"}],
    [
        {"role": "user", "content": " a "},
        {"role": "assistant", "content": "  b\n\n"},
        {"role": "user", "content": "c", "name": "Ann"},
    ],
]


def transformers_render(template: str, chat: list[dict[str, Any]]) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **SPECIAL)
        tokenizer.chat_template = template
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert isinstance(rendered, str)
    return rendered


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", [CHATML, ALTERNATING, EVERYTHING])
def test_rendering_is_that_of_transformers(template: str, chat: list[dict[str, Any]]) -> None:
    ours = ChatTemplate(template, SPECIAL, lambda: datetime.now().timestamp()).render(plain_messages(chat))
    assert ours == transformers_render(template, chat)


def test_smollm2_chat_is_that_of_transformers(
    smollm2: ModelSource, smollm2_tokenizer: TextTokenizer, smollm2_oracle: Any
) -> None:
    for chat in CHATS:
        expected = smollm2_oracle.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert smollm2_tokenizer.encode_chat(chat) == expected


def test_the_date_comes_from_the_given_clock() -> None:
    assert ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", {}, lambda: NOON).render([{}]) == "2026-07-26"


def test_a_wrong_order_of_roles_is_the_clients_fault() -> None:
    template = ChatTemplate(ALTERNATING, SPECIAL, lambda: NOON)
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        template.render([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    "program",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ dict.__subclasses__() }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
    ],
)
def test_templates_stay_in_the_sandbox(program: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template"):
        ChatTemplate(program, {}, lambda: NOON).render([{"role": "user", "content": "x"}])


def test_a_template_that_is_no_jinja_fails_at_loading() -> None:
    with pytest.raises(ModelLoadError, match="line 2"):
        ChatTemplate("a\n{% if %}", {}, lambda: NOON)


def test_the_default_of_several_templates() -> None:
    several = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    assert select_template(several, where="f") == "D"
    assert select_template({"default": "D"}, where="f") == "D"
    assert select_template("S", where="f") == "S"
    assert select_template(None, where="f") is None
    with pytest.raises(ModelLoadError, match=r"default.*tool_use"):
        select_template({"tool_use": "T"}, where="f")


def test_text_parts_are_joined_and_nulls_left_out() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = {"role": "user", "content": parts, "name": None, "tool_calls": None}
    assert plain_messages([message]) == [{"role": "user", "content": "ab"}]
    answer = {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "tool_calls": []}
    assert plain_messages([answer]) == [{"role": "assistant", "content": "x"}]


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ("hi", "messages[1]"),
        ({"content": "x"}, "messages[1].role"),
        ({"role": 5, "content": "x"}, "messages[1].role"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "user", "content": None}, "messages[1].content"),
        ({"role": "user", "content": 5}, "messages[1].content"),
        ({"role": "user", "content": ["x"]}, "messages[1].content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0].text"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[1].content[0].type"),
        ({"role": "user", "content": "x", "nme": "y"}, "messages[1].nme"),
        ({"role": "user", "content": "x", "name": 7}, "messages[1].name"),
        ({"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, "messages[1].tool_calls"),
    ],
)
def test_wrong_messages_are_named(message: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        plain_messages([{"role": "user", "content": "ok"}, message])
    assert caught.value.field == field
    assert field in caught.value.message


def test_no_messages_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="messages is empty"):
        plain_messages([])
