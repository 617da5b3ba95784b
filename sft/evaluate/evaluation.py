"""Evaluates models on data sets: answers, likelihoods and scores, written to scores.json and predictions.jsonl."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sft.evaluate import answers, scores
from sft.evaluate.answers import Asker
from sft.evaluate.choices import candidates, choices_of
from sft.evaluate.lines import LineStore, Record, as_line, fingerprint
from sft.evaluate.scores import Measure
from tokenize_data.errors import UserError
from tokenize_data.examples import Example, Examples
from tokenize_data.files import open_private
from tokenize_data.prompts import ChatFormat, Encoded

Tell = Callable[..., None]  # (activity, number done, total)
ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One model's predictions: a list per data set, by name."""

    label: str
    model: str
    predictions: dict[str, list[Record]]
    measures: dict[str, list[Measure]] = field(default_factory=dict)


def collect(
    label: str,
    asker: Asker | None,
    groups: Sequence[Examples],
    folder: Path,
    tell: Tell,
    *,
    model: Any = None,
    chat: ChatFormat | None = None,
    seq: int | None = None,
    identity: Any = None,
) -> dict[str, list[Record]]:
    """Ask and score one model. Results that are in `folder` already are reused."""
    found = {}
    for group in groups:
        name = _file_name(f"{label}-{group.name}")
        rows = [_row(label, group.name, example) for example in group.rows]
        if asker is not None:
            _add_answers(
                rows,
                asker,
                group,
                folder / "answers" / f"{name}.jsonl",
                partial(tell, f"{label}: answers, {group.name}"),
            )
        if model is not None and chat is not None:
            told = partial(tell, f"{label}: likelihood, {group.name}", total=len(rows))
            with LineStore(folder / "answers" / f"{name}-likelihood.jsonl", lambda record: str(record["id"])) as store:
                measured = _likelihoods(store, group, model, chat, seq, identity, told)
            for row, record in zip(rows, measured, strict=True):
                row |= {"nll": record["nll"], "answer_tokens": record["tokens"]}
                if record.get("likeliest") is not None:
                    row["scores"]["accuracy_likelihood"] = float(record["likeliest"] == record["right"])
                    row["likeliest"] = record["likeliest"]
        found[group.name] = rows
    return found


def _add_answers(rows: list[Record], asker: Asker, group: Examples, file: Path, tell: Callable[..., None]) -> None:
    asked = [example for example in group.rows if example.text is None]
    with answers.open_store(file) as store:
        told = partial(tell, total=len(asked))
        records = answers.fill(
            store, asker, asked, lambda example, answer: {"answer": answer.text}, told, may_hold_others=True
        )
    for example, record in zip(asked, records, strict=True):
        own = record[answers.OWN_KEY]
        rows[example.number] |= {"answer": record["answer"], "finish": own["finish"], "tokens": own["tokens"]}


def measure_all(label: str, model: str, predictions: dict[str, list[Record]], processes: int = 1) -> Evaluated:
    return Evaluated(
        label=label,
        model=model,
        predictions=predictions,
        measures={name: scores.measures(rows, processes) for name, rows in predictions.items()},
    )


def summary(evaluated: Sequence[Evaluated], base: str | None, facts: dict[str, Any]) -> dict[str, Any]:
    """The content of scores.json: scores with intervals per model and data set and over all data sets, and differences
    from the base.
    """
    models = []
    tables = [_with_all(one) for one in evaluated]
    base_table = next((table for one, table in zip(evaluated, tables, strict=True) if one.label == base), None)
    for one, table in zip(evaluated, tables, strict=True):
        entry: dict[str, Any] = {"label": one.label, "model": one.model, "datasets": {}}
        for name, measured in table.items():
            rows = one.predictions.get(name) or [row for part in one.predictions.values() for row in part]
            entry["datasets"][name] = {
                "rows": len(rows),
                "scores": {key: asdict(scores.score_of(part)) for key, part in measured.items()},
            }
            if base_table is not None and one.label != base:
                others = base_table.get(name, {})
                pairs = {
                    key: scores.difference_of(part, others[key]) for key, part in measured.items() if key in others
                }
                entry["datasets"][name]["differences"] = {
                    key: asdict(found) for key, found in pairs.items() if found is not None
                }
        models.append(entry)
    return {"base": base, "models": models, **facts}


def write_predictions(evaluated: Sequence[Evaluated], path: Path) -> None:
    scratch = path.with_name(f".{path.name}.part")
    try:
        with open_private(scratch) as file:
            for one in evaluated:
                for rows in one.predictions.values():
                    file.writelines(map(as_line, rows))
        scratch.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}: give another --out") from error


def _with_all(one: Evaluated) -> dict[str, dict[str, Measure]]:
    """Measures by data set, and over several data sets those that all have."""
    tables = {name: {part.name: part for part in parts} for name, parts in one.measures.items()}
    if len(tables) > 1:
        shared = [key for key in next(iter(tables.values())) if all(key in table for table in tables.values())]
        tables[ALL] = {key: scores.joined([table[key] for name, table in tables.items()]) for key in shared}
    return tables


def _row(label: str, dataset: str, example: Example) -> Record:
    return {
        "model": label,
        "dataset": dataset,
        "row": example.number,
        "place": example.place,
        "question": example.question,
        "references": list(example.references),
        "answer": None,
        "scores": {},
    }


def _likelihoods(
    store: LineStore,
    group: Examples,
    model: Any,
    chat: ChatFormat,
    seq: int | None,
    identity: Any,
    tell: Callable[[int], None],
) -> list[Record]:
    from sft.evaluate.likelihood import answer_likelihoods, candidate_likelihoods

    choices = choices_of([example.references for example in group.rows if example.references])
    ids = [
        fingerprint(identity, seq, example.number, example.prompt, example.references, example.text)
        for example in group.rows
    ]
    left = [place for place, key in enumerate(ids) if key not in store.records]
    documents: dict[int, list[Encoded]] = {place: _documents(chat, group.rows[place], seq) for place in left}
    flat = [(place, document) for place, parts in documents.items() for document in parts]
    sums = {place: [0.0, 0, len(parts)] for place, parts in documents.items()}
    done = len(ids) - len(left)
    for place in [place for place, parts in documents.items() if not parts]:
        store.add({"id": ids[place], "nll": None, "tokens": 0})  # cut before its answer, which training rejects
    for number, likelihood in answer_likelihoods(model, [document for _, document in flat]):
        place = flat[number][0]
        total = sums[place]
        total[0], total[1], total[2] = total[0] + likelihood.nll, total[1] + likelihood.tokens, total[2] - 1
        if total[2]:
            continue
        record: Record = {"id": ids[place], "nll": total[0], "tokens": total[1]}
        texts = candidates(group.rows[place], choices) if choices else None
        if choices and texts and group.rows[place].references[0].strip() in [text.strip() for text in texts]:
            example = group.rows[place]
            answers_to = [chat.documents(example.answered(text))[-1] for text in texts]
            found = [part.nll for part in candidate_likelihoods(model, answers_to)]
            record |= {"likeliest": texts[found.index(min(found))].strip(), "right": example.references[0].strip()}
        store.add(record)
        done += 1
        tell(done)
    return [store.records[key] for key in ids]


def _documents(chat: ChatFormat, example: Example, seq: int | None) -> list[Encoded]:
    """The rows as documents, cut as in training."""
    if example.text is not None:
        documents = chat.plain_document(example.text)
    elif example.references:
        documents = chat.documents(example.answered(example.references[0]))
    else:
        return []
    cut = [document.cut(seq) if seq is not None and len(document.ids) > seq else document for document in documents]
    return [document for document in cut if document.trained > 0]


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text).strip("._") or "model"
