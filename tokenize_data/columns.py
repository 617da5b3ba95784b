"""Where rows keep their texts, if they are neither of a known format nor under its names: as LLaMA-Factory's
`dataset_info.json` says it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from tokenize_data.errors import UserError

FORMATTINGS = ("alpaca", "sharegpt", "openai")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Keys of a row, and what its messages call the roles. None: not read."""

    formatting: str = "alpaca"
    prompt: str | None = None
    query: str | None = None
    response: str | None = None
    history: str | None = None
    messages: str | None = None
    system: str | None = None
    tools: str | None = None
    role_tag: str | None = None
    content_tag: str | None = None
    user_tag: str | None = None
    assistant_tag: str | None = None
    observation_tag: str | None = None
    function_tag: str | None = None
    system_tag: str | None = None

    def __post_init__(self) -> None:
        if self.formatting not in FORMATTINGS:
            raise UserError(f"columns: formatting is {self.formatting}: use one of {', '.join(FORMATTINGS)}")
        needed = ("prompt", "response") if self.formatting == "alpaca" else ("messages", "role_tag", "content_tag")
        for name in needed:
            if getattr(self, name) is None:
                raise UserError(f"columns: {name} is missing: name the key where rows of {self.formatting} have it")

    def __str__(self) -> str:
        return ", ".join(f"{name}: {value}" for name, value in asdict(self).items() if value is not None)


ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
SHAREGPT = {
    "messages": "conversations",
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
OPENAI = {
    "messages": "messages",
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "tool_calls",
    "system_tag": "system",
}
DEFAULTS = {"alpaca": ALPACA, "sharegpt": SHAREGPT, "openai": OPENAI}
