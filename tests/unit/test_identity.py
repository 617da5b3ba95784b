"""A run's folder is its own: another run that has the same name for it is refused before anything is read or trained
there.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sft.config.settings import Settings
from sft.launcher import launch, torchrun
from sft.resolve import identity
from sft.resolve.naming import run_folder as folder_of
from sft.spec.run_folder import write_run_toml
from tokenize_data.errors import UserError

BASE, DATA = "b" * 64, "d" * 64


def job_of(root: Path, is_entry: bool = False, base: str = BASE, data: str = DATA, **values: Any) -> Any:
    settings = Settings.of(**{"run_name": "a", "checkpoint": "my/base", "save_checkpoint_dir": str(root), **values})
    facts = {
        "base_fingerprint": base,
        "data": data,
        "iterations": settings.schedule.iters or 9,
        "tp": settings.layout.tp or 1,
    }
    return SimpleNamespace(
        asked=settings, settings=settings, folder=folder_of(settings, "llama", is_entry), facts=lambda: facts
    )


def leave(job: Any, *, checkpoint: bool = True, folder: Path | None = None, **changes: Any) -> None:
    """What a run writes when it starts, and a checkpoint."""
    config = {key: value for key, value in {**job.settings.as_json(), **changes}.items() if value != "gone"}
    folder = folder or job.folder
    folder.mkdir(parents=True)
    write_run_toml(folder, config=config, resolved=job.facts(), versions={})
    if checkpoint:
        (folder / "step-0000800").mkdir()


COLLISIONS = {
    "epochs": ({"run_name": "a-ep5"}, {"epochs": 5.0}, "run_name a-ep5 and epochs 3.0", "run_name a and epochs 5.0"),
    "seq": ({"run_name": "a-seq64"}, {"seq": 64}, "run_name a-seq64 and seq 2048", "run_name a and seq 64"),
    "loss": (
        {"run_name": "a-loss0.5"},
        {"loss_mask": 0.5},
        "run_name a-loss0.5 and loss_mask 0.0",
        "run_name a and loss_mask 0.5",
    ),
    "lora": ({"run_name": "a-lora8"}, {"lora": 8}, "run_name a-lora8 and lora none", "run_name a and lora 8"),
    "id": ({"run_name": "a-x"}, {"id": "x"}, "run_name a-x and id none", "run_name a and id x"),
    "early release": (
        {"run_name": "a-it0000800"},
        {"intermediate_iter": 800},
        "run_name a-it0000800 and intermediate_iter none",
        "run_name a and intermediate_iter 800",
    ),
    "id and suffix": ({"id": "ep5"}, {"epochs": 5.0}, "epochs 3.0 and id ep5", "epochs 5.0 and id none"),
    "base's name": (
        {"checkpoint": "x-y", "run_name": "z"},
        {"checkpoint": "x", "run_name": "y-z"},
        "checkpoint x-y and run_name z",
        "checkpoint x and run_name y-z",
    ),
    "size": (
        {"size": "7", "checkpoint": "8-b"},
        {"size": "7-8", "checkpoint": "b"},
        "checkpoint 8-b and size 7",
        "checkpoint b and size 7-8",
    ),
}


@pytest.mark.parametrize("name", COLLISIONS)
def test_two_runs_of_one_name(tmp_path: Path, name: str):
    first, second, was, now = COLLISIONS[name]
    one, other = job_of(tmp_path, **first), job_of(tmp_path, **second)
    assert one.folder == other.folder
    leave(one, checkpoint=False)
    identity.refuse_another(one)
    message = (
        f"{one.folder} belongs to another run: it was made with {was}, this run has {now}: use the same, or start "
        "another run with --id"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        identity.refuse_another(other)


@pytest.mark.parametrize(("what", "label"), [("base", "base"), ("data", "data")])
def test_another_base_or_other_data(tmp_path: Path, what: str, label: str):
    one, other = job_of(tmp_path), job_of(tmp_path, **{what: "e" * 64})
    leave(one)
    mine = BASE if what == "base" else DATA
    with pytest.raises(
        UserError,
        match=re.escape(f"made with {label} {mine[:16]}..., this run has {label} eeeeeeeeeeeeeeee...: use the same"),
    ):
        identity.refuse_another(other)


def test_a_finished_run_is_refused_too(tmp_path: Path):
    one = job_of(tmp_path)
    leave(one, checkpoint=False)
    identity.refuse_another(
        job_of(tmp_path, data="e" * 64)
    )  # nothing was made of the other data: there is nothing to mix up
    (one.folder / "hf").mkdir()
    with pytest.raises(UserError, match="belongs to another run"):
        identity.refuse_another(job_of(tmp_path, data="e" * 64))


@pytest.mark.parametrize(
    "values",
    [
        {"iters": 20},
        {"tp": 2, "pp": 2, "micro_batch": 4},
        {"save_interval": 5, "eval_interval": 7, "keep": 9},
        {"lr": 1e-3},
        {"nodes": 2, "port": 7000},
        {"checkpoint": "moved/base"},
        {"max_restarts": 3, "hang_timeout": 9.0},
        {"val": ("v.jsonl",)},
    ],
)
def test_what_may_change(tmp_path: Path, values: dict[str, Any]):
    leave(job_of(tmp_path))
    identity.refuse_another(job_of(tmp_path, **values))


def test_runs_of_the_release_before_go_on(tmp_path: Path):
    """They lack settings that came later; a run.toml may be missing, or damaged."""
    one = job_of(tmp_path)
    leave(one, lora="gone", id="gone", loss_mask="gone", size="gone")
    identity.refuse_another(one)
    for content in (
        b"",
        b"\xff",
        b"config = 3\nresolved = 4\n",
        b"[config]\nepochs = 'many'\nrun_name = 3\n[resolved]\n",
    ):
        (one.folder / "run.toml").write_bytes(content)
        identity.refuse_another(one)
    (one.folder / "run.toml").unlink()
    identity.refuse_another(one)
    identity.refuse_another(job_of(tmp_path / "nothing"))


def test_a_size_that_is_the_default_may_be_typed(tmp_path: Path):
    leave(job_of(tmp_path, is_entry=True))
    identity.refuse_another(job_of(tmp_path, is_entry=True, size="7"))


def test_a_folder_that_was_copied_goes_on(tmp_path: Path):
    one, other = job_of(tmp_path), job_of(tmp_path, id="copy")
    leave(one, folder=other.folder)
    identity.refuse_another(other)
    with pytest.raises(UserError, match="other"):
        identity.refuse_another(job_of(tmp_path, id="copy", data="other"))


def test_the_launcher_looks_before_it_says_that_a_run_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one, other = job_of(tmp_path, run_name="a-ep5"), job_of(tmp_path, epochs=5.0)
    leave(one)
    (one.folder / "hf").mkdir()
    for name in ("find_base_model", "tokenise"):
        monkeypatch.setattr(launch, name, lambda *_: None)
    monkeypatch.setattr(launch, "resolve", lambda *_, **__: other)
    with pytest.raises(UserError, match="belongs to another run"):
        launch._decide(other.settings)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    store = SimpleNamespace(wait=lambda *_: None, get=lambda _: b'{"run": {}}')
    monkeypatch.setattr(torchrun.importlib, "import_module", lambda _: SimpleNamespace(connect=lambda _: store))
    monkeypatch.setattr(torchrun.RunSpec, "from_json", lambda *_: other)
    monkeypatch.setattr(torchrun, "local_copy", lambda spec, _: spec)
    with pytest.raises(UserError, match="belongs to another run"):
        launch.run(other.settings, [])
