"""Inputs that would run a program or leave their folder, and secrets that would be written down. None is executed, none
is found.
"""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from sft.checkpoint import manifest
from tests.distributed.site import Site
from tests.faults.rows import CANARIES, FLAGS, RUN, WHOLE, Field, Row
from tests.faults.waiting import HANG_SECONDS

SMALL = ("pickle named model.safetensors", "manifest that points outside", "YAML tag")
REFUSED, RUNS = (2, 3), (0,)


@dataclass(frozen=True)
class Lair:
    """A folder with a base model of its own, and the file that whatever is executed there makes."""

    site: Site
    folder: Path

    @property
    def canary(self) -> Path:
        return self.folder / "executed"

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def run(self) -> Path:
        """A run that was not finished, with two checkpoints."""
        whole = self.site.root / "checkpoints" / f"{RUN}-whole{WHOLE}"
        folder = self.folder / "checkpoints" / RUN
        if not folder.exists():
            shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("hf"))
        return folder

    @property
    def step(self) -> Path:
        return max(self.run.glob("step-*"))

    def pickle(self) -> bytes:
        return pickle.dumps(_Bomb(str(self.canary)))

    def code(self, name: str) -> None:
        (self.base / name).write_text(f"from pathlib import Path\nPath({str(self.canary)!r}).touch()\n")

    def change(self, name: str, **values: object) -> None:
        file = self.base / name
        content = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**content, **values}))

    def reseal(self, **values: object) -> None:
        """A manifest that is whole in itself: its SHA-256 is no signature."""
        content = json.loads((self.step / "manifest.json").read_text())
        content.pop("sha256"), content.pop("format")
        for record in content["files"]:
            if (file := self.step / record["name"]).exists():
                record |= {"bytes": file.stat().st_size, "sha256": sha256(file.read_bytes()).hexdigest()}
        manifest.write_manifest(self.step, {**content, **values})


class _Bomb:
    def __init__(self, canary: str) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self._canary, "w")


Case = tuple[
    Callable[[Lair], list[str] | None], tuple[int, ...]
]  # what is put there, and further flags; exit codes that are right


def _weights(name: str) -> Callable[[Lair], None]:
    def put(lair: Lair) -> None:
        (lair.base / "model.safetensors").unlink()
        (lair.base / name).write_bytes(lair.pickle())

    return put


def _header(content: bytes, size: int | None = None) -> Callable[[Lair], None]:
    def put(lair: Lair) -> None:
        with (lair.base / "model.safetensors").open("wb") as file:
            file.write((len(content) if size is None else size).to_bytes(8, "little") + content)
            file.truncate(2**42 if size is not None and size < 2**42 else None)

    return put


def _pickled_fragment(lair: Lair) -> None:
    next(lair.step.glob("*.safetensors")).write_bytes(lair.pickle())
    lair.reseal()


def _stray_pickle(lair: Lair) -> None:
    for name in ("optimizer.pt", "mp_rank_00_model_states.pt", "pytorch_model.bin"):
        (lair.step / name).write_bytes(lair.pickle())


def _outside(lair: Lair) -> None:
    (lair.folder / "x").write_bytes(lair.pickle())
    lair.reseal(files=[{"name": "../../../x", "bytes": 1, "sha256": "0"}])
    for step in lair.run.glob("step-*"):
        if step != lair.step:
            shutil.rmtree(step)


def _linked_step(lair: Lair) -> None:
    elsewhere = lair.folder / "elsewhere"
    for step in list(lair.run.glob("step-*")):
        shutil.move(step, elsewhere / step.name)
        step.symlink_to(elsewhere / step.name)


def _linked_file(lair: Lair) -> None:
    for step in lair.run.glob("step-*"):
        file = next(step.glob("*.safetensors"))
        shutil.move(file, lair.folder / f"{step.name}-{file.name}")
        file.symlink_to(lair.folder / f"{step.name}-{file.name}")


def _own_model(lair: Lair) -> None:
    lair.change("config.json", model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    lair.code("own.py")


def _own_tokenizer(lair: Lair) -> list[str]:
    lair.change("tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": ["own.T", "own.T"]})
    lair.code("own.py")
    (lair.base / "tokenizer.json").rename(lair.base / "vocab.json")
    return ["--data", str(lair.site.root / "train.jsonl"), "--retokenize"]


def _template(lair: Lair) -> list[str]:
    text = "{{ cycler.__init__.__globals__.os.system('touch " + str(lair.canary) + "') }}{{ messages[0].content }}"
    (lair.base / "chat_template.jinja").write_text(text)
    return ["--data", str(lair.site.root / "train.jsonl"), "--retokenize"]


def _yaml(lair: Lair) -> list[str]:
    (lair.folder / "recipe.yaml").write_text(f"datasets: !!python/object/apply:os.system ['touch {lair.canary}']\n")
    return [
        "tokenize_data",
        "--checkpoint",
        str(lair.base),
        "--run_name",
        "r",
        "--config",
        str(lair.folder / "recipe.yaml"),
    ]


def _recipe(content: str) -> Callable[[Lair], list[str]]:
    def put(lair: Lair) -> list[str]:
        (lair.folder / "recipe.yaml").write_text(content.replace("CANARY", str(lair.canary)))
        return ["--config", str(lair.folder / "recipe.yaml")]

    return put


_BOMB = "a: &a [x]\n" + "".join(
    f"{n}: &{n} [{', '.join([f'*{p}'] * 9)}]\n" for p, n in itertools.pairwise("abcdefghijk")
)


def _sweep(lair: Lair) -> list[str]:
    text = f'axes: {{seed: [1]}}\nconstraints: [\'__import__("os").system("touch {lair.canary}")\']\n'
    (lair.folder / "sweep.yaml").write_text(text)
    return ["sft", "sweep", str(lair.folder / "sweep.yaml")]


def _link_that_leaves(lair: Lair) -> list[str]:
    (lair.folder / "elsewhere").mkdir()
    (lair.folder / "tokenized").mkdir()
    (lair.folder / "tokenized" / "orders").symlink_to(lair.folder / "elsewhere")
    return ["--tokenized_data_dir", "tokenized", "--data", str(lair.site.root / "train.jsonl")]


CASES: dict[str, Case] = {
    "base of pytorch_model.bin": (_weights("pytorch_model.bin"), REFUSED),
    "base of model.pt": (_weights("model.pt"), REFUSED),
    "pickle named model.safetensors": (_weights("model.safetensors"), REFUSED),
    "header of an absurd size": (_header(b"{}", 2**62), REFUSED),
    "header of a terabyte in a sparse file": (_header(b"{}", 2**40), REFUSED),
    "header that is a list": (_header(b"[1]     "), REFUSED),
    "header without shapes": (_header(b'{"a":{}}'), REFUSED),
    "config.json of nested lists": (
        lambda lair: (lair.base / "config.json").write_text("[" * 100_000) and None,
        REFUSED,
    ),
    "checkpoint with a pickle named as a fragment": (_pickled_fragment, REFUSED),
    "checkpoint with further pickles": (_stray_pickle, RUNS),
    "manifest that points outside": (_outside, REFUSED),
    "steps that are links": (_linked_step, REFUSED),
    "fragments that are links": (_linked_file, REFUSED),
    "model code in the base": (_own_model, REFUSED),
    "model code without a pinned revision": (
        lambda _: ["--checkpoint", "someone/model", "--trust_remote_code"],
        REFUSED,
    ),
    "tokenizer code in the base": (_own_tokenizer, REFUSED),
    "chat template that leaves its sandbox": (_template, REFUSED),
    "YAML tag": (_yaml, REFUSED),
    "YAML tag in a recipe of training": (_recipe("data: !!python/object/apply:os.system ['touch CANARY']\n"), REFUSED),
    "YAML bomb": (_recipe(_BOMB), REFUSED),
    "recipe that extends itself": (_recipe("extends: recipe.yaml\n"), REFUSED),
    "recipe that extends a device": (_recipe("extends: /dev/zero\n"), REFUSED),
    "recipe of nested lists": (_recipe("data: " + "[" * 100_000), REFUSED),
    "recipe whose template leaves its sandbox": (
        _recipe(
            "template: \"{{ cycler.__init__.__globals__.os.system('touch CANARY') }}\"\ndata: "
            "[x.jsonl]\nretokenize: true\n"
        ),
        REFUSED,
    ),
    "condition of a sweep that imports": (_sweep, REFUSED),
    "run name ../x": (lambda _: ["--run_name", "../x"], REFUSED),
    "run name ..": (lambda _: ["--run_name", ".."], REFUSED),
    "id a/b": (lambda _: ["--id", "a/b"], REFUSED),
    "data set that is a link to elsewhere": (_link_that_leaves, REFUSED),
}


def hostile_inputs(field: Field) -> Row:
    row = Row("malicious inputs")
    field.whole()
    names = [name for name in CASES if not field.small or name in SMALL]
    with ThreadPoolExecutor(2) as pool:
        for name, wrong in zip(names, pool.map(lambda name: _outcome_is_wrong(field, name), names), strict=True):
            row.count(name, wrong)
    row.note = "no canary was made" if row.is_good else ""
    return row


def _outcome_is_wrong(field: Field, name: str) -> str | None:
    put, right = CASES[name]
    lair = Lair(Site(field.site.root), field.folder(f"hostile-{name.replace('/', '-')}").resolve())
    shutil.copytree(field.site.root / "base", lair.base)
    further = put(lair) or []
    if further[:1] in (["tokenize_data"], ["sft"]):
        done = _python(lair, further)
    else:
        flags = [*FLAGS, "--iters", str(WHOLE), "--tokenized_data_dir", str(field.site.root / "tokenized"), *further]
        done = _python(lair, ["sft", *flags])
    told = done[1]
    if lair.canary.exists() or list(lair.folder.glob("**/executed")):
        return f"was executed: {told[-200:]}"
    if done[0] not in right:
        return f"exit code {done[0]}: {told[-300:]}"
    lines = [line for line in told.splitlines() if "warning" not in line]
    if "Traceback" in told or (done[0] and len(lines) != 1):
        return f"{len(lines)} lines: {told[-300:]}"
    if (elsewhere := lair.folder / "elsewhere").is_dir() and any(path.is_file() for path in elsewhere.glob("*")):
        return f"wrote {list(elsewhere.iterdir())}"
    return None


def _python(lair: Lair, arguments: list[str]) -> tuple[int, str]:
    import subprocess
    import sys

    environment = lair.site.environment({"HF_HUB_OFFLINE": "1"})
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=lair.folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_SECONDS,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stderr


def secrets(field: Field) -> Row:
    """What stands in the environment of a run is in none of its files, nor in what it said."""
    row = Row("secrets in the environment")
    _, said = field.whole()
    files = [path for path in field.site.root.rglob("*") if path.is_file()]
    for name, canary in CANARIES.items():
        found = [str(path) for path in files if canary.encode() in path.read_bytes()]
        found += ["its output"] if canary in said else []
        row.count(name, f"found in {found[:3]}" if found else None)
    row.note = f"{len(files)} files searched"
    return row
