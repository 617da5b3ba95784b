"""Every setting that changes what is computed names the test that compares it with something that does not run our
engine.

A new setting, or a new value of one, fails here until it has such a test, or is listed as one that changes no
arithmetic.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import optimization

from sft.config.schedule import SCHEDULES
from sft.config.settings import FIELDS
from sft.plan.schedule import learning_rate
from tests.distributed.parity_cases import AXES, IN_CI

ROOT = Path(__file__).parents[2]
_PARITY = "tests/distributed/test_parity.py::test_training_in_bfloat16_is_that_of_a_bare_loop"
_LAYOUTS = "tests/distributed/test_layouts.py::test_a_layout_trains_as_plain_transformers_does"
_ADAPTERS = "tests/distributed/test_adapters.py::test_adapters_train_as_with_peft"
_DROPOUT = "tests/distributed/test_adapters.py::test_the_same_is_dropped_on_every_layout_and_with_peft"
_UPDATES = "tests/unit/test_optimizer.py::test_updates_are_those_of_the_original"
_COMPILED = "tests/unit/test_compiled.py::test_compiled_layers_give_the_gradients_of_transformers"
_RATES = "tests/unit/test_references.py::test_learning_rates_are_those_of_transformers"
_MERGED = "tests/unit/test_merge.py::test_the_merged_model_is_that_of_peft"
_GOES_ON = "tests/distributed/test_adapter_command.py::test_training_goes_on_from_an_adapter_on_a_quantised_base"
_PROMPTS = "tests/unit/test_encode.py::test_trained_is_what_the_model_writes_at_generation"
_SHORTENED = "tests/unit/test_truncate.py::test_the_document_is_that_of_transformers_with_the_shortened_question"
_FORMATS = "tests/unit/test_formats.py::test_formats_are_recognised_and_named"


def axis(name: str, value: Any) -> tuple[str, str, Any]:
    """A value of an axis of the table in bfloat16."""
    return (_PARITY, name, value)


REFERENCES: dict[str, dict[Any, Any]] = {
    "optimizer": {name: axis("optimizer", name) for name in ("adamw", "adamw8bit", "adafactor", "muon", "sgd")},
    "momentum": {"any": axis("optimizer", "sgd, momentum")},
    "beta1": {"any": _UPDATES},
    "beta2": {"any": _UPDATES},
    "eps": {"any": _UPDATES},
    "weight_decay": {"any": _UPDATES},
    "clip": {"any": _UPDATES},
    "schedule": {name: (_RATES, name) for name in SCHEDULES},
    "schedule_cycles": {"any": _RATES},
    "schedule_power": {"any": _RATES},
    "decay_fraction": {"any": _RATES},
    "lr": {"any": _RATES},
    "min_lr": {"any": _RATES},
    "warmup_fraction": {"any": _RATES},
    "warmup_iters": {"any": _RATES},
    "dtype": {"fp32": _LAYOUTS, "bf16": _PARITY},
    "recompute": {name: axis("recompute", name) for name in ("none", "selective", "full")},
    "compile": {"off": _LAYOUTS, "auto": _COMPILED},
    "label_smoothing": {"any": _LAYOUTS},
    "loss_mask": {0.0: axis("loss_mask", 0.0), 0.5: axis("loss_mask", 0.5)},
    "sequence_parallel": {value: axis("sequence_parallel", value) for value in (True, False)},
    "tp": {"any": axis("layout", "tp2")},
    "pp": {"any": axis("layout", "pp2")},
    "nproc_per_node": {"any": axis("layout", "dp2")},
    "micro_batch": {"any": axis("pack", True)},
    "global_batch": {"any": (_LAYOUTS, "llama: dp2, 10 documents")},
    "lora": {"any": axis("mode", "adapters")},
    "lora_modules_to_save": {"any": axis("mode", "adapters, saved")},
    "load_in_4bit": {True: axis("mode", "4 bits")},
    "quantise": {"nf4": axis("mode", "4 bits"), "int8": axis("mode", "8 bits")},
    "weight_only_8bit": {True: axis("mode", "8 bits")},
    "lora_alpha": {"any": _ADAPTERS},
    "lora_targets": {"any": (_ADAPTERS, "llama: tp2 x dp2, head")},
    "lora_rslora": {True: (_ADAPTERS, "llama3-tied: rank-stabilised")},
    "lora_dropout": {"any": _DROPOUT},
    "adapter": {"any": _GOES_ON},
    "merge_at_end": {True: _MERGED},
    "template": {"any": _PROMPTS},
    "format": {"any": _FORMATS},
    "truncate": {"any": _SHORTENED},
    "truncate_side": {"any": _SHORTENED},
}
# Which documents are trained and how often, where things lie, who takes part, what is told: the arithmetic is the same.
NO_ARITHMETIC = {
    "run_name",
    "checkpoint",
    "size",
    "checkpoints_file",
    "intermediate_iter",
    "trust_remote_code",
    "tokenized_data_dir",
    "data",
    "val",
    "val_group",
    "datasets",
    "val_datasets",
    "samples",
    "question_key",
    "train_on",
    "weight_key",
    "chat_template_kwargs",
    "answer_key",
    "system_key",
    "text_key",
    "seq",
    "max_bad_rows",
    "retokenize",
    "append",
    "mix",
    "mix_temperature",
    "order",
    "epochs",
    "iters",
    "no_autoaccept_iters",
    "gradient_accumulation",
    "seed",
    "rank",
    "nodes",
    "addr",
    "port",
    "node_timeout",
    "gpu",
    "gpu_file",
    "hang_timeout",
    "replace_timeout",
    "hostfile",
    "max_restarts",
    "save_checkpoint_dir",
    "save_interval",
    "save_each_epoch",
    "eval_each_epoch",
    "keep",
    "id",
    "eval_interval",
    "early_stopping",
    "early_stopping_min_delta",
    "early_stopping_on",
    "push_to_hub",
    "hub_public",
    "tensorboard",
    "wandb",
    "trackio",
}


def test_every_setting_is_compared_with_a_reference_or_changes_no_arithmetic():
    names = set(FIELDS)
    assert not REFERENCES.keys() & NO_ARITHMETIC
    assert names == REFERENCES.keys() | NO_ARITHMETIC


def test_every_value_of_a_choice_is_compared():
    for field in FIELDS.values():
        choices = field.metadata.get("choices")
        if choices and field.name in REFERENCES and "any" not in REFERENCES[field.name]:
            assert REFERENCES[field.name].keys() == set(choices), field.name
    assert {name.partition(",")[0] for name in AXES["optimizer"]} == REFERENCES["optimizer"].keys()


@pytest.mark.parametrize(
    "reference",
    sorted({repr(value): value for values in REFERENCES.values() for value in values.values()}.values(), key=repr),
    ids=repr,
)
def test_the_reference_is_there_and_runs_in_ci(reference):
    test, *chosen = (reference,) if isinstance(reference, str) else reference
    file, _, function = test.partition("::")
    functions = [node for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)]
    found = next(node for node in functions if node.name == function)
    assert "slow" not in " ".join(ast.unparse(decorator) for decorator in found.decorator_list)
    if len(chosen) == 2:
        name, value = chosen
        assert any(row[name] == value for row in IN_CI)
    elif chosen and test != _RATES:
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        assert chosen[0] in module.CASES
        assert chosen[0] in getattr(module, "IN_CI", module.CASES)


_SHAPES = {
    "cosine_with_restarts": [{"cycles": 1}, {"cycles": 3}],
    "polynomial": [{"power": 1.0}, {"power": 2.5}],
    "wsd": [{"decay_fraction": 0.1}, {"decay_fraction": 0.45}, {"decay_fraction": 1.0}],
}
_WITHOUT_A_LEAST = ("linear", "inverse_sqrt", "cosine_with_restarts")  # in transformers


def their_rates(schedule, iterations, warmup, lr, min_lr, shape):
    """One for each iteration. Its step k is our iteration k: it begins with a rate of 0, which would train nothing."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    decay = min(-(-int(shape.get("decay_fraction", 0) * 1000) * iterations // 1000), iterations - warmup)
    name, further = {
        "cosine": ("cosine_with_min_lr", {"min_lr": min_lr}),
        "constant": ("constant_with_warmup", {}),
        "polynomial": ("polynomial", {"lr_end": min_lr, **shape}),
        "cosine_with_restarts": ("cosine_with_restarts", {"num_cycles": shape.get("cycles")}),
        "wsd": ("warmup_stable_decay", {"num_decay_steps": decay, "min_lr_ratio": min_lr / lr}),
    }.get(schedule, (schedule, {}))
    theirs = optimization.get_scheduler(name, optimizer, warmup, iterations, scheduler_specific_kwargs=further)
    for _ in range(iterations):
        optimizer.step()
        theirs.step()
        yield theirs.get_last_lr()[0]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("iterations", "fraction"), [(40, 0.1), (7, 0.5), (1, 0.0), (100, 0.03)])
def test_learning_rates_are_those_of_transformers(schedule, iterations, fraction):
    lr = 3e-4
    warmup = -(-int(fraction * 1000) * iterations // 1000)
    for shape in _SHAPES.get(schedule, [{}]):
        for min_lr in (0.0,) if schedule in _WITHOUT_A_LEAST else (0.0, 3e-5):
            found = [
                learning_rate(
                    number, iterations, lr=lr, min_lr=min_lr, warmup_fraction=fraction, schedule=schedule, **shape
                )
                for number in range(1, iterations + 1)
            ]
            theirs = list(their_rates(schedule, iterations, warmup, lr, min_lr, shape))
            assert found == pytest.approx(theirs, rel=1e-9, abs=1e-15), (shape, min_lr)
