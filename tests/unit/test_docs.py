"""The README and the manual: links, commands, flags, files and the page of flags are those of the code."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import re
import shlex
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "launch" / "README.md", *DOCS.glob("*.md")])
OTHER_TRAINERS = DOCS / "coming-from.md"  # the first cell of its tables has others' flags
OTHER_PROGRAMS = {"docker", "git", "hf", "kill", "kubectl", "make", "mkdocs", "nvidia-smi", "pip", "pytest", "python"}
OTHER_PROGRAMS |= {"python3", "sbatch", "ssh", "tail", "tensorboard", "torchrun"}
FOLDERS = "benchmarks|docs|launch|recipes|sft|tests|tokenize_data"
SOURCE = re.compile(
    r"\b(?:benchmarks|docs|launch|recipes|sft|tests|tokenize_data)/[\w./-]+\.(?:py|md|yaml|json|sbatch|html)\b"
)
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def flags() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_flags", DOCS / "flags.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def known(flags: ModuleType) -> dict[str, set[str]]:
    """The flags of each command."""
    return {name: set(parser._option_string_actions) for name, parser in flags.command_parsers().items()}


def test_the_page_of_flags_is_that_of_the_settings(flags: ModuleType):
    assert (DOCS / "flags.md").read_text() == flags.page(), "run: python docs/flags.py > docs/flags.md"


def test_the_architecture_page_has_the_rooms_and_their_order():
    page = (DOCS / "architecture.md").read_text()
    rooms = [path.parent.name for path in (ROOT / "sft").glob("*/__init__.py")]
    assert [room for room in rooms if f"| `sft/{room}/` |" not in page] == []
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["name"] == "sft imports run one way")
    (order,) = re.findall(r"^```text\n(.*?)```", page, re.M | re.S)
    assert " ".join(order.split()) == ", ".join(layers).replace("sft.", "")


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_every_page_is_in_the_navigation():
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(_leaves(navigation)) == sorted(path.name for path in DOCS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path):
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", "\n".join(_prose(page))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in _anchors(file)):
            missing.append(target)
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page: Path):
    assert [name for name in SOURCE.findall(page.read_text()) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_flags_exist(page: Path, known: dict[str, set[str]]):
    assert list(unknown(_code(page), known)) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_targets_of_make_exist(page: Path):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    named = [words[1] for words in map(_words, _code(page)) if words[:1] == ["make"] and len(words) > 1]
    assert not set(named) - set(targets)


def test_messages_of_the_troubleshooting_page_are_the_programs_own():
    said = _texts(path for folder in ("sft", "tokenize_data") for path in (ROOT / folder).rglob("*.py"))
    said += inspect.getsource(argparse)
    rows = re.findall(r"^\| `(.+?)` \|", (DOCS / "troubleshooting.md").read_text(), re.M)
    assert len(rows) > 60
    pieces = [piece.strip() for row in rows for piece in row.split("...")]
    assert [piece for piece in pieces if piece not in said] == []


def test_what_does_not_exist_is_found(known: dict[str, set[str]]):
    wrong = [
        "sft trian x",
        "$ sft export RUN_DIR --lora 4",
        "--no_such_flag",
        "tokenize_data --tp 2",
        "A=1 sft --pp2 3",
    ]
    assert list(unknown(wrong, known)) == [
        "sft trian",
        "sft export: --lora",
        "--no_such_flag",
        "tokenize_data: --tp",
        "sft train: --pp2",
    ]
    right = [
        "sft --lora 4",
        "sft report RUN",
        "sft sweep s.yaml --dry_run",
        "pip install --x",
        "--tp 2 does not divide",
    ]
    assert list(unknown(right, known)) == []


def unknown(pieces: list[str], known: dict[str, set[str]]) -> Iterator[str]:
    """Commands, and flags of a command, that no parser has."""
    everything = set().union(*known.values())
    for piece in pieces:
        words = _words(piece)
        if not words or words[0] in OTHER_PROGRAMS:
            continue
        flags = FLAG.findall(piece)
        if words[0] not in ("sft", "tokenize_data") or words[1:2] == ["train:"]:
            yield from (flag for flag in flags if flag not in everything)
            continue
        command = words[0]
        if command == "sft":
            first = words[1] if len(words) > 1 else "train"
            is_train = first.startswith(("-", "<", ".", "$")) or not re.fullmatch(r"[a-z-]+", first)
            command = "sft train" if is_train else f"sft {first}"
        if command not in known:
            yield command
            continue
        yield from (f"{command}: {flag}" for flag in flags if flag not in known[command])


def _texts(files: Iterable[Path]) -> str:
    """All texts of some programs, a NUL where a value is put in."""
    found = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def _words(piece: str) -> list[str]:
    """Of a line of a terminal, without its prompt, variables and comment."""
    try:
        words = shlex.split(piece.removeprefix("$ "), comments=True)
    except ValueError:  # a message with an apostrophe
        words = piece.removeprefix("$ ").split()
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return words


def _code(page: Path) -> list[str]:
    """Lines of code blocks, and inline code, without what belongs to other trainers."""
    lines = page.read_text().splitlines()
    is_fenced, found, prose = False, [], []
    for line in lines:
        if line.startswith("```"):
            is_fenced = not is_fenced
        elif is_fenced or line.startswith("    "):
            found.append(line.strip())
        else:
            cells = line.split(" | ")
            prose.append(" ".join(cells[1:]) if page == OTHER_TRAINERS and line.startswith("|") else line)
    return found + [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", "\n".join(prose))]


def _prose(page: Path) -> Iterator[str]:
    is_fenced = False
    for line in page.read_text().splitlines():
        is_fenced ^= line.startswith("```")
        if not is_fenced and not line.startswith("    "):
            yield line


def _anchors(page: Path) -> set[str]:
    headings = [line.lstrip("#").strip() for line in _prose(page) if line.startswith("#")]
    included = re.findall(r'^--8<-- "(.+)"$', page.read_text(), re.M)
    headings += [line.lstrip("#").strip() for name in included for line in _prose(ROOT / name) if line.startswith("#")]
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower())) for heading in headings}


def _leaves(part: object) -> Iterator[str]:
    if isinstance(part, str):
        yield part
    elif isinstance(part, list):
        for entry in part:
            yield from _leaves(entry)
    elif isinstance(part, dict):
        for entry in part.values():
            yield from _leaves(entry)
