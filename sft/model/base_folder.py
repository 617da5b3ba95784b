"""A base model's folder on this machine: a local one, one from the Hub, or one made from a GGUF file."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from tokenize_data import lock
from tokenize_data.errors import UserError, shorten

_WANTED_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
_SECOND_COPIES = "consolidated*.safetensors"  # some repositories have their weights twice
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")
_GGUF_PACKAGES = ("gguf", "accelerate")
_HASHED_BYTES = 16 * 2**20
# Convert in a separate process, whose memory is freed afterwards.
_CONVERT = """
import os, sys, warnings
warnings.filterwarnings("ignore"); os.environ["TRANSFORMERS_VERBOSITY"] = "error"
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, name, out = sys.argv[1:]
AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
if hasattr(model.config, "quantization_config"): del model.config.quantization_config
model.hf_quantizer = None
model.save_pretrained(out)
"""

logger = logging.getLogger(__name__)


def resolve(path: str, revision_or_subfolder: str | None = None) -> Path:
    """The local folder with the base model's safetensors and configuration; fetched or converted if necessary, and
    cached.
    """
    folder, inner = Path(path).expanduser(), revision_or_subfolder
    if not folder.exists():
        return _from_hub(path, inner)
    if inner is not None and folder.is_dir():
        folder = folder / inner
        if not folder.is_dir():
            raise UserError(
                f"{path} has no folder '{inner}' inside: name one that exists as intermediate, or leave it out"
            )
    gguf = gguf_file_in(folder)
    if gguf is not None:
        return _from_gguf(gguf)
    if not folder.is_dir():
        raise UserError(f"{path} is neither a folder nor a .gguf file: give the folder of a Hugging Face model")
    return folder


def resolve_here(path: str, revision_or_subfolder: str | None = None) -> Path:
    """Like `resolve`, but without fetching or converting, for what needs only config.json."""
    folder, inner = Path(path).expanduser(), revision_or_subfolder
    if folder.exists():
        gguf = gguf_file_in(folder if inner is None else folder / inner)
        if gguf is not None and not (_cache_of_conversions() / _identity(gguf)).is_dir():
            raise UserError(
                f"{gguf} has not been converted yet, which the first training with it does: until then, give a "
                "folder with a config.json"
            )
        return resolve(path, inner)
    if not _HUB_ID.fullmatch(path) or path.startswith("."):
        raise UserError(f"{path}: no such folder: give a Hugging Face folder, a .gguf file or a Hub id")
    from huggingface_hub import try_to_load_from_cache

    for revision, name in ((inner, "config.json"), (None, f"{inner}/config.json")):
        found = try_to_load_from_cache(path, name, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    given = f" --revision {inner}" if inner else ""
    raise UserError(
        f"'{path}' has not been fetched to this machine; its configuration is enough: hf download {path} "
        f"config.json{given}"
    )


def gguf_file_in(path: str | Path) -> Path | None:
    """The GGUF file at `path`, or in the folder `path` if it has no safetensors."""
    path = Path(path).expanduser()
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:5]) + (", ..." if len(files) > 5 else "")
        raise UserError(f"{path} holds {len(files)} GGUF files ({names}): give the path of one of them")
    return files[0] if files else None


def _from_hub(path: str, inner: str | None) -> Path:
    if not _HUB_ID.fullmatch(path) or path.startswith("."):
        raise UserError(f"{path}: no such folder: give a Hugging Face folder, a .gguf file or a Hub id")
    from huggingface_hub import errors, snapshot_download  # slow to import, and only needed for Hub ids

    try:
        try:
            return Path(
                snapshot_download(
                    path, revision=inner, allow_patterns=list(_WANTED_FILES), ignore_patterns=["*/*", _SECOND_COPIES]
                )
            )
        except (errors.RevisionNotFoundError, errors.LocalEntryNotFoundError):  # the second one without a network
            if inner is None:
                raise
        wanted = [f"{inner}/{pattern}" for pattern in _WANTED_FILES]
        folder = (
            Path(
                snapshot_download(path, allow_patterns=wanted, ignore_patterns=[f"{inner}/*/*", f"*/{_SECOND_COPIES}"])
            )
            / inner
        )
    except errors.GatedRepoError as error:
        raise UserError(f"'{path}' is gated on the Hub: accept its terms there, then `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"the Hub has no model '{path}', or a private one: check the name, and `hf auth login` if it is yours"
        ) from error
    except Exception as error:  # many kinds: no network, a full disk, a broken proxy
        reason = f"{type(error).__name__}: {shorten(error, 160)}"
        raise UserError(
            f"'{path}' is not a folder and cannot be fetched from the Hub ({reason}): check the network, or give "
            "a folder"
        ) from error
    if not folder.is_dir():
        raise UserError(
            f"the Hub's '{path}' has neither a revision nor a folder '{inner}': give one that it has as "
            "intermediate, or none"
        )
    return folder


def _from_gguf(file: Path) -> Path:
    """Convert the file once to a Hugging Face folder in float32, which keeps the dequantised values exactly."""
    cache = _cache_of_conversions()
    try:
        kept = cache / _identity(file)
        if kept.is_dir():
            return kept
        missing = [name for name in _GGUF_PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f"{file} is a GGUF file, which needs {' and '.join(missing)}: pip install 'megasft[gguf]'")
        cache.mkdir(parents=True, exist_ok=True)
        waits = f"{file.name} is being converted by %s: waiting for it"
        with lock.exclusive(kept.with_suffix(".lock"), lambda holder: logger.info(waits, holder)):
            if not kept.is_dir():
                logger.info("%s is converted to safetensors, once, into %s", file.name, kept)
                _convert(file, kept)
    except OSError as error:
        remedy = (
            "free some space there, or set XDG_CACHE_HOME to a folder with 5 bytes for each of the model's parameters"
        )
        raise UserError(f"{file} cannot be converted into {cache} ({error.strerror or error}): {remedy}") from error
    return kept


def _cache_of_conversions() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sft" / "models"


def _identity(file: Path) -> str:
    """Identify a file by name, size, time and its first bytes: hashing all of it would take seconds at each start."""
    status = file.stat()
    with file.open("rb") as stream:
        beginning = hashlib.sha256(stream.read(_HASHED_BYTES)).hexdigest()
    facts = [file.name, status.st_size, status.st_mtime_ns, beginning, metadata.version("transformers")]
    return hashlib.sha256("\n".join(map(str, facts)).encode()).hexdigest()


def _convert(file: Path, kept: Path) -> None:
    scratch = Path(tempfile.mkdtemp(dir=kept.parent))
    try:
        command = [sys.executable, "-c", _CONVERT, str(file.resolve().parent), file.name, str(scratch)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not any(scratch.glob("*.safetensors")):
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            reason = re.sub(r"^\w+(\.\w+)*: ", "", reason)
            raise UserError(
                f"transformers cannot read {file} ({reason[:200]}): "
                "check that the file is complete, or give the Hugging Face folder that it was made from"
            )
        scratch.chmod(0o755)  # mkdir's default permissions: others may use a shared cache
        scratch.rename(kept)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
