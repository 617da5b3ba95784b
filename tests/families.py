"""A small tokenizer for each model family: the real one's pipeline and special tokens, a vocabulary learnt from a few
lines.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "What is the recommended first treatment of hypertension in adults with diabetes?",
    "The patient was given an ACE inhibitor, and blood pressure fell to 130/80 within 6 weeks.",
    "Summarise the dialogue:\nAnna: are you coming?\nBen: yes, at 8.\n\nAnna and Ben meet at eight.",
    (
        "system user assistant model [INST] [/INST] <<SYS>> You are a helpful assistant.\n\n  def f(x):\n    "
        "return x + 1\n"
    ),
    "Größe, naïve café, 日本語のテキスト, привет мир, it's we'll I'm don't 1234567890",
]
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
#  family -> (kind, special tokens, bos, eos, packaged template)
FAMILIES = {
    "gemma": (
        "sentencepiece",
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        "<eos>",
        "gemma",
    ),
    "llama2": ("legacy", ("<unk>", "<s>", "</s>"), "<s>", "</s>", "llama2"),
    "llama3": (
        "llama3",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "llama3",
    ),
    "mistral": ("legacy", ("<unk>", "<s>", "</s>"), "<s>", "</s>", "mistral"),
    "mistral_v3": ("legacy", ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>", "mistral_v3"),
    "qwen": ("qwen", CHATML, None, "<|endoftext|>", "qwen"),
    "smollm": ("digits", CHATML, None, "<|im_end|>", "smollm"),
    "phi": (
        "phi",
        ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
        "<s>",
        "<|endoftext|>",
        "phi",
    ),
    "megatron": ("legacy", ("<unk>", "<s>", "</s>"), "<s>", "</s>", "megatron"),
    "gpt2": ("gpt2", ("<|endoftext|>",), "<|endoftext|>", "<|endoftext|>", "megatron"),
}


def make_family(name: str, folder: Path) -> Path:
    """Write the family's tokenizer into `folder`, without a chat template."""
    kind, special, bos, eos, _ = FAMILIES[name]
    tokenizer = _byte_level(kind) if kind in ("gpt2", "digits", "llama3", "qwen") else _sentencepiece(kind)
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False, rstrip=kind == "phi" and "|" in text) for text in special]
    )
    if bos and kind not in ("gpt2", "phi"):
        identifier = tokenizer.token_to_id(bos)
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, identifier)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, **({"bos_token": bos} if bos else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _byte_level(kind: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt2", "digits"))
    first = {
        "gpt2": [],
        "digits": [pre_tokenizers.Digits(individual_digits=True)],
        "llama3": [pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated")],
        "qwen": [pre_tokenizers.Split(Regex(_QWEN_SPLIT), "isolated")],
    }[kind]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level]) if first else byte_level
    if kind == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _sentencepiece(kind: str) -> Tokenizer:
    learner = Tokenizer(models.BPE())
    replace = normalizers.Replace(" ", "▁")
    learner.normalizer = replace
    learner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, show_progress=False))
    learnt = json.loads(learner.to_str())["model"]
    tokens = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *(token for token in learnt["vocab"] if token != "<unk>"),
    ]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    merges = [tuple(merge) for merge in learnt["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "sentencepiece":
        tokenizer.normalizer = replace
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer
