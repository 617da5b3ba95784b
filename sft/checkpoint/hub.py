"""Uploads a run's model and its card to the Hub in one commit. A failed upload can be repeated; the run is not
changed.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path

from sft.checkpoint.card import card
from sft.spec.run_folder import replace_file
from tokenize_data.errors import UserError

RECORD = "hub.json"
_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def check_hub(model_id: str) -> None:
    """Check before training that the name is valid and a token exists."""
    from huggingface_hub import get_token

    if not _ID.fullmatch(model_id):
        raise UserError(f"--push_to_hub {model_id!r} cannot be the name of a model: use owner/name")
    if get_token() is None:
        raise UserError(f"--push_to_hub {model_id} needs a token: `hf auth login`, or HF_TOKEN in the environment")


def is_pushed(run: Path, model_id: str) -> bool:
    try:
        return bool(json.loads((run / RECORD).read_text())["asked"] == model_id)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def model_folder(run: Path) -> Path:
    """The folder of the exported model or adapter."""
    return run / "hf" if (run / "hf").is_dir() or not (run / "adapter").is_dir() else run / "adapter"


def push(run: Path, folder: Path, model_id: str, *, public: bool, say: Callable[[str], None]) -> None:
    """Upload `folder`, the model of `run`. A UserError says why it failed and how to try again."""
    check_hub(model_id)
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import disable_progress_bars

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # errors are reported once, below
    disable_progress_bars()
    curve, recipe = run / "loss.png", run / "recipe.yaml"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            api = HfApi()
            url = api.create_repo(model_id, exist_ok=True, private=not public)
            files: dict[str, Path | bytes] = {
                str(file.relative_to(folder)): file
                for file in sorted(folder.rglob("*"))
                if file.is_file() and file.name != "README.md"
            }
            files |= {file.name: file for file in (curve, recipe) if file.exists()}
            text = card(run, url.repo_id, is_adapter=folder.name == "adapter", has_curve=curve.exists())
            operations = [
                CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
                for name, content in {**files, "README.md": text.encode("utf-8", "backslashreplace")}.items()
            ]
            done = api.create_commit(url.repo_id, operations, commit_message=f"Model of {run.resolve().name}")
    except Exception as error:  # many kinds: no network, no permission, a full account
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{folder} could not be uploaded as {model_id} ({reason}): the model stays there; try again with "
            f"`sft export {run} --push_to_hub {model_id}`"
        ) from error
    replace_file(
        run / RECORD,
        json.dumps({"asked": model_id, "id": url.repo_id, "url": str(url), "commit": done.oid}, indent=2) + "\n",
    )
    say(f"uploaded  {url}")
