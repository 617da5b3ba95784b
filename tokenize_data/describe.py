"""A short summary of a finished data set, and warnings."""

from __future__ import annotations

from pathlib import Path

from tokenize_data.manifest import Manifest

MANY_CUT = 0.02


def summary(manifest: Manifest, folder: Path, is_new: bool = True) -> list[str]:
    """A few lines: rows, documents, tokens, and the folder of new data."""
    rows = manifest.rows
    lines = [f"{rows['read']:,} rows read = {rows['accepted']:,} accepted + {rows['rejected']:,} rejected"]
    if rows["left_out"]:
        lines[0] += f"; {rows['left_out']:,} more left out by samples or weight"
    if rows["rejected"]:
        lines.append(f"rejected rows with their reasons: {folder / 'rejected.jsonl'}")
    share = manifest.trained_tokens / max(manifest.tokens, 1)
    lines.append(
        f"{manifest.documents:,} documents, {manifest.tokens:,} tokens, {manifest.trained_tokens:,} trained "
        f"({share:.1%}), "
        f"{manifest.num_cut:,} cut at {manifest.seq:,} tokens"
    )
    if manifest.num_shortened:
        lines.append(f"{shortened(manifest)}, so that they fit into {manifest.seq:,} tokens with their answers")
    return [*lines, f"written to {folder} in {manifest.seconds:.1f} s"] if is_new else lines


def shortened(manifest: Manifest) -> str:
    """The number of documents that --truncate question shortened."""
    return f"{manifest.num_shortened:,} documents with a shortened question"


def warnings(manifest: Manifest) -> list[str]:
    """Warnings to read before training on this data."""
    found = []
    if manifest.num_cut > MANY_CUT * manifest.documents:
        share = manifest.num_cut / manifest.documents
        of_all = f"{manifest.num_cut:,} of {manifest.documents:,} documents ({share:.1%})"
        found.append(f"{of_all} were cut at {manifest.seq:,} tokens: raise --seq, or see --truncate")
    if manifest.num_open:
        found.append(
            f"the end of turn is not trained in {manifest.num_open:,} of {manifest.documents:,} documents: a model "
            "tuned on them may not "
            "stop; raise --seq if they were cut, or use a template that ends turns with a special token"
        )
    if manifest.num_double_bos:
        found.append(
            f"BOS is doubled in {manifest.num_double_bos:,} documents: the template and the text both begin with "
            "it; remove one"
        )
    if manifest.num_without_bos:
        found.append(
            f"{manifest.num_without_bos:,} documents do not begin with BOS, which this tokenizer puts before every text"
        )
    if manifest.num_with_special_text:
        found.append(
            f"{manifest.num_with_special_text:,} documents have special tokens within their own texts, which the "
            "model will take for real "
            "ones: clean them if that is not meant"
        )
    return found
