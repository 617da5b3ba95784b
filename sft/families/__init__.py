"""What is peculiar to each family of models, one file each. A family without a file is one like Llama.

In reading order: family (all that can differ), architecture (a model's weights) and sizes, counting (from config.json
to those), table (families by `model_type`), then the families, and experts (what is refused). A new family is a file
that registers itself, and its name below. Pure facts: no torch. Does not belong here: what holds for all families.
"""

from sft.families import falcon, gemma, gpt_neox, gptj, llama, mistral, olmo2, opt, phi3, qwen  # noqa: F401
