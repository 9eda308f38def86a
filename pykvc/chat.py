"""The prompt of a chat: the Jinja template that a model brings, rendered as transformers renders it.

    chat.prompt(model, [{"role": "user", "content": "Hi"}])  ->  what Qwen2.5 was trained to see:

    <|im_start|>system
    You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>
    <|im_start|>user
    Hi<|im_end|>
    <|im_start|>assistant

A GGUF holds the template as tokenizer.chat_template, and variants of it as tokenizer.chat_template.NAME.
"""
import json
from datetime import datetime
from functools import lru_cache
from typing import Any, Mapping, Sequence

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from . import _core

Message = dict[str, Any]  # role, content, and what else the template reads: tool_calls, reasoning_content ...
Tool = dict[str, Any]     # {"type": "function", "function": {"name", "description", "parameters"}}

KEY = "tokenizer.chat_template"


# -- a model's chat ----------------------------------------------------------------------------------------------------

def templates(model: "_core.Model") -> dict[str, str]:
    """The model's templates by their names; the main one is "default"."""
    named = {key[len(KEY):]: text for key, text in model.meta.items() if key.startswith(KEY)}
    return {name[1:] or "default": text for name, text in named.items() if name[:1] in ("", ".")}


def template_of(model: "_core.Model", tools: Sequence[Tool] | None = None) -> str:
    """The template for a chat: "tool_use" where there are tools and the model has it, else "default".

    ValueError: the model has none."""
    named = templates(model)
    found = (tools and named.get("tool_use")) or named.get("default")
    if not found:
        others = f", but variants of one ({', '.join(sorted(named))}): choose one with chat_template=" if named else \
            ": give one with chat_template=, or generate() from a prompt of your own"
        raise ValueError(f"this model has no chat template{others}")
    return found


def prompt(model: "_core.Model", messages: Sequence[Message], template: str | None = None, *,
           tools: Sequence[Tool] | None = None, enable_thinking: bool | None = None, add_generation_prompt: bool = True,
           variables: Mapping[str, Any] | None = None) -> str:
    """The text to tokenize, with BOS added and special tokens read as such.

    template: instead of the model's own. The rest: as render().
    Where the tokenizer puts BOS first, the template's own is left out, so that there is one, as llama-server has it."""
    own = template_of(model, tools) if template is None else template
    bos, eos = token_text(model, model.bos), token_text(model, model.eos)
    text = render(own, messages, tools=tools, enable_thinking=enable_thinking,
                  add_generation_prompt=add_generation_prompt,
                  variables={"bos_token": bos, "eos_token": eos, **(variables or {})})
    return text.removeprefix(bos) if model.add_bos else text


def token_text(model: "_core.Model", token: int) -> str:
    """What templates know as bos_token or eos_token; "" where the model has none (-1)."""
    return model.piece(token, True).decode("utf-8", "replace") if token >= 0 else ""


def turn_end(model: "_core.Model | str | None", template: str | None = None) -> str:
    """What stands between the end of a user's words and the beginning of the answer.

    Qwen2.5's is "<|im_end|>\\n<|im_start|>assistant\\n". Thinking is off, so Qwen3's ends with an empty thought.
    model: a model, or a template, whose bos_token and eos_token are then "". "\\n" for a model without a template.
    ValueError: the template refuses a single user's message, or does not write it as it is.
    Source: kvpress, KVzipPress.prepare and KVPressTextGenerationPipeline.preprocess."""
    context, separator = "dummy context", "\n" + "#"*len("dummy context")
    messages = [{"role": "user", "content": context + separator}]
    if isinstance(model, str):
        text = render(model, messages, enable_thinking=False)
    elif model is None or not (template or templates(model)):
        return "\n"
    else:
        text = prompt(model, messages, template, enable_thinking=False)
    _, found, after = text.partition(separator)
    if not found or separator in after:
        raise ValueError("the chat template does not write a user's words once and as they are, so nobody can tell "
                         "where they end")
    return after


def continued(text: str, messages: Sequence[Message]) -> str:
    """A rendered chat, cut where the last message's content ends, for the model to go on from.

    Source: transformers, continue_final_message. ValueError: the content is not in the text."""
    content = messages[-1].get("content") or ""
    at = text.rfind(content.strip()) if content.strip() else -1
    if at < 0:
        raise ValueError("the last message's content is not in the prompt as it is, so the answer cannot go on from it")
    kept = content.lstrip() if text.startswith(content.lstrip(), at) else content.strip()
    return text[:at + len(kept)]


# -- a template --------------------------------------------------------------------------------------------------------

def render(template: str, messages: Sequence[Message], *, tools: Sequence[Tool] | None = None,
           enable_thinking: bool | None = None, add_generation_prompt: bool = True,
           variables: Mapping[str, Any] | None = None) -> str:
    """The text of a chat as the template writes it.

    enable_thinking None: what the template does by itself. add_generation_prompt: end with the beginning of an answer.
    variables: what else the template reads (documents, reasoning_effort ...). bos_token, eos_token: "" if not given.
    ValueError: messages, tools or the template are not as they have to be, or the template refuses the messages."""
    given = {"documents": None, "bos_token": "", "eos_token": "", **(variables or {})}
    if taken := sorted({"messages", "tools", "add_generation_prompt"} & set(given)):
        raise ValueError(f"{taken[0]} is no further variable of a chat template: it is an argument of its own")
    if enable_thinking is not None:
        if not isinstance(enable_thinking, bool):
            raise ValueError(f"enable_thinking is True, False or None, not {enable_thinking!r}")
        given["enable_thinking"] = enable_thinking
    compiled, checked, offered = _compiled(template), as_text(messages, template), _check_tools(tools)
    given |= {"tools": offered, "add_generation_prompt": add_generation_prompt}
    try:
        return _rendered(compiled, checked, given)
    except _Refusal as error:
        raise ValueError(f"the chat template refuses these messages: {error}") from None
    except Exception as error:  # it is a program, and can go wrong in any way
        raise ValueError(f"the chat template cannot render these messages: {type(error).__name__}: {error}") from None


def _rendered(compiled: jinja2.Template, messages: list[Message], given: dict[str, Any]) -> str:
    """A message of tool_calls alone has an empty content where the template cannot do without one."""
    try:
        return compiled.render(messages=messages, **given)
    except jinja2.UndefinedError:
        if all("content" in message for message in messages):
            raise
        return compiled.render(messages=[{"content": "", **message} for message in messages], **given)


def as_text(messages: Sequence[Message], template: str) -> list[Message]:
    """check_messages(), and lists of parts as one text, a part a line, where the template does not take lists; as
    llama-server has it. ValueError: a part is no text."""
    checked = check_messages(messages)
    of_parts = [i for i, message in enumerate(checked) if isinstance(message.get("content"), list)]
    for i in of_parts if of_parts and not _takes_parts(template) else []:
        checked[i] = {**checked[i], "content": _text_of(checked[i]["content"], i)}
    return checked


def _text_of(parts: list[Any], i: int) -> str:
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f'message {i} has a part that is not {{"type": "text", "text": ...}}, and the chat '
                             f"template takes text alone: {part!r}")
    return "\n".join(part["text"] for part in parts)


@lru_cache(64)
def _takes_parts(template: str) -> bool:
    """Does it write a part's text, and not the list as Python prints it?"""
    given = dict(tools=None, documents=None, bos_token="", eos_token="", add_generation_prompt=False)
    message = {"role": "user", "content": [{"type": "text", "text": "\ue000"}]}
    try:
        text = _compiled(template).render(messages=[message], **given)
    except Exception:  # it is a program, and can go wrong in any way
        return False
    return "\ue000" in text and '"type"' not in text


def check_messages(messages: Sequence[Message]) -> list[Message]:
    """Without what is None in them, which templates take for a text. ValueError names the message that is none."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError('messages is a list of {"role": ..., "content": ...}, both strings, and not empty')
    return [_check_message(message, i) for i, message in enumerate(messages)]


def _check_message(message: Message, i: int) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f'message {i} is no {{"role": ..., "content": ...}}, both strings: {message!r}')
    content = message.get("content")
    if not isinstance(content, (str, list)) and not (content is None and message.get("tool_calls")):
        raise ValueError(f"message {i} ({message['role']}) has no content that is a string, or a list of parts; "
                         "only a message with tool_calls needs none")
    return {key: value for key, value in message.items() if value is not None}


def _check_tools(tools: Sequence[Tool] | None) -> list[Tool] | None:
    if tools is None or isinstance(tools, (list, tuple)) and all(isinstance(tool, dict) for tool in tools):
        return list(tools or ()) or None
    raise ValueError('tools is a list of {"type": "function", "function": {"name": ..., "description": ..., '
                     '"parameters": ...}}')


# -- Jinja, as in transformers/utils/chat_template_utils.py ------------------------------------------------------------

class _Refusal(jinja2.TemplateError):
    """raise_exception() of a template."""


class _Generation(Extension):
    """{% generation %}, which marks an answer for training: what is inside."""
    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Any) -> str:
        return caller()


def _raise_exception(message: str) -> None:
    raise _Refusal(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_JINJA = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
_JINJA.filters["tojson"] = _tojson
_JINJA.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)


@lru_cache(64)
def _compiled(template: str) -> jinja2.Template:
    if not isinstance(template, str) or not ("{{" in template or "{%" in template):
        raise ValueError(f"a chat template is Jinja, with {{{{ }}}} or {{% %}} in it, not {template!r}")
    try:
        return _JINJA.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not Jinja: {error.message} (line {error.lineno})") from None
