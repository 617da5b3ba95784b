"""Facts of the packaged base models, as their config.json says them: for plans without a network."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenize_data.bases import read_checkpoints

FILE = Path(__file__).parents[1] / "checkpoints.toml"


def _llama(
    hidden: int, layers: int, heads: int, groups: int, inner: int, vocabulary: int = 32000, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        **more,
    }


_LLAMA2_7B, _LLAMA2_70B = _llama(4096, 32, 32, 32, 11008), _llama(8192, 80, 64, 8, 28672)
_NEOX = {"model_type": "gpt_neox", "vocab_size": 50304, "tie_word_embeddings": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": _LLAMA2_7B,
    "meta-llama/Llama-2-13b-hf": _llama(5120, 40, 40, 40, 13824),
    "meta-llama/Llama-2-70b-hf": _LLAMA2_70B,
    "epfl-llm/meditron-7b": _LLAMA2_7B | {"vocab_size": 32017},
    "epfl-llm/meditron-70b": _LLAMA2_70B | {"vocab_size": 32017},
    "chaoyi-wu/PMC_LLAMA_7B": _LLAMA2_7B,
    "meta-llama/Meta-Llama-3-8B": _llama(4096, 32, 32, 8, 14336, 128256),
    "meta-llama/Meta-Llama-3-70B": _llama(8192, 80, 64, 8, 28672, 128256),
    "mistralai/Mistral-7B-v0.1": _llama(4096, 32, 32, 8, 14336, model_type="mistral", sliding_window=4096),
    "google/gemma-2b": _llama(
        2048, 18, 8, 1, 16384, 256000, model_type="gemma", head_dim=256, tie_word_embeddings=True
    ),
    "google/gemma-7b": _llama(
        3072, 28, 16, 16, 24576, 256000, model_type="gemma", head_dim=256, tie_word_embeddings=True
    ),
    "EleutherAI/pythia-70m": _NEOX
    | {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048},
    "EleutherAI/pythia-1b": _NEOX
    | {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 8, "intermediate_size": 8192},
    "facebook/opt-350m": {
        "model_type": "opt",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "ffn_dim": 4096,
        "word_embed_proj_dim": 512,
        "vocab_size": 50272,
        "do_layer_norm_before": False,
        "max_position_embeddings": 2048,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": _llama(576, 30, 9, 3, 1536, 49152, tie_word_embeddings=True),
}

ENTRIES = [(name, size) for name, sizes in read_checkpoints(FILE)[1].items() for size in sizes]


def write_packaged(folder: Path) -> Path:
    """The packaged checkpoints.toml with every base as a folder that has its config.json, and nothing else."""
    text = FILE.read_text()
    for path, config in CONFIGS.items():
        place = folder / path
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.json").write_text(json.dumps(config))
        text = text.replace(f'path = "{path}"', f'path = "{place}"')
    assert len(re.findall(rf'path = "{re.escape(str(folder))}/', text)) == len(ENTRIES), (
        "a packaged entry has no facts here"
    )
    file = folder / "checkpoints.toml"
    file.write_text(text)
    return file
