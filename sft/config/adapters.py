"""Settings: LoRA adapters, and a quantised base under them."""

from __future__ import annotations

from dataclasses import dataclass

from sft.config.quantisation import QUANTISATIONS, Quantisation, quantisation_of
from tokenize_data.errors import UserError
from tokenize_data.settings import Group, fields_of, setting

ALL_LINEAR = ("all-linear",)
_NEEDS_ADAPTERS = ("lora_alpha", "lora_dropout", "lora_targets", "lora_rslora", "lora_modules_to_save", "merge_at_end")


@dataclass(frozen=True, kw_only=True)
class AdapterSettings(Group):
    lora: int | None = setting(
        None, "train adapters of this rank instead of the weights", metavar="R", least=1, fixed=True, suffix=(4, "lora")
    )
    lora_alpha: float | None = setting(
        None, "scale of the adapters: alpha / R (default: 2R)", metavar="A", above=0, fixed=True
    )
    lora_dropout: float = setting(0.0, "dropout before the adapters", metavar="D", least=0, most=1, fixed=True)
    lora_targets: tuple[str, ...] = setting(
        ALL_LINEAR, "layers with adapters: all-linear, or names", metavar="NAME", fixed=True
    )
    lora_rslora: bool = setting(False, "scale adapters by alpha / sqrt(R)", fixed=True)
    lora_modules_to_save: tuple[str, ...] = setting((), "modules to train in full as well", metavar="NAME", fixed=True)
    adapter: str | None = setting(None, "start from this adapter, a folder in PEFT's format", metavar="DIR")
    load_in_4bit: bool = setting(False, "keep the frozen base weights in 4 bits (NF4)", fixed=True)
    weight_only_8bit: bool = setting(
        False, "keep the frozen base weights in 8 bits, one scale per row; activations are not quantised", fixed=True
    )
    quantise: str | None = setting(
        None,
        "keep the frozen base weights in this format: nf4 is --load_in_4bit, int8 is --weight_only_8bit",
        choices=QUANTISATIONS,
        fixed=True,
    )
    merge_at_end: bool = setting(False, "also write the merged model to hf/")

    @property
    def quantisation(self) -> Quantisation | None:
        """The format of the frozen base."""
        return quantisation_of(vars(self))

    @property
    def has_dropout(self) -> bool:
        return self.lora is not None and self.lora_dropout > 0

    @property
    def alpha(self) -> float:
        assert self.lora is not None
        return self.lora_alpha or 2.0 * self.lora

    def check(self) -> None:
        formats = [f"--{name}" for name in ("load_in_4bit", "weight_only_8bit") if getattr(self, name)]
        formats += [f"--quantise {self.quantise}"] if self.quantise else []
        if len(formats) > 1:
            raise UserError(f"{' and '.join(formats)} exclude each other: use one of them")
        if self.lora is None and self.adapter is None:
            self._refuse_options_of_adapters()
        elif self.adapter is not None and (self.lora_targets != ALL_LINEAR or self.lora_modules_to_save):
            raise UserError(
                f"--adapter {self.adapter} fixes which layers are trained: leave out --lora_targets and "
                "--lora_modules_to_save"
            )
        elif self.lora_dropout >= 1:
            raise UserError(f"--lora_dropout {self.lora_dropout:g} drops everything: use less than 1, such as 0.05")

    def _refuse_options_of_adapters(self) -> None:
        for name in ("load_in_4bit", "weight_only_8bit", "quantise"):
            if getattr(self, name):
                raise UserError(
                    f"--{name} freezes the base weights, so full fine-tuning is not possible: add --lora 16, or leave "
                    f"--{name} out"
                )
        defaults = {entry.name: entry.default for entry in fields_of(type(self))}
        for name in _NEEDS_ADAPTERS:
            if getattr(self, name) != defaults[name]:
                raise UserError(f"--{name} needs adapters, and this run trains none: add --lora 16, or leave it out")
