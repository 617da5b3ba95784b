"""What we rely on in DeepSpeed, transformers and torch beyond their documented interfaces: here it is seen first when
they change.

Where one of these fails, look at the module of `sft` that the test names.
"""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from sft.engine.start import prepare_environment
from sft.model import compiled, stage, tensor_parallel
from sft.model.build import make_on_meta
from sft.optimizer.shards import copy_all
from tests.models import FAMILIES, tiny_config


@pytest.fixture(scope="module")
def deepspeed():
    prepare_environment()
    return importlib.import_module("deepspeed")


# What `sft` calls or sets in DeepSpeed beyond its documented interface; nothing of its optimizers.
PRIVATE_NAMES = {
    "sft/engine/pipeline.py": {"pipeline_enable_backward_allreduce"},
    "sft/engine/start.py": {"build_shm_op"},
}


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 1), (1, 3), (2, 1), (2, 4), (4, 3)])
def test_there_is_one_update_after_the_last_backward_pass(deepspeed, stages, micro_batches):
    """optimizer.sharded completes gradients there."""
    schedule = importlib.import_module("deepspeed.runtime.pipe.schedule")
    for stage_id in range(stages):
        steps = schedule.TrainSchedule(micro_batches=micro_batches, stages=stages, stage_id=stage_id).steps()
        names = [type(command).__name__ for commands in steps for command in commands]
        assert names[-1] == "OptimizerStep"
        assert [names.count(name) for name in ("OptimizerStep", "BackwardPass")] == [1, micro_batches]


def test_gradients_are_not_exchanged_where_that_is_switched_off(deepspeed):
    """engine.pipeline switches it off, and shares nothing that DeepSpeed would tie."""
    engine_class = deepspeed.runtime.pipe.engine.PipelineEngine
    exchanged = mock.Mock()
    engine = SimpleNamespace(
        pipeline_enable_backward_allreduce=False, allreduce_gradients=exchanged, using_bf16_optimizer=False
    )
    engine_class._exec_reduce_grads(engine)
    exchanged.assert_not_called()
    assert "pipeline_enable_backward_allreduce" in engine_class.__init__.__code__.co_names


def test_an_optimizer_without_sections_for_zero_or_bfloat16_is_used_as_it_is(deepspeed):
    """engine.pipeline gives the whole update to it."""
    sanity = deepspeed.runtime.engine.DeepSpeedEngine._do_optimizer_sanity_check
    engine = SimpleNamespace(get_data_types=lambda: (torch.float32, torch.float32), zero_optimization=lambda: False)
    assert sanity(engine, mock.Mock()) is None


def test_private_names_are_those_listed_here():
    root = Path(stage.__file__).parents[2]
    gone = (
        "_hp_mapping",
        "_lazy_init_hp_params_optimizer_state",
        "fp32_groups_gradients_flat",
        "_hp_grad",
        "using_bf16_optimizer",
        "BF16_Optimizer",
        "update_lp_params",
        "ds_pipe_replicated",
        "tensor_model_parallel",
        "get_tied_weights_and_groups",
    )
    for file in (root / "sft").rglob("*.py"):
        text = file.read_text()
        assert not [name for name in gone if name in text], file
        used = {name for names in PRIVATE_NAMES.values() for name in names if name in text}
        assert used == PRIVATE_NAMES.get(str(file.relative_to(root)), set()), file


def test_process_numbers_count_tensor_ranks_first_then_stages_then_replicas(deepspeed):
    """engine.groups and plan.layout say so."""
    topology = importlib.import_module("deepspeed.runtime.pipe.topology").ProcessTopology(
        axes=["data", "pipe", "model"], dims=[3, 2, 2]
    )
    assert topology.get_axis_comm_lists("model")[0] == [0, 1]
    assert topology.get_axis_comm_lists("pipe")[0] == [0, 2]
    assert topology.get_axis_comm_lists("data")[0] == [0, 4, 8]
    coordinates = topology.get_coord(9)
    assert (coordinates.pipe, coordinates.data, coordinates.model) == (0, 2, 1)


def test_names_of_arguments(deepspeed):
    """Of engine.pipeline and engine.start."""
    engine = deepspeed.runtime.pipe.engine.PipelineEngine
    for function, names in {
        deepspeed.pipe.PipelineModule.__init__: {"layers", "topology", "loss_fn", "partition_method", "dynamic_shape"},
        deepspeed.initialize: {"model", "optimizer", "config", "dist_init_required"},
        deepspeed.init_distributed: {"dist_backend", "verbose", "timeout"},
        engine.eval_batch: {"data_iter", "reduce_output", "bcast_loss", "num_micro_batches"},
        engine.train_batch: {"data_iter"},
        engine.set_train_batch_size: {"train_batch_size"},
    }.items():
        assert names <= set(inspect.signature(function).parameters), function


def test_what_engine_start_replaces_is_what_deepspeed_calls(deepspeed):
    backend = importlib.import_module("deepspeed.comm.torch")
    assert callable(backend.build_shm_op)
    assert "build_shm_op" in backend.TorchBackend.__init__.__code__.co_names


def test_starting_a_worker_compiles_nothing(tmp_path):
    """engine.start: where there is no compiler, and no extension that was built before."""
    program = (
        "from sft.engine.start import start_worker, stop_worker; from sft.launcher.rendezvous import connect; "
        "start_worker(connect(60), use_gpu=False); stop_worker()"
    )
    environment = {
        **os.environ,
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "CXX": "/bin/false",
        "PATH": os.path.dirname(sys.executable),
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(tmp_path.rglob("*.cpp"))
    assert not list(tmp_path.rglob("build.ninja"))


def test_patterns_of_tensors_that_a_model_has_no_use_for():
    """model.build hands them to model.weights."""
    assert hasattr(PreTrainedModel, "_keys_to_ignore_on_load_unexpected")
    assert hasattr(PreTrainedModel, "base_model_prefix")


def test_parameters_that_transformers_has_renamed():
    """model.build reads GPT-NeoX's."""
    renames = [
        entry
        for entry in get_model_conversion_mapping(_on_meta("gpt-neox"))
        if type(entry).__name__ == "WeightRenaming"
    ]
    assert renames
    assert all(
        isinstance(entry.source_patterns[0], str) and isinstance(entry.target_patterns[0], str) for entry in renames
    )


def test_an_attention_function_of_ours_is_called():
    """model.attention; families that compute attention themselves take a mask."""
    assert "sft_packed" in AttentionInterface().valid_keys()
    assert _on_meta("llama").config._attn_implementation == "sft_packed"


@pytest.mark.parametrize("family", FAMILIES)
def test_plans_name_layers_that_are_there_in_styles_that_are_known(family):
    """model.tensor_parallel"""
    config = tiny_config(family)
    layer = next(
        module for module in _on_meta(family).modules() if isinstance(module, nn.ModuleList) and len(module) == 4
    )[0]
    plan = tensor_parallel.layer_plan(config)
    linears = {name for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    assert linears == {
        name for name, style in plan.items() if style in (*tensor_parallel._COLUMN_STYLES, *tensor_parallel._ROW_STYLES)
    }
    assert set(plan.values()) <= set(tensor_parallel._STYLES)


def test_what_python_runs_at_its_end_can_be_run_before():
    """job.ending"""
    program = "import atexit, os; atexit.register(print, 'ran', flush=True); atexit._run_exitfuncs(); os._exit(0)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60).stdout == "ran\n"


def test_names_in_torch():
    """engine.groups, optimizer.exchange, optimizer.sharded, model.stage"""
    assert getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    assert getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    assert callable(torch.nn.utils.clip_grads_with_norm_)
    assert float(torch.nn.utils.get_total_norm([torch.full((3,), 2.0), torch.ones(4)], foreach=True)) == 4.0
    assert callable(checkpoint.create_selective_checkpoint_contexts)
    assert all(isinstance(operation, torch._ops.OpOverload) for operation in stage._KEPT_OPERATIONS)


def test_what_a_failed_compilation_raises():
    """model.compiled"""

    def broken(module, example):
        raise OSError

    for backend, wrong in ((broken, lambda x: x + 1), ("eager", lambda x: x if x.sum() else x + 1)):
        with pytest.raises(compiled._FAILURES):
            torch.compile(wrong, fullgraph=True, backend=backend)(torch.ones(2))


def test_many_tensors_are_copied_at_once_into_another_format():
    """optimizer.shards"""
    targets = [torch.zeros(2, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.bfloat16)]
    copy_all(targets, [torch.full((2,), 1.001), torch.full((3,), 2.0)])
    assert [target.tolist() for target in targets] == [[1.0, 1.0], [2.0, 2.0, 2.0]]


def _on_meta(family):
    return make_on_meta(tiny_config(family), torch.float32)
