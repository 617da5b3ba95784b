"""Small models as Hugging Face folders: a family's structure, a small tokenizer with a chat template; random, or tuned
on a few rows.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.models import tiny_config
from tokenize_data.fields import Conversation
from tokenize_data.prompts import open_format
from tokenize_data.rendered import ASSISTANT

_TEMPLATES = Path(__file__).parents[1] / "tokenize_data" / "jinja"
LEARNT = {
    "What is the recommended first treatment?": "An ACE inhibitor.",
    "Are you coming?": "Yes, at 8.",
    "Summarise the dialogue.": "Anna and Ben meet at eight.",
    "Is the patient an adult?": "yes",
    "Was blood pressure normal?": "no",
}


def make_model(
    folder: Path, tokenizer_folder: Path, name: str = "llama", template: str = "smollm", seed: int = 0
) -> Path:
    """`folder` with a random model; `tokenizer_folder` is a family of tests/families.py."""
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    shutil.copyfile(_TEMPLATES / f"{template}.jinja", folder / "chat_template.jinja")
    chat = open_format(folder)
    config = tiny_config(name)
    config.vocab_size = chat.tokenizer.vocabulary_size
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, None, chat.stop_ids[0]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that answers differ
            if parameter.ndim > 1:
                parameter.mul_(8.0)
    model.save_pretrained(folder)
    return folder


def tune(folder: Path, pairs: dict[str, str], steps: int = 100) -> Path:
    """Train the folder's model on questions and answers, on what training calls trained tokens and nothing else."""
    chat = open_format(folder)
    config = tiny_config("llama")
    config.vocab_size = chat.tokenizer.vocabulary_size
    config.eos_token_id = chat.stop_ids[0]
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    rows = []
    for question, answer in pairs.items():
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        conversation = Conversation(messages=turns)
        (document,) = chat.documents(conversation)
        roles = [
            role for length, role in zip(document.run_lengths, document.run_roles, strict=True) for _ in range(length)
        ]
        ids = torch.tensor(document.ids.astype("int64"))
        rows.append((ids, torch.where(torch.tensor(roles) == ASSISTANT, ids, -100)))
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=value)
        for part, value in zip(zip(*rows, strict=True), (0, -100), strict=True)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=(labels != -100) | (ids != 0), labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder
