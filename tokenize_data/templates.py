"""Chooses the template for a tokenizer: its own, a packaged one, or a Jinja file, with the tokens that it needs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from tokenize_data.chat import ChatTemplate
from tokenize_data.errors import UserError, shorten
from tokenize_data.tokenizer import BaseTokenizer
from tokenize_data.tokenizer_files import read_template

MEGATRON_TOKENS = ("<|im_start|>", "<|im_end|>")
OWN = "the tokenizer's own"
_NAME = re.compile(r"[A-Za-z_]\w*")
_MARKER = re.compile(r"<\|[^|<>\s]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_(?:turn|image|text)>|</?s>|<(?:bos|eos)>")


def choose_template(
    choice: str, tokenizer: BaseTokenizer, values: Mapping[str, Any] | None = None
) -> tuple[ChatTemplate, BaseTokenizer]:
    """The template that `--template` means for this tokenizer, and the tokenizer with the tokens that it needs.

    `values` for its switches become defaults in its source: the exported model is asked as it was trained.
    """
    name, source = _find_source(choice, tokenizer)
    source = "".join(_default(key, value, name, source) for key, value in (values or {}).items()) + source
    if name == "megatron":
        tokenizer = tokenizer.extended(MEGATRON_TOKENS)
        if tokenizer.adds_bos:
            source = "{{- bos_token -}}\n" + source
    specials = {
        k: v for k in ("bos_token", "eos_token", "unk_token", "pad_token") if (v := tokenizer.special(k)) is not None
    }
    template = ChatTemplate(name=name, source=source, special_tokens=specials, special_texts=tokenizer.special_texts())
    template.check()
    markers = _markers(template)
    if name != OWN:
        _refuse_torn(name, [marker for marker in markers if not tokenizer.finds(marker)], tokenizer)
    whole = {token.content for token in tokenizer.backend.get_added_tokens_decoder().values()}
    if more := whole.intersection(markers) - template.special_texts:  # added tokens that are not special
        template = replace(template, special_texts=template.special_texts | more)
    return template, tokenizer


def template_values(text: str | None) -> dict[str, Any]:
    """The value of --chat_template_kwargs."""
    if not text:
        return {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"--chat_template_kwargs {shorten(text)} is not JSON ({shorten(error, 60)}): write an object such as "
            "'{\"enable_thinking\": false}'"
        ) from error
    if not isinstance(values, dict) or not all(_NAME.fullmatch(key) for key in values):
        raise UserError(f"--chat_template_kwargs {shorten(text)} is not an object whose keys are variable names")
    return values


def _default(key: str, value: Any, name: str, source: str) -> str:
    """A line of Jinja that sets a variable's default."""
    if not re.search(rf"\b{key}\b", source):
        raise UserError(f"--chat_template_kwargs {key}: template '{name}' has no such variable: leave it out")
    literal = {None: "none", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else None
    literal = literal or json.dumps(value, ensure_ascii=False)
    return f"{{%- if {key} is not defined %}}{{% set {key} = {literal} %}}{{% endif -%}}"


def _refuse_torn(name: str, torn: Sequence[str], tokenizer: BaseTokenizer) -> None:
    """Refuse markers that the tokenizer splits: they would be trained letter by letter."""
    if not torn:
        return
    known = [marker for marker in torn if tokenizer.backend.token_to_id(marker) is not None]
    lacking = [marker for marker in torn if marker not in known]
    reasons = [f"lacks: {' '.join(lacking)}"] if lacking else []
    reasons += [f"takes apart, though its vocabulary has them: {' '.join(known)}"] if known else []
    raise UserError(
        f"template '{name}' needs special tokens that the tokenizer {', or '.join(reasons)}; list them as add_tokens = "
        f"{json.dumps(torn)} in the model's entry of checkpoints.toml, or use another --template"
    )


def packaged_templates() -> list[str]:
    return sorted(file.name.removesuffix(".jinja") for file in (resources.files("tokenize_data") / "jinja").iterdir())


def _find_source(choice: str, tokenizer: BaseTokenizer) -> tuple[str, str]:
    if choice == "auto":
        if tokenizer.chat_template is not None:
            return OWN, tokenizer.chat_template
        choice = "megatron"
    if "{{" in choice or "{%" in choice:  # a recipe's own text
        return "the recipe's own", choice
    if choice in packaged_templates():
        return choice, (resources.files("tokenize_data") / "jinja" / f"{choice}.jinja").read_text()
    try:
        return choice, read_template(Path(choice))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        names = ", ".join(packaged_templates())
        raise UserError(
            f"--template {choice}: {reason}: give auto, one of {names}, or the path of a Jinja file"
        ) from error


def _markers(template: ChatTemplate) -> list[str]:
    """Texts in the template's own output that look like special tokens."""
    question = [{"role": "user", "content": "?"}]
    text = template.render(question, True) + template.render([*question, {"role": "assistant", "content": "!"}])
    return list(dict.fromkeys(_MARKER.findall(text)))
