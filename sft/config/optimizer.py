"""The optimizers, and what planner, engine and checkpoint need to know about each. A new one is a line here and a file
in `optimizer`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tokenize_data.errors import UserError
from tokenize_data.settings import Group, setting


@dataclass(frozen=True, kw_only=True)
class OptimizerKind:
    """Bytes of state per trained weight, besides float32 weights: for matrices inside the layers, and for everything
    else.
    """

    matrix_bytes: float
    other_bytes: float
    needs_whole_matrices: bool = (
        False  # a replica owns whole tensors instead of rows, and tensor ranks gather their parts
    )
    is_factored: bool = False  # matrices have one row and one column of moments
    states: tuple[str, ...] = ()  # names of its states in checkpoints, sorted


_EIGHT_BITS = 2 * (1 + 4 / 256)  # two codes, and a float32 factor per block of 256

_ADAMW = ("exp_avg", "exp_avg_sq")

OPTIMIZERS = {
    "adamw": OptimizerKind(matrix_bytes=8.0, other_bytes=8.0, states=_ADAMW),
    "adamw8bit": OptimizerKind(matrix_bytes=_EIGHT_BITS, other_bytes=_EIGHT_BITS, states=_ADAMW),
    "adafactor": OptimizerKind(
        matrix_bytes=0.0,
        other_bytes=4.0,
        needs_whole_matrices=True,
        is_factored=True,
        states=("exp_avg_sq", "exp_avg_sq_col", "exp_avg_sq_row"),
    ),
    "sgd": OptimizerKind(matrix_bytes=0.0, other_bytes=0.0),
    "muon": OptimizerKind(
        matrix_bytes=4.0, other_bytes=8.0, needs_whole_matrices=True, states=(*_ADAMW, "momentum_buffer")
    ),
}


def kind_of(name: str, momentum: float = 0.0) -> OptimizerKind:
    """The kind of an optimizer; SGD has a state only with momentum."""
    kind = OPTIMIZERS[name]
    return (
        replace(kind, matrix_bytes=4.0, other_bytes=4.0, states=("momentum_buffer",))
        if name == "sgd" and momentum
        else kind
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """A run's optimizer. float32 weights are updated in place; bfloat16 weights have float32 masters."""

    name: str
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    momentum: float = 0.0  # of SGD

    @property
    def kind(self) -> OptimizerKind:
        return kind_of(self.name, self.momentum)

    @property
    def states(self) -> list[str]:
        """The states that a checkpoint holds besides float32 weights."""
        return list(self.kind.states)


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Group):
    optimizer: str = setting(
        "adamw",
        "adamw8bit: moments in 8 bits; adafactor: factored second moments; sgd; muon: for matrices inside the layers, "
        "adamw for the rest",
        choices=tuple(OPTIMIZERS),
        fixed=True,
    )
    beta1: float = setting(0.9, "AdamW's first decay rate", metavar="B", least=0, most=1)
    beta2: float = setting(0.95, "AdamW's second decay rate", metavar="B", least=0, most=1)
    eps: float = setting(1e-5, "AdamW's epsilon", above=0)
    momentum: float = setting(0.0, "momentum of sgd", metavar="M", least=0, most=1)
    weight_decay: float = setting(0.1, "not applied to biases and norms", metavar="W", least=0)
    clip: float = setting(1.0, "largest gradient norm; 0 turns clipping off", metavar="C", least=0)

    def check(self) -> None:
        if self.momentum and self.optimizer != "sgd":
            raise UserError(
                f"--momentum {self.momentum:g} is for --optimizer sgd, but this run uses {self.optimizer}: leave "
                "one out"
            )

    def spec(self, lr: float) -> OptimizerSpec:
        return OptimizerSpec(
            name=self.optimizer,
            lr=lr,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
        )
