"""Shows documents as the model sees them, and statistics of a data set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from tokenize_data import describe
from tokenize_data.manifest import Manifest
from tokenize_data.reader import Document, ShardReader
from tokenize_data.rendered import ASSISTANT, ROLE_NAMES, TEMPLATE

TRAINED_STYLE, MASKED_STYLE, TEMPLATE_STYLE = "bold green", "red", "dim cyan"


def legend() -> Text:
    text = Text("trained", TRAINED_STYLE)
    text.append("  masked", MASKED_STYLE)
    return text.append("  template", TEMPLATE_STYLE)


def heading(reader: ShardReader, number: int) -> Rule:
    file, line = reader.place(number)
    where = "" if reader.cut_at_right[number] else " from the question"
    cut = f", {reader.cut[number]:,} tokens cut{where}" if reader.cut[number] else ""
    title = (
        f"document {number}: {reader.lengths[number]:,} tokens, {reader.trained[number]:,} trained{cut}  "
        f"({Path(file).name} {line})"
    )
    return Rule(title, align="left", style="dim")


def pieces(document: Document, backend: Tokenizer) -> Iterator[tuple[str, int]]:
    """(text, role) of each run of tokens, decoded together so that no character is split."""
    ids = document.ids.tolist()
    decoded, at = "", 0
    for length, role in zip(document.run_lengths.tolist(), document.run_roles.tolist(), strict=True):
        at += length
        until = backend.decode(ids[:at], skip_special_tokens=False)
        whole = until.startswith(decoded)
        yield (
            until[len(decoded) :] if whole else backend.decode(ids[at - length : at], skip_special_tokens=False),
            role,
        )
        decoded = until


def coloured(document: Document, backend: Tokenizer) -> Text:
    """The document's text, coloured by role."""
    text = Text()
    for piece, role in pieces(document, backend):
        text.append(piece, TRAINED_STYLE if role == ASSISTANT else TEMPLATE_STYLE if role == TEMPLATE else MASKED_STYLE)
    return text


def manifest_table(manifest: Manifest, folder: Path) -> RenderableType:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = manifest.rows
    share = manifest.trained_tokens / max(manifest.tokens, 1)
    table.add_row("data set", str(folder))
    table.add_row("made", manifest.created)
    for dataset in manifest.datasets:
        files = ", ".join(f"{file['name']} ({file['rows']:,} rows)" for file in dataset["files"])
        table.add_row(f"from ({dataset['format']})", files)
    table.add_row("rows", f"{rows['read']:,} read = {rows['accepted']:,} accepted + {rows['rejected']:,} rejected")
    for reason, count in manifest.rejected_reasons.items():
        table.add_row("", f"  {count:,} rejected: {reason}")
    table.add_row("documents", f"{manifest.documents:,}, {manifest.num_cut:,} cut at {manifest.seq:,} tokens")
    if manifest.num_shortened:
        table.add_row("", f"  {describe.shortened(manifest)}")
    table.add_row("tokens", f"{manifest.tokens:,}, {manifest.trained_tokens:,} trained ({share:.1%})")
    for role in ROLE_NAMES:
        count = manifest.role_tokens[role]
        table.add_row(f"  {role}", f"{count:,} ({count / max(manifest.tokens, 1):.1%})")
    tokenizer = manifest.tokenizer
    added = f", added: {' '.join(tokenizer['added'])}" if tokenizer["added"] else ""
    table.add_row(
        "tokenizer", f"{tokenizer['vocabulary_size']:,} tokens, fingerprint {tokenizer['fingerprint'][:16]}{added}"
    )
    table.add_row("template", f"{manifest.template['name']}, fingerprint {manifest.template['fingerprint'][:16]}")
    return Group(Rule("data set", align="left", style="dim"), table)
