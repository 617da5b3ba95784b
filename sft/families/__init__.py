"""What differs between model families, one file each. A family without a file is treated like Llama.

In reading order: family (everything that can differ), architecture (a model's weights) and sizes, counting (builds them
from config.json), table (families by `model_type`), the families, and experts (not supported). A new family is a file
that registers itself, and its name below. No torch here. Does not belong here: what holds for all families.
"""

from sft.families import falcon, gemma, gpt_neox, gptj, llama, mistral, olmo2, opt, phi3, qwen  # noqa: F401
