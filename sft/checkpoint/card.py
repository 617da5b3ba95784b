"""Writes the model card for the Hub: model, data, metrics, loss curve and recipe."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_SHOWN = (
    ("val_loss", "validation loss", "{:.4f}"),
    ("val_perplexity", "perplexity", "{:,.2f}"),
    ("val_accuracy", "accuracy of answer tokens", "{:.1%}"),
    ("loss", "training loss", "{:.4f}"),
    ("iterations", "iterations", "{:,}"),
    ("seconds", "seconds", "{:,.0f}"),
)


def card(run: Path, model_id: str, *, is_adapter: bool, has_curve: bool) -> str:
    """The README.md of a run's model, from the exported training.json, the shards' manifest and recipe.yaml."""
    facts = _read(run / ("adapter" if is_adapter else "hf") / "training.json")
    base = str(facts.get("base", ""))
    head = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sft", *(["lora"] if is_adapter else [])],
    }
    if _HUB_ID.fullmatch(base) and not Path(base).exists():
        head["base_model"] = base
    kind = "An adapter for" if is_adapter else "Fine-tuned from"
    parts = [
        "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in head.items()) + "---",
        f"# {model_id.split('/')[-1]}",
        f"{kind} `{_last(base)}` on the data set `{facts.get('run_name', run.name)}`, with sft.",
        _results(facts.get("result", {})),
        _data(facts),
        "## Curve\n\n![training and validation loss](loss.png)" if has_curve else "",
        _use(model_id, is_adapter),
        _recipe(run),
        _versions(facts.get("versions", {})),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _results(result: Mapping[str, Any]) -> str:
    rows = [(name, text.format(result[key])) for key, name, text in _SHOWN if isinstance(result.get(key), int | float)]
    return "## Result\n\n" + _table(("", ""), rows) if rows else ""


def _data(facts: Mapping[str, Any]) -> str:
    folder = Path(str(facts.get("resolved", {}).get("data_folder", "")))
    rows = []
    for part, where in (("training", folder), ("validation", folder.with_name(f"{folder.name}-val"))):
        if part == "validation" and not any(facts.get("config", {}).get(key) for key in ("val", "val_datasets")):
            continue
        for entry in _read(where / "manifest.json").get("datasets", []):
            files = ", ".join(_last(file["name"]) for file in entry["files"])
            rows.append(
                (
                    part,
                    entry["name"] or _last(files),
                    files,
                    entry["format"],
                    f"{sum(file['rows'] for file in entry['files']):,}",
                )
            )
    mask = facts.get("config", {}).get("loss_mask", 0.0)
    loss = (
        "the answers alone"
        if not mask
        else "everything"
        if mask == 1
        else f"the answers, and questions at a weight of {mask:g}"
    )
    return (
        "## Data\n\n" + _table(("", "data set", "files", "format", "rows"), rows) + f"\n\nLearnt was {loss}."
        if rows
        else ""
    )


def _use(model_id: str, is_adapter: bool) -> str:
    load = (
        f'from peft import AutoPeftModelForCausalLM\n\nmodel = AutoPeftModelForCausalLM.from_pretrained("{model_id}")'
        if is_adapter
        else "from transformers import AutoModelForCausalLM, AutoTokenizer\n\nmodel = "
        f'AutoModelForCausalLM.from_pretrained("{model_id}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{model_id}")'
    )
    return f"## Use\n\n```python\n{load}\n```"


def _recipe(run: Path) -> str:
    file = run / "recipe.yaml"
    return f"## Recipe\n\n```yaml\n{file.read_text().strip()}\n```" if file.exists() else ""


def _versions(versions: Mapping[str, str]) -> str:
    return f"Made with {', '.join(f'{name} {version}' for name, version in versions.items())}." if versions else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _last(text: str) -> str:
    """Keep only the file's name: local paths are private."""
    return text if _HUB_ID.fullmatch(text) and not Path(text).exists() else Path(text).name


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
