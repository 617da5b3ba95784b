"""The configuration: flags, checks, the run's name."""

from __future__ import annotations

import argparse
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from sft.config.flags import add_flags, typed_values
from sft.config.settings import FIELDS, Settings
from sft.resolve.naming import intermediate_name, layout_of_path, run_folder
from tokenize_data.errors import UserError


def parse(*argv: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return Settings.of(**typed_values(parser.parse_args(argv)))


def test_every_field_is_a_flag_and_defaults_are_the_dataclass_s():
    assert parse("--run_name", "r") == Settings.of(run_name="r")
    parser = argparse.ArgumentParser()
    add_flags(parser)
    text = parser.format_help()
    assert all(f"--{entry.name}" in text for entry in FIELDS.values() if entry.metadata.get("flag") is not False)


def test_values_that_users_scripts_give():
    settings = parse(
        "--checkpoint",
        "meditron",
        "--size",
        "70",
        "--run_name",
        "pubmedqa",
        "--data",
        "a.jsonl",
        "b.jsonl",
        "--val",
        "--epochs",
        "1.5",
        "--tp",
        "8",
        "--loss_mask",
        "0.5",
        "--no_autoaccept_iters",
        "--no_tensorboard",
        "--no_sequence_parallel",
        "--lr",
        "1e-5",
        "--addr",
        "10.0.0.1",
    )
    assert (settings.model.checkpoint, settings.model.size, settings.data.data, settings.data.val) == (
        "meditron",
        "70",
        ("a.jsonl", "b.jsonl"),
        (),
    )
    assert (
        settings.schedule.epochs,
        settings.layout.tp,
        settings.objective.loss_mask,
        settings.schedule.lr,
        settings.machine.addr,
    ) == (1.5, 8, 0.5, 1e-5, "10.0.0.1")
    assert settings.schedule.no_autoaccept_iters
    assert not settings.output.tensorboard
    assert settings.layout.sequence_parallel is False
    assert Settings.of(run_name="r").layout.sequence_parallel is None


def test_it_is_frozen():
    with pytest.raises(FrozenInstanceError):
        Settings.of(run_name="r").schedule.lr = 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"run_name": "a/b"}, "--run_name 'a/b'"),
        ({"id": "../x"}, "letters, digits"),
        ({"seq": 1}, "--seq 1 must be at least 2"),
        ({"epochs": 0.0}, "--epochs 0.0 must be above 0"),
        ({"epochs": float("nan")}, "--epochs nan is not a finite number"),
        ({"lr": float("inf")}, "not a finite number"),
        ({"loss_mask": 1.5}, "--loss_mask 1.5 must be at most 1"),
        (
            {"load_in_4bit": True},
            "--load_in_4bit freezes the base weights, so full fine-tuning is not possible: add --lora 16, or leave",
        ),
        (
            {"load_in_4bit": True, "weight_only_8bit": True, "lora": 8},
            "--load_in_4bit and --weight_only_8bit exclude each other: use one of them",
        ),
        ({"lora_alpha": 8.0}, "--lora_alpha needs adapters, and this run trains none: add --lora 16, or leave it out"),
        ({"merge_at_end": True}, "--merge_at_end needs adapters"),
        ({"momentum": 0.9}, "--momentum 0.9 is for --optimizer sgd, but this run uses adamw: leave one out"),
        ({"lora": 8, "lora_dropout": 1.0}, "--lora_dropout 1 drops everything"),
        ({"adapter": "a", "lora_targets": ("q_proj",)}, "--adapter a fixes which layers are trained"),
        ({"schedule": "cosin"}, "--schedule cosin: use one of cosine, linear, constant"),
        ({"optimizer": "adam"}, "use one of adamw"),
        ({"dtype": "fp16"}, "use one of bf16, fp32"),
        ({"rank": 2, "nodes": 2}, "--rank 2 with --nodes 2: nodes are counted from 0, so use 0 to 1"),
        ({"min_lr": 1e-3}, "--min_lr 0.001 is above --lr 2e-05"),
        ({"global_batch": 0}, "--global_batch 0 must be at least 1"),
        ({"port": 70000}, "--port 70000 must be at most 65535"),
    ],
)
def test_values_that_make_no_sense(values, message):
    with pytest.raises(UserError) as error:
        Settings.of(**{"run_name": "r", **values})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, "llama-7-baseline-r"),
        ({"checkpoint": "meditron", "size": "70"}, "llama-70-meditron-r"),
        ({"checkpoint": "models/tiny"}, "llama-tiny-r"),
        ({"epochs": 5.0, "seq": 4096, "loss_mask": 0.5}, "llama-7-baseline-r-ep5-seq4096-loss0.5"),
        ({"intermediate_iter": 800, "epochs": 1.5, "id": "again"}, "llama-7-baseline-r-it0000800-ep1.5-again"),
        ({"lr": 1e-4, "save_interval": 5}, "llama-7-baseline-r"),
    ],
)
def test_the_run_s_folder(values, name):
    is_entry = "/" not in values.get("checkpoint", "")
    assert (
        run_folder(Settings.of(run_name="r", save_checkpoint_dir="out", **values), "llama", is_entry)
        == Path("out") / name
    )


@pytest.mark.parametrize(
    ("path", "layout"),
    [
        ("/m/llama2-70b-tp8-pp4", (8, 4)),
        ("llama-tp2-pp1/hf", (2, 1)),
        ("/m/llama-tp8", None),
        ("plain", None),
        ("x-tp2-pp22b", None),
    ],
)
def test_layouts_in_paths(path, layout):
    assert layout_of_path(path) == layout


def test_early_releases():
    assert intermediate_name("iter_{iter:07d}", 800, "x.toml") == "iter_0000800"
    for pattern, message in ((None, "has no 'intermediate' pattern"), ("iter_{step}", "cannot be filled")):
        with pytest.raises(UserError, match=message):
            intermediate_name(pattern, 800, "x.toml")
