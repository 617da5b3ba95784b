"""The report of a run: everything in its folder on one HTML page that needs no network. Several runs can be
overlaid.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sft.config.secrets import masked_value
from sft.config.settings import defaults
from sft.observe import chart
from sft.observe.lengths import bins
from sft.spec import metrics
from sft.spec.run_folder import read_run_toml, read_status, replace_file
from tokenize_data import describe
from tokenize_data.dataset import DatasetSpec
from tokenize_data.errors import UserError
from tokenize_data.reader import ShardReader

SERIES = ("loss", "val_loss", "val_accuracy", "lr", "grad_norm", "tokens_per_second", "fill")
_MOST_POINTS, _NUM_SAMPLES, _MOST_TEXT = 1500, 12, 4000
_ONLY_IN_RECIPES = ("datasets", "val_datasets")
_DEEPEST = 40  # limit for files of other programs in the folder
_PLACEHOLDER = "__REPORT__"


def write_report(folders: Sequence[Path], path: Path) -> None:
    """Write the page atomically."""
    replace_file(path, page(folders))


def page(folders: Sequence[Path], *, is_live: bool = False) -> str:
    template = (resources.files("sft.observe") / "report.html").read_text()
    return template.replace(_PLACEHOLDER, as_json(folders, is_live=is_live).replace("<", "\\u003c"))


def as_json(folders: Sequence[Path], *, is_live: bool = False) -> str:
    """The page's content as JSON. NaN becomes null, and secrets are masked."""
    content = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "live": is_live,
        "runs": [run_facts(folder) for folder in folders],
    }
    return json.dumps(_clean(content), ensure_ascii=False, allow_nan=False)


def run_facts(folder: Path) -> dict[str, Any]:
    """The facts in a run's folder, without what is missing or damaged."""
    table = read_run_toml(folder)
    records = metrics.read(folder / "metrics.jsonl")
    status = read_status(folder)
    if not records and status is None and not table:
        raise UserError(f"{folder} is not a run folder: it has neither run.toml nor metrics.jsonl nor status.json")
    config, resolved = (part if isinstance(part := table.get(name), dict) else {} for name in ("config", "resolved"))
    data = _data(resolved.get("data_folder"))
    evaluation = _evaluation(folder / "evaluation")
    return {
        "name": folder.resolve().name,
        "folder": str(folder),
        "status": status or {},
        "config": config,
        "resolved": resolved,
        "versions": table.get("versions", {}),
        "series": {key: _series(records, key) for key in (*SERIES, *_parts(records))},
        "seconds": sum(metrics.number(record, "seconds") or 0.0 for record in records),
        "tokens": _total(records, "tokens"),
        "trained_tokens": _total(records, "trained_tokens"),
        "data": data.get("facts"),
        "lengths": data.get("lengths"),
        "warnings": [*_warnings(folder, status, records), *data.get("warnings", [])],
        "command": repeat_command(config),
        "recipe": repeat_recipe(config),
        "scores": evaluation.get("scores"),
        "samples": evaluation.get("samples", []),
    }


def repeat_command(config: Mapping[str, Any]) -> str:
    """The command line for these settings: all flags that differ from their defaults."""
    words = ["sft", *(["--config", "recipe.yaml"] if repeat_recipe(config) else [])]
    for name, default in defaults().items():
        if name not in config or name in _ONLY_IN_RECIPES or (value := config[name]) == default:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            words += [
                f"--{name}",
                f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value),
            ]
    return shlex.join(words) if len(words) > 1 else ""


def repeat_recipe(config: Mapping[str, Any]) -> str:
    """The settings without a flag, which are the lists of data sets, as a recipe; empty without any."""
    lists = {
        name: [entry for entry in _listed(config.get(name)) if isinstance(entry, Mapping)] for name in _ONLY_IN_RECIPES
    }
    plain = asdict(DatasetSpec(files=("",)))
    kept = {
        name: [
            {key: value for key, value in entry.items() if key == "files" or value != plain.get(key)}
            for entry in entries
        ]
        for name, entries in lists.items()
        if entries
    }
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True) if kept else ""


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _parts(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of the losses of several validation sets."""
    return [f"val_loss/{name}" for name in chart.parts_of(records)]


def _series(records: Sequence[Mapping[str, Any]], key: str) -> list[list[float]] | None:
    """[iterations, values]; in long runs each point is the mean of several iterations. None without values."""
    iterations, values = chart.series(records, key)
    finite = np.isfinite(values)
    iterations, values = iterations[finite], values[finite]
    if not len(values):
        return None
    size = -(-len(values) // _MOST_POINTS)
    if size > 1:
        starts = np.arange(0, len(values), size)
        values = np.add.reduceat(values, starts) / np.diff(np.append(starts, len(values)))
        iterations = iterations[np.minimum(starts + size - 1, len(iterations) - 1)]
    return [iterations.tolist(), [float(f"{value:.6g}") for value in values]]


def _total(records: Sequence[Mapping[str, Any]], key: str) -> int:
    return int(sum(metrics.number(record, key) or 0.0 for record in records))


def _data(folder: Any) -> dict[str, Any]:
    """Facts about the tokenised data, if it still exists."""
    if not isinstance(folder, str):
        return {}
    try:
        reader = ShardReader(Path(folder))
        lengths = reader.lengths
    except (UserError, OSError):
        return {}
    manifest = reader.manifest
    counts, edges = bins(lengths, 40)
    files = [
        {"name": file["name"], "rows": file["rows"], "sha256": file["sha256"][:12], "format": data_set["format"]}
        for data_set in manifest.datasets
        for file in data_set["files"]
    ]
    facts = {
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "trained_tokens": manifest.trained_tokens,
        "cut": manifest.num_cut,
        "shortened": manifest.num_shortened,
        "template": manifest.template["name"],
        "created": manifest.created,
        "files": files,
        "seq": manifest.seq,
    }
    shown = {
        "counts": counts.tolist(),
        "edges": edges.tolist(),
        "median": float(np.median(lengths)),
        "longest": int(lengths.max()),
    }
    return {"facts": facts, "lengths": shown, "warnings": list(describe.warnings(manifest))}


def _warnings(folder: Path, status: Mapping[str, Any] | None, records: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    if status is not None and status["state"] in ("failed", "preempted"):
        found.append(
            f"{status['state']} after iteration {status['iteration']:,}: {status.get('reason') or 'no reason given'}"
        )
    notes = [(record["iteration"], note) for record in records if isinstance(note := record.get("note"), str)]
    found += [f"iteration {iteration}: {note}" for iteration, note in notes][:50]
    try:
        lines = (folder / "warnings.log").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    return list(dict.fromkeys(found + lines[-50:]))


def _evaluation(folder: Path) -> dict[str, Any]:
    """The results of `sft evaluate` in the run's folder."""
    try:
        scores = json.loads((folder / "scores.json").read_bytes())
        samples = _samples(folder / "predictions.jsonl", [model["label"] for model in scores["models"]])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {"scores": scores, "samples": samples}


def _samples(path: Path, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Rows with all models' answers side by side, spread over the data; rows on which models differ come first."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    with path.open("rb") as file:
        for line in file:
            row = json.loads(line)
            if row.get("answer") is None:
                continue
            entry = rows.setdefault(
                (row["dataset"], row["row"]),
                {
                    "dataset": row["dataset"],
                    "row": row["row"],
                    "question": row["question"],
                    "references": row["references"],
                    "answers": {},
                },
            )
            entry["answers"][row["model"]] = {
                "text": row["answer"],
                "right": bool(row["scores"].get("accuracy", row["scores"].get("exact_match"))),
            }
    entries = list(rows.values())
    entries.sort(key=lambda entry: len({answer["text"] for answer in entry["answers"].values()}) < len(labels))
    differing = sum(len({answer["text"] for answer in entry["answers"].values()}) == len(labels) for entry in entries)
    pool = entries[: max(differing, _NUM_SAMPLES)]
    return pool[:: max(1, len(pool) // _NUM_SAMPLES)][:_NUM_SAMPLES]


def _clean(value: Any, depth: int = 0) -> Any:
    if isinstance(value, str):
        return value[:_MOST_TEXT] + ("…" if len(value) > _MOST_TEXT else "")
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, Mapping | list | tuple) and depth >= _DEEPEST:
        return "…"
    if isinstance(value, Mapping):
        return {
            str(key): _clean(masked_value(part, str(key)) if _is_plain(part) else part, depth + 1)
            for key, part in value.items()
        }
    if isinstance(value, list | tuple):
        return [_clean(masked_value(part) if _is_plain(part) else part, depth + 1) for part in value]
    return value if value is None or isinstance(value, bool | int) else str(value)


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float)
