"""Recipes of other trainers: each key is mapped, refused by name, or warned about."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from transformers import TrainingArguments

from sft.cli import entry
from sft.config import foreign
from sft.config.convert import convert
from sft.config.foreign import flat, trl
from sft.config.foreign.rules import own_keys
from sft.config.recipe import make_settings, read_recipe
from sft.config.secrets import is_secret_name
from sft.config.settings import Settings
from tests.conftest import Outcome
from tokenize_data.errors import UserError
from tokenize_data.recipe_file import parse_yaml

FOLDER = Path(__file__).parents[1] / "foreign"


def read(name: str) -> tuple[Settings, dict[str, str]]:
    """(the configuration, what was warned of, by key)."""
    warnings: list[str] = []
    found = make_settings(read_recipe(FOLDER / name, warnings.append))
    warned: dict[str, str] = {}
    for line in warnings:
        key, rest = line.split(": ")[1:3]
        warned |= dict.fromkeys(rest.split(", ") if "have no effect here" in key else [key], line)
    return found, warned


def test_a_full_fine_tune_of_the_handbook():
    found, warned = read("handbook_full.yaml")
    assert (found.model.checkpoint, found.model.dtype, found.data.seq, found.schedule.epochs, found.schedule.iters) == (
        "mistralai/Mistral-7B-v0.1",
        "bf16",
        2048,
        1.0,
        None,
    )
    assert (found.layout.micro_batch, found.schedule.gradient_accumulation) == (16, 4)
    assert [(spec.files, spec.weight) for spec in found.data.datasets] == [
        (("some/chats:all:train_sft",), 1.0),
        (("others/orders:train_sft",), 0.25),
    ]
    assert [spec.files for spec in found.data.val_datasets] == [
        ("some/chats:all:test_sft",),
        ("others/orders:test_sft",),
    ]
    assert found.data.template.startswith("{% for message in messages %}<|{{")
    assert (found.schedule.lr, found.schedule.schedule, found.schedule.min_lr, found.schedule.warmup_fraction) == (
        2e-5,
        "cosine",
        0.0,
        0.1,
    )
    assert (found.optimizer.beta2, found.optimizer.eps, found.optimizer.weight_decay, found.data.seed) == (
        0.999,
        1e-8,
        0.0,
        42,
    )
    assert (found.layout.recompute, found.objective.loss_mask, found.adapters.lora) == ("full", 1.0, None)
    assert (found.output.eval_interval, found.output.save_interval, found.output.keep) == (40, 100, 1)
    assert (found.output.push_to_hub, found.output.hub_public, found.output.tensorboard, found.output.wandb) == (
        "me/mistral-sft",
        False,
        True,
        True,
    )
    assert (found.data.run_name, found.output.save_checkpoint_dir) == ("mistral-sft", "data/mistral-sft")
    assert warned.keys() == {
        "attn_implementation",
        "preprocessing_num_workers",
        "gradient_checkpointing_kwargs",
        "hub_strategy",
        "log_level",
        "logging_steps",
        "logging_strategy",
        "overwrite_output_dir",
        "per_device_eval_batch_size",
        "remove_unused_columns",
    }
    assert len({line for line in warned.values() if "have no effect here" in line}) == 1
    assert warned["logging_steps"].endswith("handbook_full.yaml` says why")


def test_adapters_with_trl_s_names():
    found, warned = read("handbook_lora.yaml")
    assert (
        found.adapters.lora,
        found.adapters.lora_alpha,
        found.adapters.lora_dropout,
        found.adapters.lora_targets,
    ) == (8, 32.0, 0.05, ("q_proj", "v_proj"))
    assert (found.adapters.lora_modules_to_save, found.adapters.load_in_4bit, found.model.dtype) == (
        ("lm_head",),
        True,
        "bf16",
    )
    (spec,) = found.data.datasets
    assert (spec.files, spec.text_key) == (("some/chats:small:train",), "content")
    assert not found.data.has_validation
    assert (
        found.data.seq,
        found.schedule.iters,
        found.schedule.epochs,
        found.layout.micro_batch,
        found.schedule.gradient_accumulation,
    ) == (1024, 300, 2.0, 2, 8)
    assert (
        found.schedule.lr,
        found.schedule.schedule,
        found.schedule.warmup_iters,
        found.optimizer.clip,
        found.optimizer.weight_decay,
    ) == (2e-4, "constant", 20, 0.3, 0.01)
    assert (
        found.layout.recompute,
        found.objective.loss_mask,
        found.optimizer.optimizer,
        found.output.save_each_epoch,
    ) == ("none", 0.0, "adamw", True)
    assert (found.output.push_to_hub, found.output.tensorboard, found.data.run_name) == (None, False, "gemma-adapters")
    assert warned.keys() == {"packing", "logging_first_step", "logging_dir", "hub_model_id"}


def test_flat_files():
    found, warned = read("flat_full.yml")
    assert (found.model.checkpoint, found.schedule.lr, found.data.seq) == ("facebook/opt-350m", 1.41e-5, 512)
    assert (found.layout.micro_batch, found.schedule.gradient_accumulation) == (16, 4)
    assert [(spec.files, spec.text_key) for spec in found.data.datasets] == [(("owner/reviews:train",), "review")]
    assert (found.output.save_interval, found.output.keep, found.layout.recompute, found.output.push_to_hub) == (
        200,
        5,
        "full",
        "me/opt-reviews",
    )
    assert (found.adapters.lora, found.objective.loss_mask, found.schedule.schedule, found.data.run_name) == (
        None,
        1.0,
        "linear",
        "output",
    )
    assert warned.keys() == {"logging_steps", "peft_lora_r", "peft_lora_alpha", "gradient_checkpointing_kwargs"}
    found, warned = read("flat_lora.yml")
    assert (
        found.adapters.lora,
        found.adapters.lora_alpha,
        found.adapters.weight_only_8bit,
        found.adapters.load_in_4bit,
    ) == (16, 32.0, True, False)
    assert "activations are not rounded" in warned["load_in_8bit"]
    assert (found.schedule.iters, found.model.trust_remote_code, found.output.push_to_hub, found.data.run_name) == (
        500,
        True,
        None,
        "llama",
    )
    assert found.data.datasets[0].files == ("./rows.jsonl",)
    assert "adapters are on all linear layers here" in warned["use_peft"]


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.iterdir()))
def test_what_is_printed_has_each_key_and_runs_the_same(tmp_path, name):
    text, refused = convert(FOLDER / name)
    assert refused is None
    keys = parse_yaml((FOLDER / name).read_text(), name)
    assert [key for key in keys if f"{key}: " not in text and f"{key}:" not in text] == []
    (tmp_path / "new.yaml").write_text(text)
    assert make_settings(read_recipe(tmp_path / "new.yaml")) == read(name)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("fp16: true", "fp16: true: fp16 is not supported: use bf16: true"),
        ("neftune_noise_alpha: 5", "noise on embeddings is not added"),
        ("lr_scheduler_type: greedy", "there is no such schedule: use one of constant, cosine, "),
        ("lr_scheduler_type: cosine\nlr_scheduler_kwargs: {num_cycles: 2}", "num_cycles of lr_scheduler_kwargs"),
        ("lr_scheduler_kwargs: {power: 2}", "lr_scheduler_type says which schedule they belong to"),
        (
            "lr_scheduler_type: warmup_stable_decay\nlr_scheduler_kwargs: {num_decay_steps: 5}",
            "num_decay_steps needs max_steps",
        ),
        (
            "lr_scheduler_type: warmup_stable_decay\nlr_scheduler_kwargs: {decay_type: linear}",
            "leave decay_type and warmup_type out",
        ),
        ("optim: lion_32bit", "no such optimizer"),
        ("model_revision: abc", "download that revision"),
        ("use_dora: true", "LoRA is supported, DoRA is not"),
        ("bnb_4bit_quant_type: fp4", "NF4"),
        ("hub_token: hf_secret", "hub_token: '...': a secret does not belong in a recipe"),
        ("report_to: [mlflow]", "there is no mlflow"),
        ("label_smoothing_factor: 0.1", "labels are not smoothed"),
        ("learning_rte: 1", "did you mean 'learning_rate'?"),
        ("dataset_mixture: {datasets: [{id: a/b}], test_split_size: 5}", "make a file of the rows for validation"),
        ("save_steps: 0.1", "write save_interval, a number of iterations"),
        ("metric_for_best_model: accuracy", "the lowest loss"),
        ("save_steps: many", "save_steps: 'many': must be a number"),
        ("save_total_limit: []", "save_total_limit: []: must be a number"),
        ("warmup_steps: {a: 1}", "warmup_steps: {'a': 1}: must be a number"),
        ("warmup_steps: .inf", "warmup_steps: inf: must be a number"),
        ("eval_strategy: steps\neval_steps: x", "eval_steps: 'x': must be a number"),
        (
            "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: [1]",
            "lr_scheduler_kwargs: [1]: must be a mapping",
        ),
        (
            "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: low}",
            "min_lr: 'low': must be a number",
        ),
        ("dataset_mixture: {datasets: [{id: a/b, weight: much}]}", "weight: 'much': must be a number"),
        ("chat_template_path: someone/model", "save its Jinja file"),
        ("truncation_side: middle", "truncation_side: 'middle': use right or left (keep_start or keep_end)"),
        ("lora_task_type: SEQ_CLS", "causal language models only"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path, change, message):
    (tmp_path / "old.yaml").write_text(f"model_name_or_path: a/b\nper_device_train_batch_size: 1\n{change}\n")
    with pytest.raises(UserError) as error:
        read_recipe(tmp_path / "old.yaml")
    assert message in str(error.value)
    assert "hf_secret" not in str(error.value)
    text, refused = convert(tmp_path / "old.yaml")
    assert refused is not None
    assert message in refused
    assert "# refused: " in text


@pytest.mark.parametrize(
    ("keys", "truncate", "side", "warning"),
    [
        ("truncation_side: right", "right", "end", None),
        ("truncation_mode: keep_start", "right", "end", None),
        ("truncation_side: left", "question", "start", "truncation_side: 'left': only the longest question loses its"),
        ("truncation_mode: keep_end", "question", "start", "so that all answers stay"),
        ("max_prompt_length: 512", "question", "start", "max_prompt_length: 512: a question is shortened only if its"),
        ("max_prompt_length: 512\ntruncation_mode: keep_start", "question", "end", "by as much as needed"),
        ("max_prompt_length: null\ntruncation_mode: keep_start", "right", "end", None),
    ],
)
def test_documents_that_are_too_long(tmp_path, keys, truncate, side, warning):
    (tmp_path / "old.yaml").write_text(f"model_name_or_path: a/b\nmax_length: 64\n{keys}\n")
    warnings: list[str] = []
    data = make_settings(read_recipe(tmp_path / "old.yaml", warnings.append)).data
    assert (data.truncate, data.truncate_side, data.seq) == (truncate, side, 64)
    assert [warning in line for line in warnings] == [True] if warning else not warnings


def test_all_that_is_refused_is_said_at_once(tmp_path):
    (tmp_path / "old.yaml").write_text("model_name: a/b\nfp16: true\nuse_dora: true\nbatch_size: 2\n")
    with pytest.raises(UserError, match=r"cannot be run as it is: fp16: .*; use_dora: "):
        read_recipe(tmp_path / "old.yaml")


def test_rank_stabilised_adapters_stay_so(tmp_path):
    (tmp_path / "old.yaml").write_text("model_name_or_path: a/b\nuse_peft: true\nlora_r: 4\nuse_rslora: true\n")
    found = make_settings(read_recipe(tmp_path / "old.yaml"))
    assert (found.adapters.lora, found.adapters.lora_rslora) == (4, True)


def test_our_own_keys_are_taken_beside_theirs(tmp_path):
    (tmp_path / "old.yaml").write_text(
        "model_name_or_path: a/b\nmax_seq_length: 512\ntp: 4\nsave_checkpoint_dir: out\n"
    )
    (tmp_path / "new.yaml").write_text("extends: old.yaml\nseq: 256\n")
    found = make_settings(read_recipe(tmp_path / "new.yaml"))
    assert (found.layout.tp, found.output.save_checkpoint_dir, found.data.seq, found.data.run_name) == (
        4,
        "out",
        256,
        "old",
    )
    assert not foreign.is_foreign({"run_name": "r", "seed": 1, "lr": 1.0})


@pytest.mark.parametrize(
    ("ours", "expected"), [("", (1, 64)), ("global_batch: 32\n", (None, 32)), ("gradient_accumulation: 2\n", (2, 64))]
)
def test_our_batch_replaces_their_default_accumulation(tmp_path, ours, expected):
    (tmp_path / "old.yaml").write_text(f"model_name_or_path: a/b\nmax_seq_length: 512\n{ours}")
    found = make_settings(read_recipe(tmp_path / "old.yaml"))
    assert (found.schedule.gradient_accumulation, found.schedule.global_batch) == expected


def test_every_setting_of_transformers_is_known():
    names = {entry.name for entry in dataclasses.fields(TrainingArguments)}
    assert sorted(names - trl.RULES.keys()) == []
    assert sorted(names - flat.RULES.keys()) == []


def test_the_command(bench, tmp_path):
    from sft.cli import entry

    done: Outcome = bench._run(entry, ["convert-recipe", FOLDER / "flat_full.yml"])
    assert done.code == 0, done.err
    assert "micro_batch: 16  # was batch_size: 16; number of documents of seq tokens that fit" in done.out
    refused = bench._run(entry, ["convert-recipe", bench.write("model_name: a/b\nfp16: true\n", "old.yaml")])
    assert refused.code == 2
    assert "# refused: fp16: true: " in refused.out
    assert "cannot be run as it is: fp16" in refused.err
    ours = bench._run(entry, ["convert-recipe", bench.write("run_name: r\n", "ours.yaml")])
    assert ours.code == 2
    assert "has no key of another trainer's recipe" in ours.err


@pytest.mark.parametrize(
    "line",
    [
        "wandb_api_key: {}",
        "hub_token: {}",
        "env: {{WANDB_API_KEY: {}}}",
        "password: {}",
        "report_to: [{{api_key: {}}}]",
        "extra: 'https://me:{}@host/x'",
        "note: {}",
    ],
)
def test_secrets_are_not_printed(tmp_path: Path, line: str, capsys: pytest.CaptureFixture[str]):
    secret = "0123456789abcdef0123456789abcdef01234567"
    file = tmp_path / "old.yaml"
    file.write_text(
        "learning_rate: 1e-5\nper_device_train_batch_size: 1\ndataset_name: a.jsonl\nmodel_name_or_path: "
        f"b\n{line.format(secret)}\n"
    )
    entry(["convert-recipe", str(file)])
    entry(["train", "--config", str(file)])
    said = "".join(capsys.readouterr())
    assert secret[:12] not in said
    assert "[hidden]" in said or "'...'" in said


def test_a_secret_name_is_none_of_the_usual_ones():
    assert not [
        name
        for name in own_keys() | {"max_new_tokens", "eos_token_id", "tokenizer_name", "key", "add_tokens"}
        if is_secret_name(name)
    ]


def test_a_data_set_s_name_may_be_no_file_s(tmp_path):
    (tmp_path / "old.yaml").write_text(f"model_name: a/b\nbatch_size: 1\ndataset_name: {'a' * 300}\n")
    (found,) = make_settings(read_recipe(tmp_path / "old.yaml")).data.datasets
    assert found.files == ("a" * 300 + ":train",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr_scheduler_type: inverse_sqrt", {"schedule": "inverse_sqrt", "min_lr": 0.0}),
        (
            "lr_scheduler_type: polynomial\nlr_scheduler_kwargs: {lr_end: 1.0e-6, power: 2}",
            {"schedule": "polynomial", "min_lr": 1e-6, "schedule_power": 2.0},
        ),
        (
            "lr_scheduler_type: cosine_with_restarts\nlr_scheduler_kwargs: {num_cycles: 4}",
            {"schedule": "cosine_with_restarts", "min_lr": 0.0, "schedule_cycles": 4},
        ),
        (
            "lr_scheduler_type: warmup_stable_decay\nmax_steps: 50\nlearning_rate: 1.0e-3\n"
            "lr_scheduler_kwargs: {num_decay_steps: 5, min_lr_ratio: 0.1}",
            {"schedule": "wsd", "min_lr": 1e-4, "decay_fraction": 0.09},
        ),
    ],
)
def test_schedules(tmp_path, text, expected):
    (tmp_path / "r.yaml").write_text(f"model_name_or_path: m\n{text}\n")
    found = make_settings(read_recipe(tmp_path / "r.yaml"))
    assert {name: found.value(name) for name in expected} == pytest.approx(expected)


def test_once_an_epoch(tmp_path):
    text = "model_name_or_path: m\nevaluation_strategy: epoch\nsave_strategy: epoch\nsave_steps: 7\neval_steps: 9\n"
    (tmp_path / "r.yaml").write_text(
        f"{text}load_best_model_at_end: true\nearly_stopping_patience: 3\nearly_stopping_threshold: 0.01\n"
    )
    warnings: list[str] = []
    output = make_settings(read_recipe(tmp_path / "r.yaml", warnings.append)).output
    assert (output.eval_each_epoch, output.save_each_epoch) == (True, True)
    assert (output.early_stopping, output.early_stopping_min_delta) == (3, 0.01)
    assert warnings == []
