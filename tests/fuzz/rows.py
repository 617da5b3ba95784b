"""Lines of a .jsonl file, as every format. A row is refused with a reason, or becomes documents whose parts add up."""

from __future__ import annotations

import contextlib
import json

from tests.real_parts import smollm2_tokenizer
from tokenize_data.columns import Columns
from tokenize_data.dataset import FORMATS, Cleaning, DatasetSpec
from tokenize_data.errors import RowError, UserError
from tokenize_data.json_lines import parse_line
from tokenize_data.prompts import open_format
from tokenize_data.records import RowReader, recognise

_ROWS = [
    {"prompt": "Is it?", "gold": "Yes."},
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a"},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {"role": "assistant", "content": "a", "tool_calls": []},
        ]
    },
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "日本\u0301"}]},
    {"instruction": "do", "input": "x", "output": "y"},
    {"text": "plain <|im_end|>\n"},
    {"prompt": "q", "completion": " a"},
    {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
    {"segments": [{"label": False, "text": "q"}, {"label": True, "text": "a"}]},
    {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "reasoning_content": "so", "content": "a", "weight": 1},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    },
    {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f"}'}]},
    {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '[{"name": "f"}, {"name": 1}]'},
        ]
    },
    {"q": "a?", "below": "", "a": "b", "h": [["x", "y"], ["z", None]], "s": "be brief", "t": "[]"},
    {
        "d": [
            {"who": "p", "says": "q"},
            {"who": "c", "says": "{}"},
            {"who": "r", "says": "1"},
            {"who": "b", "says": "a"},
        ]
    },
]
SEEDS = [bytes([n]) + json.dumps(row).encode() for n, row in enumerate(_ROWS)]
SEEDS += [bytes([2 * len(FORMATS) + n]) + json.dumps(row).encode() for n in range(6) for row in _ROWS[-2:]]
SEEDS += [
    b"\x00" + line
    for line in (
        b"{}",
        b"[1]",
        b'{"prompt": NaN}',
        b'{"prompt": "\\ud800", "gold": ""}',
        b'{"prompt": 1e999}{"gold": 0}',
    )
]
_SPECS = [
    DatasetSpec(files=("x",), format=name, **more)
    for name in FORMATS
    for more in (
        {},
        {
            "system": "{prompt}!",
            "prompt": "{{{prompt}}} {gold}",
            "clean": Cleaning(drop=r"[^a-z\s]", lower=True, strip=True),
        },
    )
]
_SPECS += [
    DatasetSpec(files=("x",), columns=Columns(**columns), train_on=train_on)
    for columns in (
        {"prompt": "q", "query": "below", "response": "a", "history": "h", "system": "s", "tools": "t"},
        {
            "formatting": "sharegpt",
            "messages": "d",
            "role_tag": "who",
            "content_tag": "says",
            "user_tag": "p",
            "assistant_tag": "b",
            "function_tag": "c",
            "observation_tag": "r",
            "tools": "t",
        },
    )
    for train_on in ("all", "last", "b, c")
]
_CHAT = open_format(smollm2_tokenizer())

PREFIX = 1  # bytes before the JSON


def one(data: bytes) -> None:
    spec, line = _SPECS[data[0] % len(_SPECS) if data else 0], data[1:].replace(b"\n", b" ")
    try:
        row = parse_line(line)
        recognise([row], DatasetSpec(files=("x",)))
        reader = RowReader(spec, recognise([row], spec))
        conversation = reader.conversation(row)
        documents = _CHAT.documents(conversation)
    except RowError as error:
        assert len(str(error)) < 2000, len(str(error))
        return
    except UserError:
        raise AssertionError("a row is refused as a row") from None
    assert documents
    for document in documents:
        assert sum(document.run_lengths) == len(document.ids)
        assert len(document.run_lengths) == len(document.run_roles)
    with contextlib.suppress(RowError):
        again = _CHAT.documents(conversation)
        assert [d.ids.tolist() for d in again] == [d.ids.tolist() for d in documents]
