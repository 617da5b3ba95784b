"""Settings as fields of frozen dataclasses: name, default, help and limits in one place. The data's own settings.

`sft` keeps its other settings the same way (`sft/config`). Flags, recipes, the JSON schema and the manual are all made
from these fields.
"""

from __future__ import annotations

import types
import typing
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from tokenize_data.dataset import FORMATS, QUESTION, RIGHT, SIDES, TRUNCATIONS, DatasetSpec
from tokenize_data.errors import UserError
from tokenize_data.names import check_run_name

_FACTS = {"metavar", "choices", "least", "above", "most", "flag", "recipe", "fixed", "suffix"}


def setting(default: Any, text: str, **facts: Any) -> Any:
    """A field with the facts for flags, recipes and checks: metavar, choices, least, above, most; flag=False without a
    flag, recipe=False if not allowed in recipes; fixed=True if it must not change on resume; suffix=(position,
    label) if values other than the default appear in the run's folder name. The default MISSING makes it required.
    """
    assert facts.keys() <= _FACTS, facts
    metadata = {"text": text, **facts}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


class Group:
    """A group of settings. Its checks read no files."""

    def __post_init__(self) -> None:
        for entry in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            check_value(entry.name, getattr(self, entry.name), entry.metadata)
        self.check()

    def check(self) -> None:
        """Raise UserError if settings contradict each other."""


@dataclass(frozen=True, kw_only=True)
class DataSettings(Group):
    run_name: str = setting(MISSING, "name of the data set: letters, digits, . _ -", metavar="R")
    tokenized_data_dir: str = setting("tokenized", "root folder of the shards", metavar="D")
    data: tuple[str, ...] = setting(
        (),
        "training files: JSONL (.gz, .zst), JSON, CSV, Parquet, a folder or a Hub data set; needed the first time",
        metavar="FILE",
    )
    val: tuple[str, ...] = setting(
        (),
        "validation files, or a share of the training data (5%, 500 rows); become the data set R-val",
        metavar="FILE",
    )
    val_group: str | None = setting(
        None, "key whose rows stay together when --val takes a share, such as patient_id", metavar="K"
    )
    datasets: tuple[DatasetSpec, ...] = setting((), "training data sets, each with its own keys and share", flag=False)
    val_datasets: tuple[DatasetSpec, ...] = setting((), "the same for validation", flag=False)
    samples: int | None = setting(None, "use N rows of --data, drawn with --seed", metavar="N", least=1)
    format: str | None = setting(None, "format of the rows (default: detected from the first rows)", choices=FORMATS)
    question_key: str = setting("prompt", "key of the question, or a path: question.text", metavar="K")
    answer_key: str = setting("gold", "key of the answer, or a path: answers.text[0]", metavar="K")
    system_key: str | None = setting(None, "key of the system message", metavar="K")
    text_key: str = setting("text", "key of plain text rows", metavar="K")
    template: str = setting("auto", "auto, the name of a packaged template, or a Jinja file", metavar="T")
    chat_template_kwargs: str | None = setting(
        None, "values for the template's own switches, as JSON: '{\"enable_thinking\": false}'", metavar="JSON"
    )
    train_on: str = setting(
        "all",
        "assistant turns that are trained: all, last, or those whose `name` is one of NAMES",
        metavar="last|NAMES",
    )
    weight_key: str | None = setting(
        None, "key of a row's weight: 2 takes it twice, 0.5 half of such rows", metavar="K"
    )
    seq: int = setting(
        2048, "longest document in tokens; for longer ones see --truncate", metavar="L", least=2, suffix=(2, "seq")
    )
    truncate: str = setting(
        RIGHT,
        "documents longer than seq: cut at the right, with a shorter question so that the answer stays, or refused",
        choices=TRUNCATIONS,
    )
    truncate_side: str = setting("end", "where --truncate question shortens a text", choices=SIDES)
    max_bad_rows: int = setting(0, "write up to N bad rows to rejected.jsonl instead of stopping", metavar="N", least=0)
    retokenize: bool = setting(False, "rebuild the shards, and replace the old ones at the end")
    append: bool = setting(False, "add the new files of --data to the shards that exist, behind their rows")
    seed: int = setting(1234, "seed for the data order, samples and weights", least=0, fixed=True)

    def check(self) -> None:
        check_run_name(self.run_name)
        for one, other in (("data", "datasets"), ("val", "val_datasets")):
            if getattr(self, one) and getattr(self, other):
                raise UserError(f"--{one} and the recipe's {other} both name the data: give one of them")
        if self.append and self.retokenize:
            raise UserError("--append keeps the shards and --retokenize rebuilds them: give one of them")
        if self.samples is not None and self.datasets:
            raise UserError(
                f"--samples {self.samples} goes with --data: here, give each of the datasets its own 'samples'"
            )

        truncations = [self.truncate, *(spec.truncate for spec in (*self.datasets, *self.val_datasets))]
        if self.truncate_side != "end" and QUESTION not in truncations:
            raise UserError(
                f"--truncate_side {self.truncate_side} is for --truncate question, not --truncate {self.truncate}: add "
                "--truncate question, or leave it out"
            )

    @property
    def has_validation(self) -> bool:
        return bool(self.val or self.val_datasets)


@dataclass(frozen=True, kw_only=True)
class BaseSettings(Group):
    """Which base model, and so which tokenizer."""

    checkpoint: str = setting(
        "baseline", "base model: an entry of checkpoints.toml, or a Hugging Face folder", metavar="NAME"
    )
    size: str | None = setting(None, "size of the entry (default: 7)", metavar="S")
    checkpoints_file: str | None = setting(
        None, "default: ./checkpoints.toml if it exists, else the packaged one", metavar="F"
    )


def plain_type(hint: Any) -> type:
    """int for int | None, tuple for tuple[str, ...], and so on."""
    if isinstance(hint, types.UnionType):
        (hint,) = [part for part in typing.get_args(hint) if part is not type(None)]
    plain: type = typing.get_origin(hint) or hint
    return plain


def fields_of(group: type[Group]) -> tuple[Field[Any], ...]:
    return fields(group)  # type: ignore[arg-type]  # every subclass is a dataclass


def check_value(name: str, value: Any, facts: typing.Mapping[str, Any]) -> None:
    """Raise UserError if a value is not one of the choices, or out of range."""
    if value is None or isinstance(value, bool):
        return
    if facts.get("choices") and value not in facts["choices"]:
        raise UserError(f"--{name} {value}: use one of {', '.join(facts['choices'])}")
    if not isinstance(value, int | float):
        return
    least, above, most = facts.get("least"), facts.get("above"), facts.get("most")
    if value != value or value in (float("inf"), float("-inf")):
        raise UserError(f"--{name} {value} is not a finite number")
    if least is not None and value < least:
        raise UserError(f"--{name} {value} must be at least {least:g}")
    if above is not None and value <= above:
        raise UserError(f"--{name} {value} must be above {above:g}")
    if most is not None and value > most:
        raise UserError(f"--{name} {value} must be at most {most:g}")
