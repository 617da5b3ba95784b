"""Recipes for TRL's SFT script and the alignment-handbook: ModelConfig, ScriptArguments, SFTConfig and
TrainingArguments in one file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sft.config.foreign import data, shared
from sft.config.foreign.rules import (
    Line,
    Rule,
    Trainer,
    mapped,
    no_effect,
    number,
    of_words,
    off,
    only,
    part_of,
    refused,
    to,
    warned,
)
from sft.config.foreign.shared import run_name_of as run_name_of
from sft.config.output import KEEP_BEST

_LORA = {
    "lora_r": ("lora", 16),
    "lora_alpha": ("lora_alpha", 32.0),
    "lora_dropout": ("lora_dropout", 0.05),
    "lora_target_modules": ("lora_targets", None),
    "lora_modules_to_save": ("lora_modules_to_save", None),
    "use_rslora": ("lora_rslora", None),
}
_PACKED = "documents are packed, none is padded"
_LAUNCH = "processes are started and joined by sft"
_LOADER = "rows are read from Arrow files that are mapped into memory"
_LOGS = "every iteration is in metrics.jsonl"
_LAYOUT = "the layout is tp x pp x dp with ZeRO-1: see --tp, --pp"


def _peft(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    if not value:
        return mapped(key, value, {}, "all weights are trained")
    ours = {}
    for theirs, (name, default) in _LORA.items():
        given = recipe.get(theirs)
        if given is not None or default is not None:
            ours[name] = given if given is not None else default
    if recipe.get("lora_target_modules") is None:
        return warned(
            key, value, "adapters are on all linear layers here, where peft chooses by family: see lora_targets", ours
        )
    return mapped(key, value, ours)


def _lora(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    return (
        mapped(key, value, {}, "see use_peft")
        if recipe.get("use_peft")
        else warned(key, value, "no effect without use_peft")
    )


def _template(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    text = str(value)
    if "{%" in text or "{{" in text:
        return mapped(key, value, {"template": text}, "the template itself")
    return refused(key, value, "neither a Jinja text nor a file: use template with a packaged name or a file")


def _template_path(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    if str(value).endswith((".jinja", ".j2")):
        return mapped(key, value, {"template": str(value)})
    return refused(key, value, "the template of another tokenizer: save its Jinja file, and give that as template")


def _evaluation(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    if value is False or value == "no":
        return mapped(key, value, {}, "no validation data are read")
    if value == "steps":
        steps = number("eval_steps", recipe.get("eval_steps") or recipe.get("logging_steps") or 500)
        if steps < 1:
            return refused("eval_steps", steps, "a share of the run: write eval_interval, a number of iterations")
        return mapped(key, value, {"eval_interval": int(steps)})
    if value == "epoch":
        return mapped(key, value, {"eval_each_epoch": True})
    return refused(key, value, "use steps, epoch or no")


def _loss_of_completions(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    return mapped(
        key, value, {"loss": "completion"} if value else {}, "the answers, as the family's template marks them"
    )


def _best(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    if not value:
        return mapped(key, value, {}, "the last model is exported, unless early_stopping is set")
    if recipe.get("early_stopping_patience"):
        return mapped(key, value, {}, "see early_stopping_patience")
    return mapped(
        key, value, {"early_stopping": KEEP_BEST}, "keeps and exports the best model; a smaller number stops early, too"
    )


def _metric(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    return (
        mapped(key, value, {}, "the validation loss")
        if value in ("loss", "eval_loss")
        else refused(key, value, "the best model has the lowest loss")
    )


def _revision(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    if value == "main":
        return mapped(key, value, {}, "the newest")
    return refused(key, value, "download that revision, and give its folder as model_name_or_path")


def _samples(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    return refused(key, value, "give each of the datasets its own 'samples'")


_NO_EFFECT = {
    "attn_implementation use_flash_attention_2": "torch's attention, which chooses its kernel",
    "preprocessing_num_workers": "the data stage uses every core",
    "per_device_eval_batch_size eval_accumulation_steps auto_find_batch_size": "validation uses the rows of training",
    "pad_token pad_to_multiple_of padding_free eval_packing packing_strategy group_by_length train_sampling_strategy "
    "length_column_name "
    "use_liger_kernel liger_kernel_config": _PACKED,
    "dataset_kwargs remove_unused_columns label_names": "a row's format says what is used",
    "include_for_metrics include_inputs_for_metrics": "a row's format says what is used",
    "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
    "dataloader_multiprocessing_context dataloader_in_order dataloader_drop_last": _LOADER,
    "dispatch_batches split_batches": _LOADER,
    "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout "
    "local_rank "
    "log_on_each_node save_on_each_node accelerator_config": _LAUNCH,
    "deepspeed fsdp fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap parallelism_config": _LAYOUT,
    "log_level log_level_replica disable_tqdm debug skip_memory_metrics include_num_input_tokens_seen "
    "include_tokens_per_second "
    "logging_nan_inf_filter": _LOGS,
    "tf32 full_determinism torch_empty_cache_steps torch_compile torch_compile_backend torch_compile_mode use_cache "
    "average_tokens_across_devices model_init_kwargs device_map low_cpu_mem_usage": "the engine decides that",
    "do_train do_predict": "`sft` trains",
    "save_safetensors save_only_model enable_jit_checkpoint": "checkpoints are safetensors, with the optimizer's state",
    "overwrite_output_dir resume_from_checkpoint": "the same command resumes",
    "ignore_data_skip restore_callback_states_from_checkpoint": "the same command resumes",
    "hub_strategy hub_always_push": "the model is uploaded once, at the end",
    (
        "project trackio_space_id trackio_bucket_id trackio_static_space_id wandb_entity wandb_project wandb_run_group"
    ): "see Watching a run",
    "data_seed": "the order of the data follows seed",
    "eval_on_start eval_delay prediction_loss_only eval_do_concat_batches eval_use_gather_object batch_eval_metrics "
    "bf16_full_eval "
    "fp16_full_eval": "loss, perplexity and accuracy of all validation data, every eval_interval iterations",
    "greater_is_better": "loss, perplexity and accuracy of all validation data, every eval_interval iterations",
    "auto_insert_empty_system_msg": "no empty system message is added",
    "shuffle_dataset": "the order is shuffled by seed for each epoch",
    "dataset_streaming": "data are tokenised once, from files",
    "ignore_bias_buffers": "there are none",
    "use_bnb_nested_quant bnb_4bit_quant_storage": "what quantisation keeps beside the weights cannot be set",
    "bnb_4bit_use_double_quant": "what quantisation keeps beside the weights cannot be set",
    "optim_target_modules": "for optimizers that are not supported",
    (
        "jit_mode_eval use_ipex use_mps_device no_cuda half_precision_backend fp16_opt_level fp16_backend past_index"
    ): "not here",
}
RULES: dict[str, Rule] = {
    **{name: no_effect(why) for names, why in _NO_EFFECT.items() for name in names.split()},
    **shared.RULES,
    "model_name_or_path": to("checkpoint"),
    "model_revision": _revision,
    "base_model_revision": _revision,
    "model_code_revision": _revision,
    "tokenizer_name_or_path": lambda key, value, recipe: (
        mapped(key, value, {}, "the base's own")
        if value == recipe.get("model_name_or_path")
        else refused(key, value, "the tokenizer is the base's: put its files into the base's folder")
    ),
    "torch_dtype": of_words(
        "dtype", {"bfloat16": "bf16", "float32": "fp32", "auto": {}}, "weights are trained in bf16 or fp32"
    ),
    "dtype": of_words(
        "dtype", {"bfloat16": "bf16", "float32": "fp32", "bf16": "bf16", "fp32": "fp32", "auto": {}}, "use bf16 or fp32"
    ),
    "bnb_4bit_quant_type": only("nf4", why="4 bits are NF4 here"),
    "bnb_4bit_compute_dtype": only("bfloat16", why="computed in bfloat16"),
    "use_peft": _peft,
    **dict.fromkeys(_LORA, _lora),
    "lora_task_type": only("CAUSAL_LM", why="causal language models only"),
    "lora_target_parameters": off("adapters are on linear layers: use lora_targets"),
    "use_dora": off("LoRA is supported, DoRA is not"),
    "dataset_mixer": data.mixer,
    "dataset_mixture": data.mixture,
    "dataset_name": data.named,
    "dataset_splits": part_of("dataset_mixer"),
    "dataset_configs": part_of("dataset_mixer"),
    "dataset_config": part_of("dataset_name"),
    "dataset_config_name": part_of("dataset_name"),
    "dataset_train_split": part_of("dataset_name"),
    "dataset_test_split": part_of("dataset_name"),
    "text_column": part_of("dataset_name", "dataset_mixer", "dataset_mixture"),
    "dataset_text_field": part_of("dataset_name", "dataset_mixer", "dataset_mixture"),
    "max_train_samples": _samples,
    "max_eval_samples": _samples,
    "chat_template": _template,
    "chat_template_path": _template_path,
    "system_prompt": off("give the datasets a 'system' text"),
    "eos_token": off("the end of turn is the template's: use a template that ends with it"),
    "max_seq_length": to("seq"),
    "max_length": to("seq"),
    "truncation_side": data.truncation,
    "truncation_mode": data.truncation,
    "max_prompt_length": data.prompt_length,
    "per_device_train_batch_size": to("micro_batch", "number of documents of seq tokens that fit"),
    "completion_only_loss": _loss_of_completions,
    "assistant_only_loss": _loss_of_completions,
    "loss_type": only("nll", "chunked_nll", why="the loss is that of the next token"),
    "router_aux_loss_coef": off("no auxiliary loss is added"),
    "label_smoothing_factor": off("labels are not smoothed"),
    "activation_offloading": off("use recompute: full"),
    "activation_checkpointing": shared.checkpointing,
    "activation_checkpointing_kwargs": shared.RULES["gradient_checkpointing_kwargs"],
    "eval_strategy": _evaluation,
    "evaluation_strategy": _evaluation,
    "eval_steps": part_of("eval_strategy", "evaluation_strategy"),
    "do_eval": lambda key, value, recipe: mapped(key, value, {}, "see eval_strategy and the data sets"),
    "load_best_model_at_end": _best,
    "early_stopping_patience": to("early_stopping", "validations without a better loss"),
    "early_stopping_threshold": to("early_stopping_min_delta"),
    "metric_for_best_model": _metric,
    "hub_revision": off("the main branch is written"),
    "hub_model_revision": off("the main branch is written"),
    "push_to_hub_revision": off("the main branch is written"),
    "overwrite_hub_revision": off("the main branch is written"),
    "use_cpu": off("hide the GPUs: CUDA_VISIBLE_DEVICES="),
    "benchmarks": off("see `sft evaluate`"),
    "callbacks": off("there are no callbacks"),
    "decontaminate": off("clean the rows first"),
}


def _defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    masked = recipe.get("assistant_only_loss") or recipe.get("completion_only_loss")
    return {
        **shared.defaults(recipe),
        "micro_batch": 8,
        "gradient_accumulation": 1,
        "seq": 1024,
        "recompute": "full",
        "loss": "completion" if masked else "full",
    }


TRAINER = Trainer(
    name="TRL",
    rules=RULES,
    defaults=_defaults,
    marks=frozenset(
        {
            "model_name_or_path",
            "dataset_mixer",
            "dataset_mixture",
            "dataset_splits",
            "per_device_train_batch_size",
            "lr_scheduler_type",
            "max_seq_length",
            "eval_strategy",
            "evaluation_strategy",
            "lora_r",
            "lora_target_modules",
            "torch_dtype",
            "warmup_ratio",
            "num_train_epochs",
            "learning_rate",
            "gradient_accumulation_steps",
            "chat_template",
            "dataset_train_split",
        }
    ),
)
