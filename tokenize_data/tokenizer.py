"""A base model's tokenizer as plain data: the `tokenizers` object, its special tokens, its chat template.

A folder whose tokenizer.json is used as it stands by transformers is read directly. Any other (SentencePiece, tekken, a class that
rebuilds the tokenizer from its vocabulary) is converted once by transformers itself, in a process of its own: so ids are those that
`AutoTokenizer` gives at generation time, and this process stays free of torch.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers import __version__ as tokenizers_version

from tokenize_data import guard
from tokenize_data.errors import UserError, shorten

_VERBATIM_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_WANTED_FILES = ("*.json", "*.model", "*.jinja", "*.txt")
_MAX_TEMPLATE_BYTES = 1 << 20
_MAX_JSON_BYTES = 1 << 29
_MAX_ID = (1 << 24) - 1  # tables go up to the largest id; the largest vocabularies have a million tokens
_TRIED = (
    "".join(map(chr, range(32, 127))),
    "The first treatment. " * 20,
    "a" * 200,
    " \n\t\r\n  ",
    "caf\u00e9 e\u0301 \u65e5\u672c \U0001f642 \u09dc",
)
_CONVERT = """
import os, resource, sys, warnings
for kind, most in ((resource.RLIMIT_CPU, 900), (resource.RLIMIT_AS, 1 << 36)):
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (min([most, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]), hard))
warnings.filterwarnings("ignore"); os.environ["TRANSFORMERS_VERBOSITY"] = "error"
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], local_files_only=True)
if not tokenizer.is_fast: sys.exit("it has no fast version (tokenizer.json)")
tokenizer.save_pretrained(sys.argv[2])
"""


@dataclass(frozen=True, kw_only=True)
class BaseTokenizer:
    """A tokenizer and what belongs to it. `backend` is never changed once this object exists."""

    backend: Tokenizer
    config: dict[str, Any]
    chat_template: str | None
    added: tuple[str, ...] = ()

    @cached_property
    def pipeline(self) -> dict[str, Any]:
        """What tokenizer.json says: normalizer, pre_tokenizer, model, added_tokens, ... Not to be changed."""
        content: dict[str, Any] = json.loads(self.backend.to_str())
        return content

    @cached_property
    def vocabulary_size(self) -> int:
        return int(max(self.backend.get_vocab(with_added_tokens=True).values())) + 1

    def special(self, name: str) -> str | None:
        """The text of bos_token, eos_token, ... or None."""
        token = self.config.get(name)
        return token.get("content") if isinstance(token, dict) else token

    @property
    def adds_bos(self) -> bool:
        """Whether this tokenizer itself puts its BOS before a text."""
        bos = self.special("bos_token")
        if bos is None:
            return False
        if isinstance(flag := self.config.get("add_bos_token"), bool):
            return flag
        ids = self.backend.encode("a", add_special_tokens=True).ids
        return bool(ids) and ids[0] == self.backend.token_to_id(bos)

    def special_texts(self) -> frozenset[str]:
        """The texts of all tokens that are matched as a whole and never appear in ordinary text."""
        texts = {token.content for token in self.backend.get_added_tokens_decoder().values() if token.special}
        return frozenset(texts | {text for text in (self.special("bos_token"), self.special("eos_token")) if text})

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what decides ids: vocabulary, merges, normalisation, added and special tokens. Not of names or places."""
        kept = ("normalizer", "pre_tokenizer", "model", "added_tokens", "decoder")
        pipeline = {key: self.pipeline[key] for key in kept}
        pipeline["special"] = {name: self.special(name) for name in ("bos_token", "eos_token")}
        return hashlib.sha256(json.dumps(pipeline, sort_keys=True).encode()).hexdigest()

    def extended(self, tokens: tuple[str, ...]) -> BaseTokenizer:
        """The same with `tokens` as special tokens: those that it finds whole stay, those in its vocabulary alone keep their ids."""
        torn = [token for token in dict.fromkeys(tokens) if not self.finds(token)]
        if not torn:
            return self
        backend = Tokenizer.from_str(self.backend.to_str())
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in torn])
        return replace(self, backend=backend, added=self.added + tuple(t for t in torn if self.backend.token_to_id(t) is None))

    def finds(self, token: str) -> bool:
        """Whether this token is found in a text as a whole. One that is in the vocabulary alone is taken apart."""
        number = self.backend.token_to_id(token)
        return number is not None and number in self.backend.encode(f"a{token}a", add_special_tokens=False).ids

    def save(self, folder: Path, chat_template: str | None) -> None:
        """A folder that AutoTokenizer reads back to the same ids: tokenizer.json is used as it stands."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True))  # its own save() hides a full disk in a bare Exception
        config = {key: value for key, value in self.config.items() if key not in ("chat_template", "auto_map", "added_tokens_decoder")}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        if chat_template is not None:
            (folder / "chat_template.jinja").write_text(chat_template)


def load_tokenizer(path: str) -> BaseTokenizer:
    """The tokenizer of a Hugging Face folder or Hub id."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # our workers are the parallelism; threads and forks do not mix
    folder = Path(path) if Path(path).is_dir() else _from_hub(path)
    config = _read_json(folder / "tokenizer_config.json")
    _check(folder, config)
    if not _is_verbatim(folder, config):
        return _read(_converted(folder), fallback_template=_read_template(folder, config))
    return _read(folder)


def _read(folder: Path, fallback_template: str | None = None) -> BaseTokenizer:
    config = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
    _check(folder, config)
    _try_once(folder / "tokenizer.json")
    backend = _load(folder / "tokenizer.json")
    backend.no_truncation()
    backend.no_padding()
    return BaseTokenizer(backend=backend, config=config, chat_template=_read_template(folder, config) or fallback_template)


def _load(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{file} cannot be read ({error}): save the tokenizer again with save_pretrained") from error


def _try_once(file: Path) -> None:
    """Load a tokenizer and use it in a process that may be killed, before it is loaded here. What went well is remembered."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): save the tokenizer again with save_pretrained") from error
    digest = hashlib.sha256(f"{tokenizers_version} {_MAX_ID} {_TRIED}".encode() + content).hexdigest()
    mark = _cache() / "tried" / digest
    if os.path.exists(mark):  # False too where a home cannot be read
        return
    child = guard.Child(_use, guard.Limits(seconds=60 + len(content) // 500_000, num_bytes=(2 << 30) + 64 * len(content)))
    try:
        child.ask(str(file))
    except guard.LimitError as error:
        raise UserError(f"{file} is no usable tokenizer: it {error}, when it was tried: use another base model") from error
    finally:
        child.close()
    with contextlib.suppress(OSError):  # a home that cannot be written: tried again each time
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _use(file: str) -> str:
    backend = _load(Path(file))
    token, largest = max(backend.get_vocab(with_added_tokens=True).items(), key=lambda pair: pair[1], default=("", 0))
    if largest > _MAX_ID:
        raise UserError(
            f"{file} gives {shorten(token)} the id {largest:,}, above {_MAX_ID:,}: save the tokenizer again with save_pretrained"
        )
    for text in _TRIED:
        try:
            backend.decode(backend.encode(text, add_special_tokens=False).ids)
            backend.encode(text, add_special_tokens=True)
        except Exception as error:
            if type(error) is not Exception:  # `tokenizers` raises that for an unknown character, which concerns the rows that have it
                raise
    json.loads(backend.to_str())
    return ""


def _check(folder: Path, config: dict[str, Any]) -> None:
    """What is read of a configuration has the kind that it should have."""
    tokens: list[tuple[str, Any]] = [(name, config.get(name)) for name in _SPECIAL_NAMES]
    for name, kinds in (
        ("added_tokens_decoder", dict),
        ("extra_special_tokens", (list, dict)),
        ("additional_special_tokens", (list, dict)),
    ):
        values = config.get(name) or {}
        if not isinstance(values, kinds):
            raise UserError(f"{folder}: {name} is {shorten(values)}, not a list of tokens: correct tokenizer_config.json")
        tokens += [(name, value) for value in (values.values() if isinstance(values, dict) else values)]
    for name, token in tokens:
        text = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(text, str):
            raise UserError(f"{folder}: {name} is {shorten(token)}, not the text of a token: correct tokenizer_config.json")


def _is_verbatim(folder: Path, config: dict[str, Any]) -> bool:
    if not (folder / "tokenizer.json").exists() or config.get("tokenizer_class") not in _VERBATIM_CLASSES:
        return False
    known = {token["content"] for token in _read_json(folder / "tokenizer.json").get("added_tokens", [])}
    declared = [token["content"] for token in config.get("added_tokens_decoder", {}).values()]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    declared += [token.get("content") if isinstance(token, dict) else token for name in _SPECIAL_NAMES if (token := config.get(name))]
    declared += list(extra.values()) if isinstance(extra, dict) else [t["content"] if isinstance(t, dict) else t for t in extra]
    return known.issuperset(declared)


def _converted(folder: Path) -> Path:
    """The folder as transformers saves it: made once for these contents and this version of transformers, and kept."""
    names = {file for pattern in _WANTED_FILES for file in folder.glob(pattern) if file.is_file()}
    digest = hashlib.sha256(metadata.version("transformers").encode())
    for file in sorted(names):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    cache = _cache() / "tokenizers"
    kept = cache / digest.hexdigest()
    if (kept / "tokenizer.json").exists():
        return kept
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=cache))
    except OSError:  # a home that cannot be written: converted again each time
        kept = scratch = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    _convert(folder, scratch)
    if scratch != kept:
        with contextlib.suppress(OSError):  # another process was first: its result is the same
            scratch.rename(kept)
        shutil.rmtree(scratch, ignore_errors=True)
    return kept


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sft"


def _convert(folder: Path, out: Path) -> None:
    command = [sys.executable, "-c", _CONVERT, str(folder), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0 and (out / "tokenizer.json").exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    if done.returncode < 0:
        reason = f"it ended with {signal.Signals(-done.returncode).name}, after too much processor time or memory"
    reason = re.sub(r"^\w+(\.\w+)*: ", "", reason)
    raise UserError(f"transformers cannot load the tokenizer in {folder}: {reason[:300]}")


def _from_hub(path: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and only needed for Hub ids

    try:
        return Path(snapshot_download(path, allow_patterns=list(_WANTED_FILES)))
    except Exception as error:  # many kinds: no network, no such model, no right to read it
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"the tokenizer of '{path}' is neither a folder nor to be had from the Hub ({type(error).__name__}: {reason}): "
            "check the name and `hf auth login`, or give a local folder as --checkpoint"
        ) from error


def read_template(file: Path) -> str:
    with file.open("rb") as stream:  # a device has no size to look at first
        content = stream.read(_MAX_TEMPLATE_BYTES + 1)
    if len(content) > _MAX_TEMPLATE_BYTES:
        raise UserError(f"{file} has more than {_MAX_TEMPLATE_BYTES:,} bytes, so it is no chat template: give another one")
    return content.decode()


def _read_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return read_template(file)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise UserError(f"{file} cannot be read ({reason}): fetch the base model again, or remove it") from error
    template = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several named ones: the default is for chat
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{folder}: chat_template is {shorten(template)}, not text: fetch the base model again, or remove it")
    if template is not None and len(template) > _MAX_TEMPLATE_BYTES:
        raise UserError(f"{folder}: chat_template has more than {_MAX_TEMPLATE_BYTES:,} characters: fetch the base model again")
    return template


def _read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        size = file.stat().st_size if file.is_file() else 0
        if not 0 < size <= _MAX_JSON_BYTES:
            raise ValueError(f"{size:,} bytes, where at most {_MAX_JSON_BYTES:,} are read" if size else "no text in it")
        content = json.loads(file.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"it is {shorten(content)}, where {{...}} is needed")
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({error}): fetch the base model again") from error
    return content
