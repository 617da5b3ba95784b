"""The Python API: what the commands do, as functions. `import sft` shows these names, and imports this file when one of
them is used.

Settings have the flags' names and Python values. Output goes to the terminal as with the commands; what ends a
command with an exit code is an exception.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from tokenize_data import errors
from tokenize_data.errors import UserError

__all__ = ["FailedError", "Run", "UserError", "fine_tune", "load_run", "plan", "tokenize"]
Files: TypeAlias = "str | Path | Sequence[str | Path]"


class FailedError(Exception):
    """A valid request that failed: a command would have ended with `exit_code`, 3 or 75.

    It is not a `UserError`: callers can tell a mistake of theirs from a failure that may be retried.

    Example:
        try:
            run = sft.fine_tune(checkpoint="models/smollm2", run_name="orders", data=["train.jsonl"])
        except sft.FailedError as error:
            requeue = error.exit_code == 75  # stopped by a signal, after saving
    """

    def __init__(self, message: str, exit_code: int = errors.EXIT_FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Run:
    """A run's folder, and what is in it. Every property is read from the files when it is asked for.

    Example:
        run = sft.load_run("checkpoints/llama-smollm2-orders")
        print(run.status["state"], run.metrics[-1]["loss"])
    """

    folder: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """`metrics.jsonl`: one record per iteration, with `iteration`, `loss`, `lr`, and `val_loss` where validated."""
        from sft.spec import metrics

        with _api_errors():
            return metrics.read(self.folder / "metrics.jsonl")

    @property
    def status(self) -> dict[str, Any]:
        """`status.json`: `state`, `iteration`, `iterations`, `reason`. `state` is `unknown` where there is none."""
        from sft.spec.run_folder import is_finished, read_status

        state = "finished" if is_finished(self.folder) else "unknown"
        return read_status(self.folder) or {"state": state, "iteration": 0, "iterations": 0, "reason": ""}

    def model(self, **options: Any) -> Any:
        """The trained model, by transformers' `from_pretrained`, which gets the `options`, such as `dtype` and
        `device_map`. Of a LoRA run it is the base with the adapter, a PeftModel.

        Example:
            model = run.model(dtype="bfloat16")
        """
        from transformers import AutoModelForCausalLM

        from sft.evaluate.models import with_adapter
        from tokenize_data.tokenizer import load_tokenizer

        with _api_errors():
            place = self._result()
            model = AutoModelForCausalLM.from_pretrained(place.folder, **options)
            if place.adapter is None:
                return model
            return with_adapter(model, place.adapter, load_tokenizer(str(place.tokenizer_folder)).vocabulary_size)

    def tokenizer(self, **options: Any) -> Any:
        """The trained model's tokenizer with its chat template, by transformers' `from_pretrained`.

        Example:
            ids = run.tokenizer().apply_chat_template([{"role": "user", "content": "How is it?"}])
        """
        from transformers import AutoTokenizer

        with _api_errors():
            return AutoTokenizer.from_pretrained(self._result().tokenizer_folder, **options)

    def evaluate(self, data: Files | None = None, **settings: Any) -> dict[str, Any]:
        """What `sft evaluate` of this folder computes and writes into `scores.json`. Settings are that command's flags.

        Example:
            scores = run.evaluate(data=["test.jsonl"], compare="base", max_tokens=64)
            print(scores["models"][-1]["datasets"]["test"]["scores"]["exact_match"]["value"])
        """
        import warnings

        from sft.commands import evaluate
        from tokenize_data.flags import words_of

        with _api_errors(), warnings.catch_warnings():  # the command has filters of its own
            parser = errors.RaisingParser(prog="sft evaluate", allow_abbrev=False)
            evaluate.add_flags(parser)
            argv = [str(self.folder), *words_of({"data": data, **settings})]
            arguments = parser.parse(argv)
            arguments.argv = argv
            return evaluate.evaluate(arguments)

    def _result(self) -> Any:
        """The place of the model or adapter."""
        from sft.evaluate.models import find_model
        from sft.spec.run_folder import result_of

        if result_of(self.folder) is None:
            raise UserError(
                f"{self.folder} has no model, its state is {self.status['state']}: let it finish, or make one of its "
                f"newest checkpoint with sft export {self.folder}"
            )
        return find_model(str(self.folder))


def fine_tune(
    *, checkpoint: str | Path | None = None, run_name: str | None = None, data: Files | None = None, **settings: Any
) -> Run:
    """Fine-tune, as `sft train` does: on one process or many, again to resume. Settings are its flags.

    Example:
        run = sft.fine_tune(checkpoint="models/smollm2", run_name="orders", data=["train.jsonl"], lr=1e-4)

    A run that is finished already is returned as it is. Raises `UserError` where a setting, the data or the base is
    wrong, and `FailedError` where training failed, or was stopped by a signal after saving.
    """
    with _api_errors():
        from sft.launcher import from_python
        from sft.resolve.settings import settings_from
        from sft.spec.exit_codes import EXIT_FINISHED, EXIT_OK, EXIT_USER_ERROR

        given = {"checkpoint": checkpoint, "run_name": run_name, "data": data, **settings}
        ended = from_python.fine_tune(settings_from(given, "fine_tune()"))
        if ended.code in (EXIT_OK, EXIT_FINISHED) and ended.folder is not None:
            return Run(ended.folder.absolute())
        if ended.code == EXIT_USER_ERROR:
            raise UserError(ended.reason)
        raise FailedError(ended.reason, ended.code)


def load_run(folder: str | Path) -> Run:
    """The run in a folder, whatever its state.

    Example:
        run = sft.load_run("checkpoints/llama-smollm2-orders")
    """
    from sft.observe.runs import is_run

    path = Path(folder).expanduser()
    if not is_run(path):
        raise UserError(f"{path} is not a run's folder: give one with a run.toml, such as `sft runs` lists")
    return Run(path.absolute())


def tokenize(
    *, run_name: str | None = None, data: Files | None = None, checkpoint: str | Path | None = None, **settings: Any
) -> dict[str, Any]:
    """Tokenise data sets once, as `tokenize_data` does, and return the manifest: `documents`, `tokens`, `rows`, ...
    `folder` is where it is, and `validation` the manifest of the validation data, or None.

    Example:
        facts = sft.tokenize(run_name="orders", data=["train.jsonl"], val="5%", checkpoint="models/smollm2")
        print(facts["documents"], facts["validation"]["documents"])
    """
    with _api_errors():
        from tokenize_data import cli
        from tokenize_data.flags import words_of

        words = words_of({"run_name": run_name, "data": data, "checkpoint": checkpoint, **settings})
        asked, _ = cli.settings_of(cli.make_parser(errors.RaisingParser).parse(words))
        _run_data_stage(words)
        facts = _manifest(asked.tokenized_data_dir, asked.run_name)
        name = f"{asked.run_name}-val"
        return facts | {"validation": _manifest(asked.tokenized_data_dir, name) if asked.has_validation else None}


def plan(*, explain: bool = False, **settings: Any) -> dict[str, Any]:
    """What `sft plan --json` prints: `iterations`, `tp`, `pp`, `dp`, `memory`, ... Nothing is started.

    Example:
        facts = sft.plan(checkpoint="meta-llama/Llama-3.1-8B", gpu="h100-80gb", nproc_per_node=8, iters=100)
    """
    with _api_errors():
        import json

        from sft.commands import plan as command
        from sft.resolve.settings import settings_from

        asked = settings_from(settings, "plan()", "plan", run_name="plan")
        answer: dict[str, Any] = json.loads(json.dumps(command.answer(asked, explains=explain)))
        return answer


def _run_data_stage(words: Sequence[str]) -> None:
    """In a process of its own: it forks, which a program with threads should not."""
    from sft.resolve.data_stage import run_program

    with tempfile.TemporaryDirectory(prefix="sft-") as scratch:
        file = Path(scratch, "error")
        code = run_program([sys.executable, "-m", "tokenize_data", *words], file)
        reason = file.read_text() if file.exists() else f"the data stage ended with exit code {code}: see its output"
    if code == errors.EXIT_USER_ERROR:
        raise UserError(reason)
    if code != errors.EXIT_OK:
        raise FailedError(reason)


def _manifest(root: str, name: str) -> dict[str, Any]:
    from dataclasses import asdict

    from tokenize_data.manifest import dataset_folder, read

    folder = dataset_folder(Path(root), name)
    found = read(folder)
    assert found is not None, folder
    return {"folder": str(folder.absolute()), **asdict(found)}


@contextmanager
def _api_errors() -> Iterator[None]:
    """What a command would end with as an exception that callers know."""
    try:
        yield
    except errors.FailedError as error:
        raise FailedError(str(error)) from error
    except (UserError, FailedError):
        raise
    except Exception as error:
        raise FailedError(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}") from error
