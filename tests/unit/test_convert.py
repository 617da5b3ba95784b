"""Lines to documents: what becomes of a line does not depend on the lines beside it."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import pair
from tokenize_data.convert import Choice, Converted, Converter
from tokenize_data.dataset import DatasetSpec
from tokenize_data.encode import Encoder
from tokenize_data.records import RowReader
from tokenize_data.sources import Chunk
from tokenize_data.templates import choose_template
from tokenize_data.tokenizer import load_tokenizer

# A past answer is marked, so each turn but the last is a document of its own.
REASONING = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' and not loop.last %}{{ '(past) ' }}{% endif %}{{ message.content + "
    "'<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SEQ = 48
LONG = "why is that so " * 20

TURNS = st.tuples(st.sampled_from(["Is it?", LONG, "Really, <|im_end|>?"]), st.sampled_from(["Yes.", "No, never.", ""]))
LINES = st.one_of(
    st.lists(TURNS, min_size=1, max_size=4).map(
        lambda turns: json.dumps(
            {
                "messages": [
                    {"role": role, "content": text}
                    for turn in turns
                    for role, text in zip(("user", "assistant"), turn, strict=True)
                ]
            }
        ).encode()
    ),
    st.sampled_from(
        [b"{", b"", b"  ", b"\xff{}", b"[1]", json.dumps({"messages": []}).encode(), json.dumps(pair()).encode()]
    ),
)


@pytest.fixture(scope="session")
def converter(smollm2):
    """A converter of conversations; `rows` and `weight` choose among them."""
    template, tokenizer = choose_template(REASONING, load_tokenizer(str(smollm2)))
    encoder = Encoder(tokenizer)
    special = [tokenizer.backend.token_to_id(text) for text in tokenizer.special_texts()]

    @cache
    def make(weight: float = 1.0) -> Converter:
        return Converter(
            readers=[RowReader(DatasetSpec(files=("-",)), "chat")],
            choices=[Choice(weight=weight, threshold=2**63, seed=3)],
            template=template,
            encoder=encoder,
            seq=SEQ,
            id_type=np.dtype(np.uint16),
            bos="",
            bos_id=None,
            eos="<|im_end|>",
            stop_ids=[2],
            special_ids=special,
        )

    return make


def documents(converted: Converted) -> list[tuple[int, list[int], list[tuple[int, int]], int, int]]:
    """(line, ids, runs, trained, cut) of each."""
    c, found, ids, runs = converted, [], 0, 0
    for line, length, number, trained, cut in zip(
        c.lines, c.lengths, c.runs_per_document, c.trained, c.cut, strict=True
    ):
        pairs = list(zip(c.run_lengths[runs : runs + number], c.run_roles[runs : runs + number], strict=True))
        found.append((line, c.ids[ids : ids + length].tolist(), pairs, trained, cut))
        ids, runs = ids + length, runs + number
    return found


def rejects(converted: Converted) -> list[tuple[int, str, bytes]]:
    return [(reject.line, reject.reason, reject.raw) for reject in converted.rejects]


COUNTS = ("read", "accepted", "left_out", "num_injected", "num_open", "num_double_bos", "num_without_bos")


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(lines=st.lists(LINES, min_size=1, max_size=8), weight=st.sampled_from([1.0, 1.0, 0.5, 2.5]))
def test_a_line_gives_the_same_documents_among_others_as_alone(converter, lines, weight):
    convert = converter(weight)
    together = convert(Chunk(0, 1, b"\n".join(lines), 0))
    alone = [convert(Chunk(0, number, line, 0)) for number, line in enumerate(lines, 1)]
    assert documents(together) == [document for part in alone for document in documents(part)]
    assert rejects(together) == [reject for part in alone for reject in rejects(part)]
    for name in COUNTS:
        assert getattr(together, name) == sum(getattr(part, name) for part in alone), name
    assert together.num_role_tokens == np.sum([part.num_role_tokens for part in alone], axis=0).tolist()


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(lines=st.lists(LINES, min_size=1, max_size=6))
def test_counts_are_of_accepted_rows_only(converter, lines):
    """A data set with bad rows has the documents and the counts of one without them."""
    whole = converter()(Chunk(0, 1, b"\n".join(lines), 0))
    bad = {reject.line for reject in whole.rejects}
    good = converter()(
        Chunk(0, 1, b"\n".join(b"" if number in bad else line for number, line in enumerate(lines, 1)), 0)
    )
    assert documents(whole) == documents(good)
    for name in COUNTS[1:]:
        assert getattr(whole, name) == getattr(good, name), name
    assert whole.read == good.read + len(bad)


def test_rejecting_a_row_of_several_documents_leaves_the_next_rows_alone(bench):
    """The first of its two documents has no trained token within --seq."""
    template = bench.write(REASONING, "reasoning.jinja")

    def row(*texts: str) -> dict[str, list[dict[str, str]]]:
        return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]}

    bad, good = row(LONG, "Yes.", "Sure?", "No."), [row(f"Is {n}?", f"It is {n}.", "Sure?", "Yes.") for n in range(3)]
    flags = ("--template", template, "--seq", SEQ)
    assert bench.tokenize("--data", bench.jsonl(good), *flags, run_name="good").code == 0
    assert (
        bench.tokenize(
            "--data", bench.jsonl([bad, *good], "mixed.jsonl"), *flags, "--max_bad_rows", "1", run_name="mixed"
        ).code
        == 0
    )
    expected = [(document["ids"], document["trained"], document["line"] + 1) for document in bench.documents("good")]
    assert [
        (document["ids"], document["trained"], document["line"]) for document in bench.documents("mixed")
    ] == expected
