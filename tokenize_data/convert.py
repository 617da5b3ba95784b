"""One chunk of lines to documents: parse, read, render, encode, cut. A pure function of the chunk, run in one process
or in several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np

from tokenize_data.chat import ChatTemplate
from tokenize_data.dataset import QUESTION, REFUSE
from tokenize_data.encode import Encoded, Encoder
from tokenize_data.errors import RowError
from tokenize_data.fields import Conversation
from tokenize_data.json_lines import Row, parse_line
from tokenize_data.plain import without_template
from tokenize_data.records import RowReader
from tokenize_data.rendered import ASSISTANT, ROLE_NAMES, Rendered
from tokenize_data.rows import Unreadable, too_long
from tokenize_data.sources import Chunk
from tokenize_data.split import Part, numbers_of
from tokenize_data.streams import MAX_LINE_BYTES
from tokenize_data.truncate import refuse_long, shortened


@dataclass(frozen=True)
class Reject:
    """A rejected row."""

    line: int
    reason: str
    raw: bytes


@dataclass
class Converted:
    """The documents of a chunk as flat arrays, and the counts of its rows."""

    chunk: Chunk
    read: int = 0
    accepted: int = 0
    left_out: int = 0
    rejects: list[Reject] = field(default_factory=list)
    num_shortened: int = 0  # documents with a shortened question
    num_injected: int = 0  # documents with special tokens in their own texts
    num_open: int = 0  # documents whose last answer does not end with an end of turn
    num_double_bos: int = 0
    num_without_bos: int = 0
    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint16))
    lengths: list[int] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    runs_per_document: list[int] = field(default_factory=list)
    run_lengths: list[int] = field(default_factory=list)
    run_roles: list[int] = field(default_factory=list)
    num_role_tokens: list[int] = field(default_factory=lambda: [0] * len(ROLE_NAMES))


@dataclass(frozen=True)
class Choice:
    """Which rows of a source are taken, and how often. `rows` is None for all. A weight of 2.5 takes each row twice,
    and once more those whose number is at most `threshold`.
    """

    rows: frozenset[int] | None = None
    weight: float = 1.0
    threshold: int = -1
    seed: int = 0
    part: Part | None = None  # the side of a split
    source: int = 0

    def leaves_out(self, line: int, row: Row | None) -> bool:
        """Whether the row is on the other side of a split, which may depend on its content."""
        return self.part is not None and not self.part.has(self.source, line, row)

    def copies(self, line: int) -> int:
        if self.part is not None and not self.part.split.group and self.leaves_out(line, None):
            return 0
        if self.rows is not None:
            return int(line in self.rows)
        whole = int(self.weight)
        if self.weight == whole:
            return whole
        return whole + int(int(numbers_of(self.seed, self.source, [line])[0]) <= self.threshold)


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A parsed row."""

    line: int
    raw: bytes
    copies: int
    conversation: Conversation
    documents: list[Rendered]


@dataclass(frozen=True, kw_only=True)
class _Document:
    """A document within --seq."""

    encoded: Encoded
    num_cut: int  # tokens
    is_shortened: bool  # the question was shortened, instead of a cut at the right
    is_injected: bool  # whether its own texts contain special tokens


def num_copies(weight: float, seed: tuple[int, ...]) -> int:
    """The number of copies; a fraction is the probability of one more."""
    whole = int(weight)
    return whole + int(np.random.default_rng(seed).random() < weight - whole)


class Converter:
    """Turns chunks into documents; each worker process has one."""

    def __init__(
        self,
        *,
        readers: Sequence[RowReader],
        choices: Sequence[Choice],
        template: ChatTemplate,
        encoder: Encoder,
        seq: int,
        id_type: np.dtype,
        bos: str,
        bos_id: int | None,
        eos: str,
        stop_ids: Sequence[int],
        special_ids: Sequence[int],
    ) -> None:
        self._readers = readers
        self._choices = choices
        self._template = template
        self.encoder = encoder
        self._seq = seq
        self._id_type = id_type
        self._bos = bos
        self._bos_id = bos_id
        self._eos = eos
        self._stop_ids = frozenset(stop_ids)
        self._is_special = np.zeros(max([*special_ids, 0]) + 1, dtype=bool)
        self._is_special[list(special_ids)] = True

    def __call__(self, chunk: Chunk) -> Converted:
        result = Converted(replace(chunk, data=b""))  # the lines are not sent back to the writing process
        rows: list[_Row] = []
        for line, row in chunk.rows():
            copies = self._choices[chunk.source].copies(line)
            if copies == 0:
                result.left_out += 1
                continue
            result.read += 1
            if not isinstance(row, Unreadable) and len(row) > MAX_LINE_BYTES:
                row = too_long(len(row))
            if isinstance(row, Unreadable):
                result.rejects.append(Reject(line, row.reason, row.raw))
                continue
            try:
                share, conversation, documents = self._read(row, chunk.source, line)
            except RowError as error:
                result.rejects.append(Reject(line, str(error), row))
                continue
            if share != 1.0:
                copies = num_copies(copies * share, (self._choices[chunk.source].seed, line, 1))
            if copies:
                rows.append(_Row(line=line, raw=row, copies=copies, conversation=conversation, documents=documents))
            else:
                result.read, result.left_out = result.read - 1, result.left_out + 1
        self._encode(rows, result)
        result.rejects.sort(key=lambda reject: reject.line)
        return result

    def render(self, raw: bytes, source: int) -> list[Rendered]:
        """Render the documents of one line."""
        return self._read(raw, source)[2]

    def _read(self, raw: bytes, source: int, line: int | None = None) -> tuple[float, Conversation, list[Rendered]]:
        """Returns (the row's own weight, its conversation, its rendered documents)."""
        reader, row = self._readers[source], parse_line(raw)
        choice = self._choices[source]
        if line is not None and choice.part is not None and choice.part.split.group and choice.leaves_out(line, row):
            return 0.0, Conversation(messages=[]), []
        conversation = reader.conversation(row)
        return reader.share(row), conversation, self._documents(conversation)

    def _documents(self, conversation: Conversation) -> list[Rendered]:
        if conversation.kind != "chat":
            return [without_template(conversation, self._bos, self._eos)]
        return self._template.documents(conversation.messages, conversation.tools)

    def _encode(self, rows: Sequence[_Row], result: Converted) -> None:
        encoded = iter(self.encoder.encode([document for row in rows for document in row.documents]))
        truncation = self._readers[result.chunk.source].truncation
        kept: list[np.ndarray] = []
        for row in rows:
            own = list(islice(encoded, len(row.documents)))  # all of them, even if the first is rejected
            try:
                made = [self._finish(row, number, one, *truncation) for number, one in enumerate(own)]
            except RowError as error:
                result.rejects.append(Reject(row.line, str(error), row.raw))
                continue
            result.accepted += 1
            for finished in made * row.copies:
                document = finished.encoded
                self._look(document, result)
                kept.append(document.ids)
                result.num_injected += finished.is_injected
                result.num_shortened += finished.is_shortened
                result.lengths.append(len(document.ids))
                result.trained.append(document.trained)
                result.cut.append(finished.num_cut)
                result.lines.append(row.line)
                result.runs_per_document.append(len(document.run_lengths))
                result.run_lengths += document.run_lengths
                result.run_roles += document.run_roles
                for length, role in zip(document.run_lengths, document.run_roles, strict=True):
                    result.num_role_tokens[role] += length
        if kept:
            result.ids = np.concatenate(kept).astype(self._id_type)

    def _look(self, document: Encoded, result: Converted) -> None:
        """Count what warnings report."""
        ids, end = document.ids, len(document.ids)
        for length, role in zip(reversed(document.run_lengths), reversed(document.run_roles), strict=True):
            if role == ASSISTANT:
                break
            end -= length
        result.num_open += int(ids[end - 1]) not in self._stop_ids
        if self._bos_id is not None:
            begins = int(ids[0]) == self._bos_id
            result.num_double_bos += begins and len(ids) > 1 and int(ids[1]) == self._bos_id
            result.num_without_bos += not begins and bool(self._bos)

    def _finish(self, row: _Row, number: int, encoded: Encoded | RowError, truncate: str, side: str) -> _Document:
        if isinstance(encoded, RowError):
            raise encoded
        document, length = row.documents[number], len(encoded.ids)
        is_shortened = length > self._seq and truncate == QUESTION
        if truncate == REFUSE:
            refuse_long(length, self._seq)
        if is_shortened:
            document, encoded = shortened(
                row.conversation, length, lambda conversation: self._again(conversation, row, number), self._seq, side
            )
        is_injected = False
        if document.num_special is not None:
            ids = encoded.ids[encoded.ids < len(self._is_special)]
            is_injected = int(self._is_special[ids].sum()) > document.num_special
        if len(encoded.ids) > self._seq:
            encoded = encoded.cut(self._seq)
        if encoded.trained == 0:
            if length > self._seq:
                raise RowError(
                    f"{length:,} tokens, and none of the first {self._seq:,} is trained (the answer begins later): "
                    "raise --seq, or shorten the question (--truncate question)"
                )
            raise RowError(f"{length:,} tokens, and none of them is trained: add an answer, or leave the row out")
        num_cut = length - len(encoded.ids)
        return _Document(encoded=encoded, num_cut=num_cut, is_shortened=is_shortened, is_injected=is_injected)

    def _again(self, conversation: Conversation, row: _Row, number: int) -> tuple[Rendered, Encoded]:
        """The same document of a row, from a changed conversation."""
        documents = self._documents(conversation)
        if len(documents) != len(row.documents):
            raise RowError(
                f"template '{self._template.name}' makes {len(documents)} documents of it with a shorter question, "
                f"not {len(row.documents)}: raise --seq, or leave the row out"
            )
        (encoded,) = self.encoder.encode([documents[number]])
        if isinstance(encoded, RowError):
            raise encoded
        return documents[number], encoded
