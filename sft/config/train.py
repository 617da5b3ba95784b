"""Every setting of a training run, with its default, its meaning and the values that make sense."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sft.config.optimizer import OPTIMIZERS
from tokenize_data.errors import UserError
from tokenize_data.names import check_run_name
from tokenize_data.records import FORMATS, DatasetSpec

SCHEDULES = ("cosine", "linear", "constant")
DTYPES = ("bf16", "fp32")
ONLY_FLAGS = ("config", "rank", "hostfile")  # no keys of a recipe: it is the same on all nodes
RECOMPUTES = ("none", "selective", "full")


def setting(default: Any, text: str, group: str, **facts: Any) -> Any:
    """A field with what help, recipes and checks need to know of it: metavar, choices, least, above, most, and
    flag=False for none.
    """
    unknown = facts.keys() - {"metavar", "choices", "least", "above", "most", "flag"}
    assert not unknown, unknown
    return field(default=default, metadata={"text": text, "group": group, **facts})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What a run is. `None` stands for 'to be inferred'. Arithmetic checks only: no file is read here."""

    config: str | None = setting(None, "a YAML recipe with any of these; a flag wins over it", "data", metavar="RECIPE")
    run_name: str = field(
        metadata={"text": "name of the data set: letters, digits, . _ -", "group": "data", "metavar": "R"}
    )
    checkpoint: str = setting(
        "baseline", "base model: an entry of checkpoints.toml, or a Hugging Face folder", "model", metavar="NAME"
    )
    size: str | None = setting(None, "size of the entry (default: 7)", "model", metavar="S")
    checkpoints_file: str | None = setting(
        None, "default: ./checkpoints.toml if there, else the packaged one", "model", metavar="F"
    )
    intermediate_iter: int | None = setting(None, "an early release of the base model", "model", metavar="I", least=0)
    trust_remote_code: bool = setting(
        False, "run code that comes with the base model; a revision must be pinned", "model"
    )

    tokenized_data_dir: str = setting("tokenized", "root of the shards", "data", metavar="D")
    data: tuple[str, ...] = setting((), "files to train on; needed once", "data", metavar="FILE")
    val: tuple[str, ...] = setting((), "files for validation; becomes R-val", "data", metavar="FILE")
    datasets: tuple[DatasetSpec, ...] = setting(
        (), "data sets to train on, each with keys and a share of its own", "data", flag=False
    )
    val_datasets: tuple[DatasetSpec, ...] = setting((), "the same for validation", "data", flag=False)
    samples: int | None = setting(None, "take N rows of --data, drawn by --seed", "data", metavar="N", least=1)
    format: str | None = setting(None, "format of the rows (default: from the first ones)", "data", choices=FORMATS)
    question_key: str = setting("prompt", "key of the question", "data", metavar="K")
    answer_key: str = setting("gold", "key of the answer", "data", metavar="K")
    system_key: str | None = setting(None, "key of the system message", "data", metavar="K")
    text_key: str = setting("text", "key of plain text rows", "data", metavar="K")
    template: str = setting("auto", "auto, a packaged template's name, or a Jinja file", "data", metavar="T")
    seq: int = setting(
        2048, "longest document in tokens; longer ones are cut at the right", "data", metavar="L", least=2
    )
    max_bad_rows: int = setting(0, "set up to N bad rows aside in rejected.jsonl", "data", metavar="N", least=0)
    retokenize: bool = setting(False, "make the shards anew", "data")
    loss_mask: float = setting(
        0.0, "weight of user and system tokens in the loss", "data", metavar="W", least=0, most=1
    )

    epochs: float = setting(3.0, "iterations = ceil(E * documents / global batch)", "duration", metavar="E", above=0)
    iters: int | None = setting(None, "iterations, instead of those computed", "duration", metavar="N", least=1)
    no_autoaccept_iters: bool = setting(False, "show the calculation, and ask before starting", "duration")
    global_batch: int = setting(64, "documents an iteration", "duration", metavar="N", least=1)
    gradient_accumulation: int | None = setting(
        None,
        "rows that each replica adds up in an iteration: A * micro_batch * dp documents, in place of --global_batch; "
        "micro_batch "
        "counts as 1 unless it is given",
        "duration",
        metavar="A",
        least=1,
    )

    lr: float = setting(2e-5, "highest learning rate", "optimizer", above=0)
    min_lr: float = setting(2e-6, "lowest learning rate at the end", "optimizer", least=0)
    warmup_fraction: float = setting(
        0.1, "share of the iterations with a rising learning rate", "optimizer", metavar="F", least=0, most=1
    )
    warmup_iters: int | None = setting(
        None, "iterations with a rising learning rate, instead of a share", "optimizer", metavar="N", least=0
    )
    schedule: str = setting("cosine", "how the learning rate falls", "optimizer", choices=SCHEDULES)
    optimizer: str = setting(
        "adamw",
        "adamw8bit keeps its moments in 8 bits, adafactor those of a matrix as a row and a column, muon (for matrices "
        "inside the "
        "layers; adamw for the rest) one moment, sgd none",
        "optimizer",
        choices=tuple(OPTIMIZERS),
    )
    beta1: float = setting(0.9, "AdamW's first decay rate", "optimizer", metavar="B", least=0, most=1)
    beta2: float = setting(0.95, "AdamW's second decay rate", "optimizer", metavar="B", least=0, most=1)
    eps: float = setting(1e-5, "AdamW's epsilon", "optimizer", above=0)
    momentum: float = setting(0.0, "of sgd", "optimizer", metavar="M", least=0, most=1)
    weight_decay: float = setting(0.1, "not on biases and norms", "optimizer", metavar="W", least=0)
    clip: float = setting(1.0, "largest gradient norm; 0 for no clipping", "optimizer", metavar="C", least=0)
    dtype: str | None = setting(None, "default: bf16 on GPUs, fp32 on the CPU", "optimizer", choices=DTYPES)
    seed: int = setting(1234, "of the order of the data", "optimizer", least=0)

    lora: int | None = setting(
        None, "train adapters of this rank instead of the weights", "adapters", metavar="R", least=1
    )
    lora_alpha: float | None = setting(
        None, "scale of the adapters: alpha / R (default: 2R)", "adapters", metavar="A", above=0
    )
    lora_dropout: float = setting(0.0, "dropout before the adapters", "adapters", metavar="D", least=0, most=1)
    lora_targets: tuple[str, ...] = setting(
        ("all-linear",), "layers with adapters: all-linear, or names", "adapters", metavar="NAME"
    )
    lora_rslora: bool = setting(False, "scale adapters by alpha over the root of R", "adapters")
    lora_modules_to_save: tuple[str, ...] = setting((), "modules trained in full besides", "adapters", metavar="NAME")
    adapter: str | None = setting(None, "start from this adapter, a folder in PEFT's format", "adapters", metavar="DIR")
    load_in_4bit: bool = setting(False, "keep the base's frozen weights in 4 bits (NF4)", "adapters")
    weight_only_8bit: bool = setting(
        False, "keep the base's frozen weights in 8 bits, a scale for each row; activations are not rounded", "adapters"
    )
    merge_at_end: bool = setting(False, "write the merged model to hf/ besides adapter/", "adapters")

    tp: int | None = setting(
        None, "tensor-parallel size (default: entry, path or plan)", "layout", metavar="T", least=1
    )
    pp: int | None = setting(None, "pipeline stages (default: entry, path or plan)", "layout", metavar="P", least=1)
    micro_batch: int | None = setting(
        None, "room of a packed row: B * seq tokens (default: from the plan)", "layout", metavar="B", least=1
    )
    recompute: str | None = setting(
        None, "activations computed again backward (default: from the plan)", "layout", choices=RECOMPUTES
    )
    sequence_parallel: bool | None = setting(None, "split activations too (default: on when tp > 1)", "layout")
    rank: int = setting(0, "number of this node", "layout", metavar="R", least=0)
    nodes: int = setting(1, "number of nodes", "layout", metavar="N", least=1)
    addr: str = setting("localhost", "the first node's address", "layout")
    port: int = setting(6020, "the first node's port", "layout", least=1, most=65535)
    node_timeout: float = setting(
        1800.0, "seconds that nodes wait for each other before the start", "layout", metavar="S", above=0
    )
    nproc_per_node: int | None = setting(
        None, "processes on this node (default: visible GPUs, else 1)", "layout", metavar="N", least=1
    )

    gpu: str | None = setting(
        None, "kind of GPU to plan for, such as h100-80gb (default: what is here)", "layout", metavar="NAME"
    )
    gpu_file: str | None = setting(None, "TOML file with GPUs of your own: a table for each", "layout", metavar="F")

    hang_timeout: float | None = setting(
        None,
        "seconds without progress that end a run (default: ten usual iterations, at least 120; an hour for files)",
        "layout",
        metavar="S",
        above=0,
    )

    replace_timeout: float = setting(
        300.0,
        "seconds that the others wait for a lost node, before they go on with fewer replicas",
        "layout",
        metavar="S",
        above=0,
    )
    hostfile: str | None = setting(
        None, "start on all hosts of this file over ssh: lines of `host slots=8`", "layout", metavar="F"
    )
    max_restarts: int = setting(
        0, "start again from the latest checkpoint up to N times when a run fails", "layout", metavar="N", least=0
    )

    save_checkpoint_dir: str = setting("checkpoints", "root of the output", "output", metavar="D")
    save_interval: int = setting(800, "iterations between checkpoints", "output", metavar="K", least=1)
    keep: int = setting(2, "checkpoints that stay, the best one besides", "output", metavar="N", least=1)
    id: str | None = setting(None, "repeat the same settings from scratch", "output")
    eval_interval: int = setting(100, "iterations between validations", "output", metavar="K", least=1)
    early_stopping: int | None = setting(
        None, "stop after N validations without a better loss", "output", metavar="N", least=1
    )
    early_stopping_min_delta: float = setting(
        0.0,
        "how much lower a validation loss has to be than the lowest that counted before",
        "output",
        metavar="D",
        least=0,
    )
    push_to_hub: str | None = setting(
        None, "upload the model, with a card, to this repository when it is trained", "output", metavar="ID"
    )
    hub_public: bool = setting(False, "make a repository that --push_to_hub creates public", "output")
    tensorboard: bool = setting(True, "write TensorBoard files", "output")
    wandb: bool = setting(False, "log to Weights & Biases", "output")
    trackio: bool = setting(False, "log to Trackio", "output")

    def __post_init__(self) -> None:
        check_run_name(self.run_name)
        for name, facts in self._facts().items():
            _check(name, getattr(self, name), facts)
        if self.id is not None:
            check_run_name(self.id, "id")
        if self.rank >= self.nodes:
            raise UserError(
                f"--rank {self.rank} with --nodes {self.nodes}: nodes are counted from 0, so use 0 to {self.nodes - 1}"
            )
        for one, other in (("data", "datasets"), ("val", "val_datasets")):
            if getattr(self, one) and getattr(self, other):
                raise UserError(f"--{one} and the recipe's {other} both name the data: give one of them")
        if self.samples is not None and self.datasets:
            raise UserError(
                f"--samples {self.samples} goes with --data: here, give each of the recipe's datasets its own 'samples'"
            )
        if self.min_lr > self.lr:
            raise UserError(f"--min_lr {self.min_lr:g} is above --lr {self.lr:g}: lower min_lr, or raise lr")
        self._check_adapters()

    def _check_adapters(self) -> None:
        if self.momentum and self.optimizer != "sgd":
            raise UserError(
                f"--momentum {self.momentum:g} is for --optimizer sgd, and this run has {self.optimizer}: leave "
                "one of them out"
            )
        if self.load_in_4bit and self.weight_only_8bit:
            raise UserError("--load_in_4bit and --weight_only_8bit: use one of them")
        if self.lora is not None or self.adapter is not None:
            if self.adapter is not None and (self.lora_targets != ("all-linear",) or self.lora_modules_to_save):
                raise UserError(
                    f"--adapter {self.adapter} says which layers are trained: leave --lora_targets, "
                    "--lora_modules_to_save out"
                )
            if self.lora_dropout >= 1:
                raise UserError(
                    f"--lora_dropout {self.lora_dropout:g} would drop everything: use less than 1, such as 0.05"
                )
            return
        bits = "--load_in_4bit" if self.load_in_4bit else "--weight_only_8bit" if self.weight_only_8bit else None
        if bits is not None:
            raise UserError(
                f"{bits} keeps the base's weights in a form that cannot be trained in full: add --lora 16, or "
                f"leave {bits} out"
            )
        for name in (
            "lora_alpha",
            "lora_dropout",
            "lora_targets",
            "lora_rslora",
            "lora_modules_to_save",
            "merge_at_end",
        ):
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                raise UserError(f"--{name} is about adapters, and none are trained: add --lora 16, or leave it out")

    @property
    def has_validation(self) -> bool:
        return bool(self.val or self.val_datasets)

    @classmethod
    def _facts(cls) -> dict[str, Any]:
        return {name: entry.metadata for name, entry in cls.__dataclass_fields__.items()}


def _check(name: str, value: Any, facts: Any) -> None:
    if value is None or isinstance(value, bool):
        return
    if facts.get("choices") and value not in facts["choices"]:
        raise UserError(f"--{name} {value}: use one of {', '.join(facts['choices'])}")
    if not isinstance(value, int | float):
        return
    least, above, most = facts.get("least"), facts.get("above"), facts.get("most")
    if value != value or value in (float("inf"), float("-inf")):
        raise UserError(f"--{name} {value} is not a finite number")
    if least is not None and value < least:
        raise UserError(f"--{name} {value} must be at least {least:g}")
    if above is not None and value <= above:
        raise UserError(f"--{name} {value} must be above {above:g}")
    if most is not None and value > most:
        raise UserError(f"--{name} {value} must be at most {most:g}")
