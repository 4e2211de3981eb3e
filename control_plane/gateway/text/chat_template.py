"""Chat templates: a list of messages → the text of a prompt, exactly as transformers renders it.

The templates are jinja programs that come with a model, so they run in jinja's immutable sandbox. What they may use is
what transformers gives them (`transformers/utils/chat_template_utils.py`): trimmed blocks, loop controls, `tojson`
without HTML escapes, `raise_exception`, `strftime_now`, `{% generation %}` blocks, special tokens as variables.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phasewise.core.errors import InvalidRequest, ModelLoadError
from phasewise.core.shown import clipped, shown

_IGNORED_KEYS = frozenset({"refusal", "annotations", "audio", "tool_calls", "function_call"})
_TEXT_KEYS = ("name", "tool_call_id", "reasoning_content")


class ChatTemplate:
    """A compiled template.

    Args:
        source: the jinja program.
        special_tokens: variables such as `bos_token` and `eos_token`.
        unix_s: the time that `strftime_now` tells, in seconds since the epoch.

    Raises:
        ModelLoadError: the template is not valid jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], unix_s: Callable[[], float]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._unix_s = unix_s
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelLoadError(
                f"the model's chat template is not valid jinja: {error.message} in line {error.lineno}"
            ) from None

    def at_one_time(self) -> Callable[[Sequence[Mapping[str, Any]]], str]:
        """`render`, with a clock that stands still: equal messages give equal prompts."""
        now_s = self._unix_s()
        return lambda messages: self.render(messages, now_s)

    def render(self, messages: Sequence[Mapping[str, Any]], now_s: float | None = None) -> str:
        """The prompt up to where the assistant's answer begins. `now_s` is the time that it tells; None: the clock's.

        Raises:
            InvalidRequest: the template refuses the messages (a role or an order that the model does not know).
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                strftime_now=_Date(self._unix_s() if now_s is None else now_s),
                **self._special_tokens,
            )
        # A template is a program: what it trips over (a missing key, a wrong role) depends on the messages alone.
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            reason = clipped(" ".join(str(error).split())) or type(error).__name__
            raise InvalidRequest(
                f"messages do not fit the model's chat template: {reason}; change the roles or their order",
                field="messages",
            ) from None


def template_strings(source: str) -> frozenset[str]:
    """The strings that a valid template names in its statements and expressions, such as `'</think>'`."""
    constants = _environment().parse(source).find_all(nodes.Const)
    return frozenset(constant.value for constant in constants if isinstance(constant.value, str))


def select_template(templates: object, *, where: str) -> str | None:
    """The default template of what a model's files hold: a string, a dict, or a list of {"name", "template"}.

    Raises:
        ModelLoadError: several templates and none of them is called "default", or something else altogether.
    """
    if templates is None or isinstance(templates, str):
        return templates
    if isinstance(templates, list):
        try:
            templates = {entry["name"]: entry["template"] for entry in templates}
        except (TypeError, KeyError):
            raise ModelLoadError(f"{where}: chat_template must be a list of objects with name and template") from None
    if not isinstance(templates, dict):
        raise ModelLoadError(f"{where}: chat_template must be a string, not {type(templates).__name__}")
    default = templates.get("default")
    if not isinstance(default, str):
        names = ", ".join(sorted(str(name) for name in templates)) or "none"
        raise ModelLoadError(f"{where}: chat_template has no template called 'default' (it has: {names}); name one so")
    return default


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Checks messages and brings them to the form that templates know: content is a string.

    A list of text parts is joined. Keys whose value is None are left out, as transformers does.

    Raises:
        InvalidRequest: names the place, such as `messages[2].content`.
    """
    if not messages:
        raise InvalidRequest("messages is empty; send at least one message", field="messages")
    return [_plain_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _plain_message(message: object, where: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise _wrong(where, "an object with role and content", message)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise _wrong(f"{where}.role", "a string such as 'user'", role)
    content = message.get("content")
    text = content if isinstance(content, str) else _text_of_parts(content, f"{where}.content")
    others = {key: value for key, value in message.items() if key not in ("role", "content") and value is not None}
    return {"role": role, "content": text, **(_other_texts(others, where) if others else {})}


def _other_texts(others: Mapping[str, Any], where: str) -> dict[str, str]:
    """What a message may have beside role and content."""
    plain: dict[str, str] = {}
    for key, value in others.items():
        if key in _TEXT_KEYS:
            if not isinstance(value, str):
                raise _wrong(f"{where}.{key}", "a string", value)
            plain[key] = value
        elif key in _IGNORED_KEYS:
            if value:  # an answer of ours, sent back, holds these empty
                raise InvalidRequest(
                    f"{where}.{key} is not supported; send the message as text in content", field=f"{where}.{key}"
                )
        else:
            place = f"{where}.{clipped(key)}"
            raise InvalidRequest(
                f"{place} is unknown; a message has role, content, {', '.join(_TEXT_KEYS)}", field=place
            )
    return plain


def _text_of_parts(content: object, where: str) -> str:
    if not isinstance(content, list | tuple):
        raise _wrong(where, "a string or a list of text parts", content)
    texts: list[str] = []
    for index, part in enumerate(content):
        place = f"{where}[{index}]"
        if not isinstance(part, Mapping):
            raise _wrong(place, "an object such as {'type': 'text', 'text': …}", part)
        if part.get("type") != "text":
            raise InvalidRequest(
                f"{place}.type is {shown(part.get('type'))}; this server takes text parts only ('text')",
                field=f"{place}.type",
            )
        if not isinstance(part.get("text"), str):
            raise _wrong(f"{place}.text", "a string", part.get("text"))
        texts.append(part["text"])
    return "".join(texts)


def _wrong(where: str, expected: str, value: object) -> InvalidRequest:
    got = "missing or null" if value is None else f"a {type(value).__name__}"
    return InvalidRequest(f"{where} must be {expected}; it is {got}", field=where)


class _GenerationBlocks(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words for training; in serving it is its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja's interface)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _Namespace(jinja2.utils.Namespace):
    """jinja's `namespace`, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


class _DictFactory:
    """`dict(…)` and `dict.fromkeys(…)` for templates; the type itself would let them out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template may not set {name!r} on a namespace")


class _Date:
    """`strftime_now(…)` of one moment."""

    def __init__(self, unix_s: float) -> None:
        self._unix_s = unix_s

    def __call__(self, form: str) -> str:
        return datetime.fromtimestamp(self._unix_s).strftime(form)


def _environment() -> ImmutableSandboxedEnvironment:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, dict=_DictFactory(), namespace=_Namespace)
    return environment
