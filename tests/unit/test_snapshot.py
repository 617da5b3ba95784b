"""What a save copies, and what becomes of it where there is too little memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sft.checkpoint import resume
from sft.checkpoint.commit import ALONE
from sft.checkpoint.fragments import Checkpoint, Later
from sft.config.optimizer import OptimizerSpec
from sft.model.collectives import SingleRank
from sft.model.tensor_parallel import ParameterShard
from sft.optimizer import states
from sft.optimizer.sharded import Groups, ShardedOptimizer, Trained
from sft.plan.layout import Layout
from sft.worker.saving import Saver

SHAPES = {"layers.0.w": (96, 64), "norm": (7,)}


@pytest.fixture(scope="module", autouse=True)
def _process_group(tmp_path_factory):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('group') / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def pipeline(optimizer: str = "adamw", dtype: torch.dtype = torch.float32):
    """What saving needs of one, after an update."""
    torch.manual_seed(0)
    parameters = {name: nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in SHAPES.items()}
    places = {name: ParameterShard(shape) for name, shape in SHAPES.items()}
    spec = OptimizerSpec(name=optimizer, lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-6, weight_decay=0.1)
    made = ShardedOptimizer(
        Trained(parameters=parameters, places=places),
        spec,
        Groups(tensor=SingleRank()),
        clip=1.0,
        device=torch.device("cpu"),
    )
    made.begin(1)
    for parameter in parameters.values():
        parameter.sum().backward()
    made.step()
    return SimpleNamespace(
        optimizer=made,
        built=SimpleNamespace(places=places),
        processes=SimpleNamespace(layout=Layout(tp=1, pp=1, dp=1)),
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_save_copies_nothing_and_others_copy_everything(dtype):
    trained = pipeline(dtype=dtype)
    live = {piece.live.data_ptr() for piece in states.pieces(trained.optimizer)}
    final, other = resume.snapshot(trained, is_final=True), resume.snapshot(trained)
    assert {fragment.values.data_ptr() for fragment in final.fragments} == live
    assert live.isdisjoint(fragment.values.data_ptr() for fragment in other.fragments)
    before = [fragment.values.clone() for fragment in other.fragments]
    trained.optimizer.begin(1)
    for name in SHAPES:
        trained.optimizer._parameters[name].sum().backward()
    trained.optimizer.step()
    assert all(torch.equal(fragment.values, kept) for fragment, kept in zip(other.fragments, before, strict=True))


def test_states_of_8_bits_are_copied_as_codes_and_written_as_numbers(tmp_path):
    pytest.importorskip("bitsandbytes")
    trained = pipeline("adamw8bit")
    expected = {(piece.name, piece.state): piece.numbers().clone() for piece in states.pieces(trained.optimizer)}
    taken = resume.snapshot(trained)
    later = [fragment for fragment in taken.fragments if isinstance(fragment.values, Later)]
    assert {(fragment.name, fragment.state) for fragment in later} == {
        ("layers.0.w", "exp_avg"),
        ("layers.0.w", "exp_avg_sq"),
    }
    resume.start_saving(taken, tmp_path, iteration=1, facts={}, peers=ALONE).finish()
    checkpoint = Checkpoint(tmp_path / "step-0000001")
    for (name, state), numbers in expected.items():
        assert torch.equal(checkpoint.read(name, state).flatten(), numbers), (name, state)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]
)
def test_too_little_memory_for_a_copy_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error):
    warnings: list[str] = []
    sampler = SimpleNamespace(documents=lambda iteration: torch.zeros(2).numpy())
    job = SimpleNamespace(folder=tmp_path, settings=SimpleNamespace(output=SimpleNamespace(keep=2)), sampler=sampler)
    saver = Saver(job, pipeline(), ALONE, {}, warnings.append)  # type: ignore[arg-type]
    right = resume.snapshot

    def without_memory(*given, **options):
        raise error

    monkeypatch.setattr(resume, "snapshot", without_memory)
    saver.save(1, {})
    assert not saver.finish()
    assert len(warnings) == 1
    assert warnings[0].startswith("the checkpoint of iteration 1 was not saved (rank 0: ")
    assert warnings[0].endswith(
        "too little memory for its copy; training goes on, and earlier checkpoints are untouched"
    )
    monkeypatch.setattr(resume, "snapshot", right)
    saver.save(2, {})
    assert saver.finish()
    assert [folder.name for folder in tmp_path.glob("step-*")] == ["step-0000002"]
