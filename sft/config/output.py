"""Settings: what a run writes and when, validation, early stopping, trackers."""

from __future__ import annotations

from dataclasses import dataclass

from tokenize_data.names import check_run_name
from tokenize_data.settings import Group, setting

KEEP_BEST = 1_000_000  # an early_stopping that keeps the best model and never stops


@dataclass(frozen=True, kw_only=True)
class OutputSettings(Group):
    save_checkpoint_dir: str = setting("checkpoints", "root folder of the output", metavar="D")
    save_interval: int = setting(800, "iterations between checkpoints", metavar="K", least=1)
    save_each_epoch: bool = setting(False, "a checkpoint after each epoch, in place of --save_interval")
    keep: int = setting(2, "checkpoints to keep, besides the best one", metavar="N", least=1)
    id: str | None = setting(None, "repeat the same settings from scratch, under this name")
    eval_interval: int = setting(100, "iterations between validations", metavar="K", least=1)
    eval_each_epoch: bool = setting(False, "validate after each epoch, in place of --eval_interval")
    early_stopping: int | None = setting(None, "stop after N validations without a better loss", metavar="N", least=1)
    early_stopping_on: str | None = setting(
        None,
        "the validation data set whose loss counts, of several in a recipe (default: all together)",
        metavar="NAME",
    )
    early_stopping_min_delta: float = setting(
        0.0, "how much lower a validation loss must be to count as better", metavar="D", least=0
    )
    push_to_hub: str | None = setting(None, "upload the trained model, with a card, to this repository", metavar="ID")
    hub_public: bool = setting(False, "make a repository created by --push_to_hub public")
    tensorboard: bool = setting(True, "write TensorBoard files")
    wandb: bool = setting(False, "log to Weights & Biases")
    trackio: bool = setting(False, "log to Trackio")

    def check(self) -> None:
        if self.id is not None:
            check_run_name(self.id, "id")
