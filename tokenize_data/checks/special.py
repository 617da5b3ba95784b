"""Special tokens inside users' texts, which the model takes for the template's."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer

from tokenize_data.checks.finding import Example, Finding, first_few, of_all
from tokenize_data.reader import ShardReader
from tokenize_data.rendered import SYSTEM, USER


def special_tokens(reader: ShardReader, backend: Tokenizer, numbers: np.ndarray) -> list[Finding]:
    names = {number: token.content for number, token in backend.get_added_tokens_decoder().items() if token.special}
    is_special = np.zeros(max([*names, 0]) + 1, dtype=bool)
    is_special[list(names)] = True
    examples = []
    for number in numbers:
        document = reader[int(number)]
        roles = document.roles()
        asked = document.ids[(roles == USER) | (roles == SYSTEM)]
        asked = asked[asked < len(is_special)]
        found = asked[is_special[asked]]
        if len(found):
            note = " ".join(sorted({names[int(token)] for token in found})[:3])
            examples.append(Example(reader.place_text(int(number)), int(number), note=note))
    if not examples:
        return []
    text = (
        f"{of_all(len(examples), len(numbers))} have special tokens in what the user or the system says: the model "
        "takes them for the template's own; remove them"
    )
    return [Finding("special tokens in texts", text, first_few(examples))]
