"""Answers to a data set's questions, from a local model or a server into a file. An interrupted file is resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from sft.evaluate.client import Client, ServerError, in_parallel
from sft.evaluate.decode import LENGTH, STOP, Decoder, Prompt, Sampling, cut_at
from sft.evaluate.lines import LineStore, Record, fingerprint
from sft.evaluate.models import LoadedModel
from tokenize_data.errors import UserError
from tokenize_data.examples import Example
from tokenize_data.prompts import ChatFormat

OWN_KEY = "generation"  # fields beside the answer: which row, and why it ended


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer to one row, and why it ended."""

    number: int
    text: str
    finish: str
    tokens: int


class Asker(Protocol):
    """Something that answers questions: a model in this process, or a server."""

    @property
    def identity(self) -> tuple[Any, ...]:
        """Two askers with equal identities give the same answers."""

    def answers(self, examples: Sequence[Example]) -> Iterator[Answer]:
        """Answers, in the order in which they finish."""


def prompt_ids(chat: ChatFormat, example: Example) -> list[int]:
    if example.text is not None:
        return chat.plain_prompt(example.text)
    return chat.prompt(example.prompt, example.kind, example.tools)


class LocalAsker:
    """Asks a model in this process."""

    def __init__(
        self,
        loaded: LoadedModel,
        sampling: Sampling,
        batch_size: int,
        on_text: Callable[[int, str], None] | None = None,
    ) -> None:
        self._loaded, self._sampling, self._batch_size = loaded, sampling, batch_size
        chat = loaded.format
        self._stops = (*sampling.stop, *chat.stop_texts)
        on_token = (
            (lambda number, ids: on_text(number, cut_at(chat.text(ids), self._stops))) if on_text is not None else None
        )
        self._decoder = Decoder(
            loaded.model, stop_ids=loaded.stop_ids, text_of=chat.text, stop_texts=chat.stop_texts, on_token=on_token
        )

    @property
    def identity(self) -> tuple[Any, ...]:
        chat = self._loaded.format
        source = chat.template.source if chat.template is not None else None
        return (self._loaded.place.fingerprint, source, str(self._loaded.model.dtype), asdict(self._sampling))

    def answers(self, examples: Sequence[Example]) -> Iterator[Answer]:
        prompts = [Prompt(number=example.number, ids=prompt_ids(self._loaded.format, example)) for example in examples]
        for written in self._decoder.write(prompts, self._sampling, self._batch_size):
            text = cut_at(self._loaded.format.text(written.ids), self._stops).strip()
            yield Answer(number=written.number, text=text, finish=written.finish, tokens=len(written.ids))


@dataclass(frozen=True, kw_only=True)
class ServerAsker:
    """Asks a model behind an OpenAI-compatible server. With `chat`, ids of the model's own template are sent; without,
    the messages.
    """

    client: Client
    model: str
    sampling: Sampling
    workers: int
    chat: ChatFormat | None = None
    stop_ids: tuple[int, ...] = ()

    @property
    def identity(self) -> tuple[Any, ...]:
        return (self.client.url, self.model, asdict(self.sampling), self.chat is not None)

    def answers(self, examples: Sequence[Example]) -> Iterator[Answer]:
        for example, answer in in_parallel(self.client, self._answer, examples, self.workers):
            if isinstance(answer, ServerError):
                raise UserError(f"{example.place}: {answer}; run the same command to resume")
            yield answer

    def _answer(self, example: Example) -> Answer:
        sampling = self.sampling
        request: dict[str, Any] = {
            "model": self.model,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
        }
        if sampling.temperature > 0:
            request |= {"top_p": sampling.top_p, "seed": sampling.seed + example.number}
            request |= {"top_k": sampling.top_k} if sampling.top_k else {}
        stops = [*sampling.stop, *(self.chat.stop_texts if self.chat is not None else ())]
        request |= {"stop": stops} if stops else {}
        if self.chat is not None:
            ids = prompt_ids(self.chat, example)
            content = self.client.post("completions", {**request, "prompt": ids, "stop_token_ids": list(self.stop_ids)})
        else:
            messages = list(example.prompt) or [{"role": "user", "content": example.text}]
            content = self.client.post("chat/completions", {**request, "messages": messages})
        try:
            choice = content["choices"][0]
            text = choice["text"] if self.chat is not None else choice["message"]["content"]
            finish = LENGTH if choice.get("finish_reason") == "length" else STOP
            tokens = int((content.get("usage") or {}).get("completion_tokens") or 0)
            return Answer(number=example.number, text=cut_at(text or "", stops).strip(), finish=finish, tokens=tokens)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise ServerError(f"{self.client.url}: the answer has no choices[0] with a text") from error


def model_of_server(client: Client) -> str:
    """The name of a server's only model."""
    try:
        names = [entry["id"] for entry in client.get("models")["data"]]
    except ServerError as error:
        raise UserError(f"{error}: is the server up? Give --server_url http://HOST:PORT/v1") from error
    except (KeyError, TypeError) as error:
        raise UserError(f"{client.url}/models lists no models: name one with --server_model") from error
    if len(names) != 1:
        raise UserError(
            f"{client.url} has {len(names)} models ({', '.join(map(str, names[:5]))}): name one with --server_model"
        )
    return str(names[0])


def row_id(asker: Asker, example: Example) -> str:
    """An id that changes with the question, the model and the way of asking."""
    return fingerprint(asker.identity, example.prompt, example.text)


def open_store(path: Any) -> LineStore:
    return LineStore(path, lambda record: f"{record[OWN_KEY]['row']}:{record[OWN_KEY]['id']}")


def fill(
    store: LineStore,
    asker: Asker,
    examples: Sequence[Example],
    record_of: Callable[[Example, Answer], Record],
    tell: Callable[[int], None] = lambda done: None,
    may_hold_others: bool = False,
) -> list[Record]:
    """Ask what the file does not answer yet. Returns one record per example, in order. The file then holds exactly
    these records; with `may_hold_others` they are only appended.
    """
    ids = {example.number: row_id(asker, example) for example in examples}
    keys = {f"{number}:{name}": number for number, name in ids.items()}
    foreign = [key for key in store.records if key not in keys]
    if foreign and not may_hold_others:
        raise UserError(
            f"{store.path} holds {len(foreign):,} answers to other questions, or of another model or setting: "
            "give another path, or remove it"
        )
    left = [example for example in examples if f"{example.number}:{ids[example.number]}" not in store.records]
    by_number = {example.number: example for example in examples}
    done = len(examples) - len(left)
    tell(done)
    for answer in asker.answers(left):
        own = {"row": answer.number, "id": ids[answer.number], "finish": answer.finish, "tokens": answer.tokens}
        store.add({**record_of(by_number[answer.number], answer), OWN_KEY: own})
        done += 1
        tell(done)
    ordered = [store.records[f"{example.number}:{ids[example.number]}"] for example in examples]
    if left and not may_hold_others:
        store.replace(ordered)
    return ordered
