"""Uploads the result after training, and reports a run that has already finished."""

from __future__ import annotations

import sys

from rich.console import Console

from sft.checkpoint import hub
from sft.spec import run_folder
from sft.spec.exit_codes import EXIT_FINISHED, EXIT_OK
from sft.spec.run import RunSpec
from tokenize_data.errors import UserError


def code_if_finished(spec: RunSpec) -> int | None:
    """The exit code for a finished run, None if it is not finished. Retries a failed upload."""
    if not run_folder.is_finished(spec.folder):
        return None
    output = spec.settings.output
    if output.push_to_hub is not None and not hub.is_pushed(spec.folder, output.push_to_hub):
        _push(spec, output.push_to_hub)
        return EXIT_OK
    what = "model" if spec.result_folder.name == "hf" else "adapter"
    sys.stderr.write(
        f"sft train: this run is finished: its {what} is in {spec.result_folder}; --id NAME repeats it from scratch\n"
    )
    return EXIT_FINISHED


def published(spec: RunSpec, code: int) -> int:
    """Upload after training. A failed upload is only a warning; the same command retries it."""
    if code == EXIT_OK and spec.settings.output.push_to_hub is not None:
        try:
            _push(spec, spec.settings.output.push_to_hub)
        except UserError as error:
            sys.stderr.write(f"sft train: warning: {error}\n")
    return code


def _push(spec: RunSpec, model_id: str) -> None:
    say = Console(highlight=False).print
    public = spec.settings.output.hub_public
    hub.push(spec.folder, hub.model_folder(spec.folder), model_id, public=public, say=say)
