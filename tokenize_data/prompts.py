"""A model's chat format: converts conversations to ids for generation and training, and ids to text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenize_data.chat import ChatTemplate
from tokenize_data.encode import Encoded as Encoded  # return type of `documents`
from tokenize_data.encode import Encoder
from tokenize_data.errors import RowError, UserError
from tokenize_data.fields import Conversation, Kind
from tokenize_data.plain import without_template
from tokenize_data.rendered import Message, Rendered, Tools
from tokenize_data.templates import choose_template
from tokenize_data.tokenizer import BaseTokenizer, load_tokenizer

PLAIN = "plain"  # without a template, the model continues the question's text


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """The chat format of one tokenizer. Without a `template`, texts are used as they are."""

    tokenizer: BaseTokenizer
    template: ChatTemplate | None
    is_borrowed: bool = False  # the template is another model's, whose special tokens may be plain text here

    @property
    def description(self) -> str:
        return PLAIN if self.template is None else self.template.name

    def prompt(self, messages: Sequence[Message], kind: Kind = "chat", tools: Tools = None) -> list[int]:
        """The ids after which the model writes: those of transformers' apply_chat_template with
        add_generation_prompt.
        """
        if kind != "chat":
            asked = Conversation(messages=[*messages, {"role": "assistant", "content": ""}], kind=kind)
            return self._ids(without_template(asked, self._bos, "").text)
        if self.template is None:
            return self.plain_prompt("\n\n".join(str(message["content"]) for message in messages))
        return self._ids(self.template.render(messages, True, tools))

    def plain_prompt(self, text: str) -> list[int]:
        """Ids of a text to continue."""
        return self._ids(self._bos + text)

    def documents(self, conversation: Conversation) -> list[Encoded]:
        """A conversation as in training: ids, and which of them are trained."""
        messages = conversation.messages
        if conversation.kind != "chat":
            rendered = [without_template(conversation, self._bos, self._eos)]
        elif self.template is None:
            question = {"role": "user", "content": "\n\n".join(str(message["content"]) for message in messages[:-1])}
            plain = Conversation(messages=[question, messages[-1]], kind="text")
            rendered = [without_template(plain, self._bos, self._eos)]
        else:
            rendered = self.template.documents(messages, conversation.tools)
        return self._encode(rendered)

    def plain_document(self, text: str) -> list[Encoded]:
        return self.documents(Conversation(messages=[{"role": "assistant", "content": text}], kind="text"))

    def text(self, ids: Sequence[int]) -> str:
        decoded: str = self.tokenizer.backend.decode(list(ids), skip_special_tokens=True)
        return decoded

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end what the model writes: the template's end of turn, and EOS."""
        texts = [
            self.template.end_of_turn() if self.template is not None else None,
            self.tokenizer.special("eos_token"),
        ]
        ids = [self.tokenizer.backend.token_to_id(text) for text in texts if text]
        return tuple(dict.fromkeys(number for number in ids if number is not None))

    @cached_property
    def stop_texts(self) -> tuple[str, ...]:
        """Stop texts: the end of turn, if it is not a token of this tokenizer."""
        if self.template is None or not self.is_borrowed or self.template.end_of_turn() is not None:
            return ()
        question = [{"role": "user", "content": "?"}]
        tail = self.template.render([*question, {"role": "assistant", "content": "!"}])[
            len(self.template.render(question, True)) :
        ]
        end = tail.strip().removeprefix("!").strip()
        return (end,) if end else ()

    @property
    def _bos(self) -> str:
        return (self.tokenizer.special("bos_token") or "") if self.tokenizer.adds_bos else ""

    @property
    def _eos(self) -> str:
        return self.tokenizer.special("eos_token") or ""

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer, fast=False)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.backend.encode(text, add_special_tokens=False).ids
        return ids

    def _encode(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        encoded = []
        for document in self._encoder.encode(rendered):
            if isinstance(document, RowError):
                raise document
            encoded.append(document)
        return encoded


def open_format(folder: Path, choice: str = "auto", borrowed: ChatTemplate | None = None) -> ChatFormat:
    """The chat format of a model's folder. `borrowed` is another model's template, used if `auto` finds none."""
    tokenizer = load_tokenizer(str(folder))
    if choice == PLAIN:
        return ChatFormat(tokenizer=tokenizer, template=None)
    if choice == "auto" and tokenizer.chat_template is None and borrowed is not None:
        template = ChatTemplate(
            name=f"{borrowed.name}, of the model it is compared with",
            source=borrowed.source,
            special_tokens={
                name: text for name in borrowed.special_tokens if (text := tokenizer.special(name)) is not None
            },
            special_texts=tokenizer.special_texts(),
        )
        return ChatFormat(tokenizer=tokenizer, template=template, is_borrowed=True)
    template, extended = choose_template(choice, tokenizer)
    if extended.added:
        raise UserError(
            f"{folder} has no chat template, and its vocabulary lacks {' '.join(extended.added)} of template "
            f"'{template.name}', so it was "
            f"not trained on them: choose a --template, or --template {PLAIN} to have it continue the prompt's text"
        )
    return ChatFormat(tokenizer=extended, template=template)
