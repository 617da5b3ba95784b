"""`sft export RUN_DIR`: a Hugging Face folder from a checkpoint, in one process, one tensor at a time."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="a run's folder, such as checkpoints/llama-70-meditron-pubmedqa"
    )
    parser.add_argument(
        "--iteration", type=int, default=None, metavar="K", help="which checkpoint (default: the newest complete one)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        metavar="DIR",
        help="output folder (default: RUN_DIR/hf; of adapters, RUN_DIR/adapter)",
    )
    parser.add_argument(
        "--dtype", default=None, choices=["fp32", "bf16"], help="dtype of the weights (default: as trained)"
    )
    parser.add_argument(
        "--push_to_hub", default=None, metavar="ID", help="upload the folder as this model; needs `hf auth login`"
    )
    parser.add_argument(
        "--public", action="store_true", help="make a repository that is created public (default: private)"
    )


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from tokenize_data.errors import UserError

    console = Console(highlight=False, soft_wrap=True)
    target = arguments.out or arguments.run_dir / _folder_name(arguments.run_dir)
    if target.exists() and arguments.push_to_hub is None:
        raise UserError(f"{target} exists: give another --out, or remove it first")
    if not target.exists():
        from sft.engine.start import prepare_environment

        prepare_environment()
        checkpoint = find_checkpoint(arguments.run_dir, arguments.iteration, console)
        what = write_model(checkpoint, target, arguments.dtype, console)
        console.print(f"{what} of iteration {checkpoint.iteration:,}: {target}")
    if arguments.push_to_hub is not None:
        from sft.checkpoint import hub

        hub.push(arguments.run_dir, target, arguments.push_to_hub, public=arguments.public, say=console.print)
    return 0


def write_model(checkpoint: Any, target: Path, dtype_name: str | None, console: Any) -> str:
    """Export a checkpoint's model as a Hugging Face folder, or its adapter in PEFT's format. Returns which of
    the two.
    """
    import torch
    from rich.progress import Progress

    from sft.checkpoint.adapter import AdapterOrigins, export_adapter
    from sft.checkpoint.export import export_checkpoint

    facts = checkpoint.manifest["facts"]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype_name or facts["resolved"]["dtype"]]
    origins = _origins(facts)
    with Progress(console=console) as progress:
        task = progress.add_task(f"iteration {checkpoint.iteration:,}", total=None)

        def shown(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        if (adapter := facts.get("adapter")) is None:
            export_checkpoint(checkpoint, target, origins, dtype, shown)
            return "model"
        mine = AdapterOrigins(config=adapter["config"], tokenizer_folder=origins.tokenizer_folder, facts=origins.facts)
        export_adapter(checkpoint, target, mine, dtype, (adapter["tied_name"], adapter["head"]), shown)
        return "adapter"


def _folder_name(run_dir: Path) -> str:
    from sft.spec.run_folder import trains_adapters

    has_adapter_alone = (run_dir / "adapter").is_dir() and not (run_dir / "hf").exists()
    return "adapter" if has_adapter_alone or trains_adapters(run_dir) else "hf"


def find_checkpoint(run_dir: Path, iteration: int | None, console: Any) -> Any:
    from sft.checkpoint.commit import find_latest, step_folders
    from sft.checkpoint.fragments import Checkpoint
    from sft.checkpoint.manifest import damage, step_name
    from tokenize_data.errors import UserError

    folders = [folder.name for folder in step_folders(run_dir)]
    if not folders:
        raise UserError(f"{run_dir} has no checkpoint (step-...): give the folder of a run that has saved one")
    if iteration is None:
        checkpoint, skipped = find_latest(run_dir)
        for line in skipped:
            console.print(f"warning: {line}", style="yellow")
        return checkpoint
    name = step_name(iteration)
    if name not in folders:
        raise UserError(f"{run_dir} has no {name}: it has {', '.join(sorted(folders))}")
    if (reason := damage(run_dir / name)) is not None:
        raise UserError(f"{run_dir / name} is damaged ({reason}): choose another --iteration")
    return Checkpoint(run_dir / name)


def _origins(facts: dict[str, Any]) -> Any:
    """Configuration, tokenizer and facts as in the export at the end of a run."""
    from transformers import AutoConfig, GenerationConfig

    from sft.checkpoint.export import Origins
    from sft.worker.saving import training_facts
    from tokenize_data.errors import UserError

    base, tokenizer = Path(facts["resolved"]["base_folder"]), Path(facts["tokenizer_folder"])
    for folder, what in ((base, "base model"), (tokenizer, "tokenised data")):
        if not folder.is_dir():
            raise UserError(f"the {what} of this run was in {folder}, which no longer exists: restore it")
    config = AutoConfig.from_pretrained(base, trust_remote_code=facts["config"].get("trust_remote_code", False))
    config.get_text_config().vocab_size = facts["vocabulary_size"]
    generation = GenerationConfig.from_pretrained(base) if (base / "generation_config.json").exists() else None
    return Origins(
        config=config,
        generation_config=generation,
        tokenizer_folder=tokenizer,
        names=facts["names"],
        facts=training_facts(facts, facts["result"]),
    )
