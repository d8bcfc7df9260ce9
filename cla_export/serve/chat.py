"""Chat templates: messages to one prompt.

A template comes with a model and is code that nobody here wrote: it runs in jinja2's sandbox.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cla_export.errors import BadInput

if TYPE_CHECKING:
    from jinja2 import Template


class TemplateRefused(BadInput):
    """The template does not take these messages; the message is its own."""


class ChatTemplate:
    """A template and the special tokens that it may name; BadInput if it cannot be read."""

    def __init__(self, text: str, tokens: Mapping[str, str], where: str = "chat template") -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_refuse, strftime_now=_now)
        try:
            self._template: Template = environment.from_string(text)
        except TemplateError as error:
            raise BadInput(f"{where}: not a template that jinja2 reads ({error})") from error
        self._tokens = dict(tokens)

    def render(self, messages: Sequence[Mapping[str, object]]) -> str:
        """The prompt, which ends where the answer begins; TemplateRefused if there is none."""
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=True, tools=None, **self._tokens
            )
        except TemplateRefused:
            raise
        except Exception as error:  # a template is code: it may raise whatever it likes
            raise TemplateRefused(f"the chat template failed on these messages: {error}") from error


def find_template(folder: Path, file: Path | None = None) -> ChatTemplate | None:
    """The template in a file, or a bundle's own; None if it has none."""
    config = _json(folder / "tokenizer_config.json")
    tokens = {
        name: token["content"] if isinstance(token, dict) else str(token)
        for name, token in config.items()
        if name.endswith("_token") and token is not None and not isinstance(token, bool)
    }
    path = file or folder / "chat_template.jinja"
    if path.is_file():
        return ChatTemplate(path.read_text(encoding="utf-8"), tokens, str(path))
    if file is not None:
        raise BadInput(f"{file}: no such file; expected a chat template in jinja2's language")
    text = config.get("chat_template")
    if isinstance(text, list):  # several by name
        text = next((entry["template"] for entry in text if entry["name"] == "default"), None)
    return None if text is None else ChatTemplate(text, tokens, str(folder))


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise TemplateRefused(message)


def _now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)
