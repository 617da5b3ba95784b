"""axolotl's input_output: `segments` of text, each with a label that says whether it is trained. Nothing is added: the
segments contain BOS and EOS themselves.
"""

from __future__ import annotations

from tokenize_data import paths
from tokenize_data.errors import RowError, shorten
from tokenize_data.fields import Conversation, Fields
from tokenize_data.formats.interface import RowFormat, all_have
from tokenize_data.json_lines import Row, kind_of


def _read(row: Row, fields: Fields) -> Conversation:
    if "segments" not in row:
        raise paths.missing(row, "segments")
    segments = row["segments"]
    if not isinstance(segments, list) or not segments:
        raise RowError(f"'segments' is {kind_of(segments)}, not a list of objects with 'label' and 'text'")
    pieces = []
    for number, segment in enumerate(segments, 1):
        place = f"'segments' entry {number}"
        if not isinstance(segment, dict) or "text" not in segment:
            raise RowError(f"{place} is {shorten(segment)}, not an object with 'label' and 'text'")
        if not isinstance(segment.get("label"), bool):
            raise RowError(f"{place} has label {shorten(segment.get('label'))}: write true (trained) or false")
        text = fields.checked(segment["text"], f"{place}: 'text'", may_be_empty=True)
        pieces.append({"role": "assistant" if segment["label"] else "user", "content": text})
    if not any(piece["role"] == "assistant" and piece["content"] for piece in pieces):
        raise RowError("no segment has label true and a text, so nothing to learn: set one, or leave the row out")
    return Conversation(messages=pieces, kind="segments")


FORMAT = RowFormat(read=_read, is_like=lambda rows, spec: all_have(rows, "segments"), keys=lambda spec: "segments")
