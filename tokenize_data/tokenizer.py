"""A base model's tokenizer as plain data: the `tokenizers` object, its special tokens, its chat template.

A folder whose tokenizer.json is used as it stands by transformers is read directly. Any other (SentencePiece, tekken, a
class that rebuilds the tokenizer from its vocabulary) is converted once by transformers itself, in a process of its
own: so ids are those that
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

from tokenize_data.errors import UserError
from tokenize_data.tokenizer_files import SPECIAL_NAMES, cache, chat_template_of, check, load, read_json, try_once

_VERBATIM_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
_WANTED_FILES = ("*.json", "*.model", "*.jinja", "*.txt")
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
    """A tokenizer with its special tokens and template. `backend` never changes."""

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
        """The text of bos_token, eos_token, ..., or None."""
        token = self.config.get(name)
        return token.get("content") if isinstance(token, dict) else token

    @property
    def adds_bos(self) -> bool:
        """Whether this tokenizer inserts BOS by itself."""
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
        """SHA-256 of what determines ids: vocabulary, merges, normalisation, added and special tokens, but not names
        or paths.
        """
        kept = ("normalizer", "pre_tokenizer", "model", "added_tokens", "decoder")
        pipeline = {key: self.pipeline[key] for key in kept}
        pipeline["special"] = {name: self.special(name) for name in ("bos_token", "eos_token")}
        return hashlib.sha256(json.dumps(pipeline, sort_keys=True).encode()).hexdigest()

    def extended(self, tokens: tuple[str, ...]) -> BaseTokenizer:
        """A copy with `tokens` as special tokens. Tokens that are in the vocabulary keep their ids."""
        torn = [token for token in dict.fromkeys(tokens) if not self.finds(token)]
        if not torn:
            return self
        backend = Tokenizer.from_str(self.backend.to_str())
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in torn])
        return replace(
            self, backend=backend, added=self.added + tuple(t for t in torn if self.backend.token_to_id(t) is None)
        )

    def finds(self, token: str) -> bool:
        """Whether this token is matched as a whole in texts, and not just part of the vocabulary."""
        number = self.backend.token_to_id(token)
        return number is not None and number in self.backend.encode(f"a{token}a", add_special_tokens=False).ids

    def save(self, folder: Path, chat_template: str | None) -> None:
        """Save a folder that AutoTokenizer reads back with the same ids."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(
            self.backend.to_str(pretty=True)
        )  # its save() reports a full disk as a bare Exception
        config = {
            key: value
            for key, value in self.config.items()
            if key not in ("chat_template", "auto_map", "added_tokens_decoder")
        }
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        if chat_template is not None:
            (folder / "chat_template.jinja").write_text(chat_template)


def load_tokenizer(path: str) -> BaseTokenizer:
    """Load the tokenizer of a Hugging Face folder or Hub id."""
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # our workers run in parallel; threads and forks do not mix
    folder = Path(path) if Path(path).is_dir() else _from_hub(path)
    config = read_json(folder / "tokenizer_config.json")
    check(folder, config)
    if not _is_verbatim(folder, config):
        return _read(_converted(folder), fallback_template=chat_template_of(folder, config))
    return _read(folder)


def _read(folder: Path, fallback_template: str | None = None) -> BaseTokenizer:
    config = {**read_json(folder / "special_tokens_map.json"), **read_json(folder / "tokenizer_config.json")}
    check(folder, config)
    try_once(folder / "tokenizer.json")
    backend = load(folder / "tokenizer.json")
    backend.no_truncation()
    backend.no_padding()
    return BaseTokenizer(
        backend=backend, config=config, chat_template=chat_template_of(folder, config) or fallback_template
    )


def _is_verbatim(folder: Path, config: dict[str, Any]) -> bool:
    if not (folder / "tokenizer.json").exists() or config.get("tokenizer_class") not in _VERBATIM_CLASSES:
        return False
    known = {token["content"] for token in read_json(folder / "tokenizer.json").get("added_tokens", [])}
    declared = [token["content"] for token in config.get("added_tokens_decoder", {}).values()]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    declared += [
        token.get("content") if isinstance(token, dict) else token
        for name in SPECIAL_NAMES
        if (token := config.get(name))
    ]
    declared += (
        list(extra.values()) if isinstance(extra, dict) else [t["content"] if isinstance(t, dict) else t for t in extra]
    )
    return known.issuperset(declared)


def _converted(folder: Path) -> Path:
    """The folder as saved by transformers, cached for these contents and this version of transformers."""
    names = {file for pattern in _WANTED_FILES for file in folder.glob(pattern) if file.is_file()}
    digest = hashlib.sha256(metadata.version("transformers").encode())
    for file in sorted(names):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    place = cache() / "tokenizers"
    kept = place / digest.hexdigest()
    if (kept / "tokenizer.json").exists():
        return kept
    try:
        place.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=place))
    except OSError:  # a read-only home: converted again each time
        kept = scratch = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    _convert(folder, scratch)
    if scratch != kept:
        with contextlib.suppress(OSError):  # another process was faster, with the same result
            scratch.rename(kept)
        shutil.rmtree(scratch, ignore_errors=True)
    return kept


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
    except Exception as error:  # many kinds: no network, no such model, no permission
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"the tokenizer of '{path}' is neither a folder nor available from the Hub ({type(error).__name__}: "
            f"{reason}): "
            "check the name and `hf auth login`, or give a local folder as --checkpoint"
        ) from error
