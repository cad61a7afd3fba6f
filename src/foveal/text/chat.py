"""Chat templates: messages to the text that a chat-tuned model was trained on.

A checkpoint carries its template as Jinja source, in `chat_template.jinja` or in
`tokenizer_config.json`. It comes from strangers, so it runs in Jinja's immutable sandbox and sees
plain JSON data only. What a template may use is what `transformers` offers it: loop controls,
`raise_exception`, `strftime_now`, a `tojson` that leaves characters as they are, and
`{% generation %}` blocks.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from foveal.core.errors import LoadError, RequestError
from foveal.text.declared import read_declared, read_json

Message = Mapping[str, Any]
"""One turn: `role` ("system", "user", "assistant", "tool"), `content`, and what else the template
reads, such as `tool_calls`."""

_REMEDY = (
    "this model has no chat template, so it was probably not trained to chat. Use a chat-tuned "
    "checkpoint, put its chat_template.jinja into the model's directory, or give the text of the "
    "prompt yourself (`foveal generate`, LLM.generate)"
)


class ChatTemplate:
    """The templates of one checkpoint."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """`sources` are Jinja texts by name: "default", perhaps "tool_use" and others.
        `special_tokens` (`bos_token`, ...) are variables of the template."""
        self._sources = dict(sources)
        self._special_tokens = dict(special_tokens)

    def __bool__(self) -> bool:
        """Whether there is any template."""
        return bool(self._sources)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of the conversation, ready to be encoded without further special tokens.

        `tools` and `documents` are handed to the template as they are; `variables` are further
        ones that it may know, such as `enable_thinking`. Raises `RequestError` if there is no
        template, or if it refuses the messages, breaks, or tries what the sandbox forbids.
        """
        if not messages:
            raise RequestError("messages: got none; accepted: at least one")
        template = self._compile("tool_use" if tools else "default")
        given = {
            **self._special_tokens,
            "messages": [{k: v for k, v in m.items() if v is not None} for m in messages],
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
            **(variables or {}),
        }
        try:
            return template.render(json.loads(json.dumps(given)))
        except SecurityError as error:
            raise RequestError(f"the chat template tried what is not safe: {error}") from error
        except TemplateError as error:
            raise RequestError(f"the chat template refused the messages: {error}") from error
        except Exception as error:  # Python errors of the template's own making
            raise RequestError(f"the chat template failed: {error}") from error

    def _compile(self, preferred: str) -> Template:
        name = preferred if preferred in self._sources else "default"
        if not self._sources:
            raise RequestError(_REMEDY)
        if name not in self._sources:
            names = ", ".join(self._sources)
            raise RequestError(f"the model has no default chat template, only: {names}")
        try:
            return _compile(self._sources[name])
        except TemplateError as error:
            raise RequestError(f"the chat template is not valid Jinja: {error}") from error


def load_chat_template(directory: Path | str) -> ChatTemplate:
    """The template of a checkpoint; empty (and false) if it has none. Raises `LoadError`."""
    root = Path(directory)
    return ChatTemplate(_read_sources(root), read_declared(root).named)


def _read_sources(root: Path) -> dict[str, str]:
    """Files come before the entry in `tokenizer_config.json`, as in `transformers`."""
    files = {path.stem: path for path in (root / "additional_chat_templates").glob("*.jinja")}
    if (root / "chat_template.jinja").is_file():
        files["default"] = root / "chat_template.jinja"
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    entry = read_json(root / "tokenizer_config.json").get("chat_template")
    match entry:
        case None:
            return {}
        case str():
            return {"default": entry}
        case list():
            return {str(one["name"]): str(one["template"]) for one in entry}
    got = type(entry).__name__
    raise LoadError(f"{root / 'tokenizer_config.json'}: chat_template is a {got}; expected text")


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks what the model wrote, for training; it
    renders as what is inside."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=32)
def _compile(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
    )
    environment.filters["tojson"] = _to_json
    functions: dict[str, Callable[[str], str]] = {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    environment.globals.update(functions)
    return environment.from_string(source)


def _refuse(message: str) -> str:
    raise TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` escapes characters for HTML, which models have never seen."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
