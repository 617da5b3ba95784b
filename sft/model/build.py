"""Builds this rank's stage from a configuration: on the meta device, cut to the rank's share, then given memory.
Weights are loaded later.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping

from sft.config.quantisation import Quantisation
from sft.families.table import family_of
from sft.model import attention, matmul, norms
from sft.model.anatomy import Anatomy, find_anatomy
from sft.model.collectives import TensorGroup
from sft.model.dropout import Keys
from sft.model.lora import Adapted, LoraSettings, adapt
from sft.model.parts import take_apart
from sft.model.quantized import QuantizedWeight, quantize
from sft.model.stage import Stage
from sft.model.tensor_parallel import ParameterShard, parallelise
from tokenize_data.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BuiltStage:
    """A stage and the facts about its parameters, by Hugging Face name."""

    stage: Stage
    parameters: dict[str, nn.Parameter]
    places: dict[str, ParameterShard]
    anatomy: Anatomy
    all_places: dict[str, ParameterShard]  # of the whole model, without adapters
    tied_name: str | None  # the parameter that is both embedding and head
    base_prefix: str
    ignored: tuple[str, ...]  # patterns of tensors in files that the model ignores
    renames: tuple[tuple[str, str], ...]  # (pattern, replacement) from names in files to the model's own
    adapted: Adapted | None = None  # the adapters, if not all weights are trained
    quantized: dict[str, QuantizedWeight] = field(default_factory=dict)  # frozen weights that are not parameters


def build_stage(
    config: Any,
    layers: range,
    group: TensorGroup,
    *,
    sequence_parallel: bool,
    recompute: str,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    lora: LoraSettings | None = None,
    quantisation: Quantisation | None = None,
) -> BuiltStage:
    """Build this rank's `layers` of the model that `config` describes, with uninitialised memory on `device`. With
    `lora`, adapters are trained instead of the weights; with `quantisation`, frozen linear weights are kept in that
    format.
    """
    model = make_on_meta(config, dtype, trust_remote_code)
    anatomy = find_anatomy(model)
    all_places = parallelise(model, anatomy, group, sequence_parallel)
    keys = Keys()
    adapted = adapt(model, anatomy, lora, all_places, keys, group) if lora is not None else None
    quantized = quantize(model, anatomy, quantisation, device) if quantisation is not None else {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    head, embedding = model.get_submodule(anatomy.head), model.get_submodule(anatomy.embedding)
    tied_name = f"{anatomy.embedding}.weight" if head.weight is embedding.weight else None
    ignored = ignored_of(model)
    renames = renames_of(model)
    matmul.use_in(model)
    if device.type == "cpu" and dtype is not torch.float32:
        norms.use_in(model)
    stage = Stage(take_apart(model, anatomy), layers, group, sequence_parallel=sequence_parallel, recompute=recompute)
    parameters = _give_memory(stage, names, device)
    if adapted is not None:
        stage.fill_up(device)
        if adapted.settings.dropout:
            stage.drop_with(keys)
    own = {f"{anatomy.layers}.{layer}." for layer in layers}
    quantized = {name: weight for name, weight in quantized.items() if any(name.startswith(prefix) for prefix in own)}
    places = {**all_places, **(adapted.places if adapted is not None else {})}
    places = {name: places[name] for name in (*parameters, *quantized)}
    return BuiltStage(
        stage=stage,
        parameters=parameters,
        places=places,
        anatomy=anatomy,
        all_places=all_places,
        tied_name=tied_name,
        base_prefix=model.base_model_prefix,
        ignored=ignored,
        renames=renames,
        adapted=adapted,
        quantized=quantized,
    )


def make_on_meta(config: Any, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """Make the whole model without memory for its parameters. Buffers are real: they are small, and computed instead
    of loaded.
    """
    kind = (config.architectures or [config.model_type])[0]
    config = without_dropout(config)
    try:
        with _parameters_on_meta():  # in float32, so that buffers are not computed from values rounded to `dtype`
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", dtype=torch.float32, trust_remote_code=trust_remote_code
            )
    except ValueError as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"{kind} is not a causal language model that transformers knows ({reason}): it cannot be trained here"
        ) from error
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    if not family_of(config.model_type).takes_row_mask:
        model.set_attn_implementation(attention.NAME)
    return model


def without_dropout(config: Any) -> Any:
    """Switch the model's dropout off: otherwise the loss would depend on the layout."""
    config = copy.deepcopy(config)
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, name, 0.0)
    config.use_cache = False
    return config


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that are registered meanwhile lose their memory at once. (`torch.device("meta")` would take the
    buffers' values too.)
    """

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> Any:
        if parameter.device.type == "meta":
            return None  # keep the parameter as it is
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(on_meta)
    try:
        yield
    finally:
        hook.remove()


def renames_of(model: Any) -> tuple[tuple[str, str], ...]:
    """Renamed parameters in newer releases of transformers, such as GPT-NeoX's head."""
    conversions = [entry for entry in get_model_conversion_mapping(model) if type(entry).__name__ == "WeightRenaming"]
    return tuple((entry.source_patterns[0], entry.target_patterns[0]) for entry in conversions)


def ignored_of(model: Any) -> tuple[str, ...]:
    """Patterns of tensors in files that the model ignores."""
    theirs = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return (*theirs, *family_of(model.config.model_type).ignored_tensors)


def _give_memory(stage: Stage, names: dict[int, str], device: torch.device) -> dict[str, nn.Parameter]:
    """Replace the stage's meta parameters by real ones; tied parameters stay one object."""
    made: dict[int, nn.Parameter] = {}
    parameters: dict[str, nn.Parameter] = {}
    for module in stage.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(
                    torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad
                )
                parameters[names[id(parameter)]] = made[id(parameter)]
            setattr(module, key, made[id(parameter)])
    return parameters
