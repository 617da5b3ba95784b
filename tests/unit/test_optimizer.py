"""Who owns which weights, sums of gradients, the optimizers against their originals, and their states."""

from __future__ import annotations

import math
import re
import sys
import types

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sft.config.optimizer import OPTIMIZERS, OptimizerKind, OptimizerSpec
from sft.model.collectives import SingleRank
from sft.model.slices import Slice
from sft.model.tensor_parallel import ParameterShard
from sft.optimizer import states
from sft.optimizer.algorithms import adamw
from sft.optimizer.algorithms.adamw import nvidia_fused_adam
from sft.optimizer.algorithms.interface import Work, decaying_groups, make_algorithms
from sft.optimizer.norm import square_sum
from sft.optimizer.ownership import num_rows_of, parcels, split_rows
from sft.optimizer.sharded import Groups, ShardedOptimizer, Trained
from sft.optimizer.shards import make_shards, publish
from sft.optimizer.sums import GradientSums
from tests.threads import run_together
from tokenize_data.errors import UserError

CPU = torch.device("cpu")
SHAPES = st.lists(st.integers(1, 3000), min_size=0, max_size=3).map(tuple)


@pytest.fixture(scope="module", autouse=True)
def _process_group(tmp_path_factory):
    """One process: sums over all are its own."""
    if not dist.is_initialized():
        dist.init_process_group(
            "gloo", init_method=f"file://{tmp_path_factory.mktemp('group') / 'store'}", rank=0, world_size=1
        )
    yield
    dist.destroy_process_group()


@given(shapes=st.lists(SHAPES, min_size=1, max_size=40), replicas=st.integers(1, 9), data=st.data())
def test_every_row_has_one_owner(shapes, replicas, data):
    named = {f"w{number}": shape for number, shape in enumerate(shapes)}
    whole, shared, last = (set(data.draw(st.lists(st.sampled_from(sorted(named)), max_size=5))) for _ in range(3))
    made = parcels(named, replicas, whole=whole, shared=shared, last=last)
    assert sorted(name for parcel in made for name in parcel.names) == sorted(named)
    for parcel in made:
        for name in parcel.names:
            rows = num_rows_of(named[name])
            owned = [parcel.rows_of(name, rows, replicas, replica) for replica in range(replicas)]
            assert [row for part in owned for row in part] == list(range(rows))
            if name in whole:
                assert sum(map(bool, owned)) == 1
    order = [name for parcel in made for name in parcel.names]
    assert all(order.index(first) < order.index(late) for late in last for first in named.keys() - last)


def test_work_is_balanced_by_size():
    """The shapes of Llama's layers and norms, on eight replicas."""
    layer = {"q": (4096, 4096), "k": (1024, 4096), "up": (14336, 4096), "down": (4096, 14336), "norm": (4096,)}
    shapes = {f"{number}.{name}": shape for number in range(32) for name, shape in layer.items()} | {
        "embedding": (128257, 4096)
    }
    for whole in ((), [name for name, shape in shapes.items() if len(shape) == 2]):
        loads = [0] * 8
        for parcel in parcels(shapes, 8, whole=whole):
            for name in parcel.names:
                for replica in range(8):
                    rows = parcel.rows_of(name, shapes[name][0], 8, replica)
                    loads[replica] += len(rows) * math.prod(shapes[name][1:])
        assert (
            max(loads) <= (1.25 if whole else 1.001) * sum(loads) / 8
        )  # one owner for the embedding is an eighth of everything


def test_rows_are_split_evenly_and_the_last_replicas_have_what_is_left():
    assert [split_rows(131, 4, replica) for replica in range(4)] == [
        range(33),
        range(33, 66),
        range(66, 99),
        range(99, 131),
    ]
    assert [len(split_rows(3, 4, replica)) for replica in range(4)] == [1, 1, 1, 0]


def test_low_precision_gradients_are_summed_in_float32_and_freed():
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    complete = []
    sums = GradientSums({"w": parameter}, complete.append)
    sums.begin(300)
    for _ in range(300):
        (parameter * torch.tensor([1.0, 1 / 256, 3.0])).sum().backward()
        assert parameter.grad is None
    assert complete == ["w"]
    total = sums.take("w")
    assert total.dtype is torch.float32
    assert total.tolist() == [300.0, 300 / 256, 900.0]  # in bfloat16 the first would have stopped at 256
    with pytest.raises(AssertionError, match="w got no gradient"):
        sums.take("w")


def test_float32_gradients_are_autograds_own():
    parameter = nn.Parameter(torch.zeros(2))
    sums = GradientSums({"w": parameter})
    sums.begin(2)
    for _ in range(2):
        parameter.sum().backward()
    memory = parameter.grad.data_ptr()
    assert sums.take("w").data_ptr() == memory
    assert parameter.grad is None


def test_float32_weights_have_no_second_copy_and_bfloat16_ones_a_master():
    for dtype, is_same in ((torch.float32, True), (torch.bfloat16, False)):
        parameter = nn.Parameter(torch.randn(6, 4).to(dtype))
        (shard,) = make_shards("w", parameter, ParameterShard((6, 4)), range(2, 6))
        assert (shard.weights.data_ptr() == parameter[2:].data_ptr()) is is_same
        assert (shard.weights.dtype, shard.offset, shard.is_master) == (torch.float32, 8, not is_same)
        with torch.no_grad():
            shard.weights.fill_(1.001)
        publish([shard])
        assert parameter[2:].eq(torch.tensor(1.001).to(dtype)).all()


def test_large_tensors_are_cut_into_shards_that_count_in_32_bits():
    parameter = nn.Parameter(torch.zeros(10, 4))
    made = make_shards("w", parameter, ParameterShard((10, 4)), range(1, 10), most=17)
    assert [(shard.rows, shard.offset) for shard in made] == [(range(1, 5), 4), (range(5, 9), 20), (range(9, 10), 36)]


def test_biases_and_norms_do_not_decay():
    shards = _shards({"layers.0.w": (4, 4), "layers.0.bias": (4,), "norm": (4,), "head.weight": (9, 4)})
    (made,) = make_algorithms(_work(_spec("adamw"), shards, SingleRank(), CPU))
    decaying, others = made.param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert [tuple(one.shape) for one in decaying["params"]] == [(4, 4), (9, 4)]
    assert [tuple(one.shape) for one in others["params"]] == [(4,), (4,)]
    assert (decaying["lr"], decaying["betas"], decaying["eps"]) == (1e-2, (0.9, 0.95), 1e-6)


@pytest.mark.parametrize(
    ("name", "clip"), [*((name, 1.0) for name in (*OPTIMIZERS, "sgd, momentum")), ("adamw", 0.0), ("adamw", 1e6)]
)
def test_updates_are_those_of_the_original(name, clip):
    """Three updates of tensors of every kind, a large one with states of 8 bits among them."""
    torch.manual_seed(0)
    shapes = {"layers.0.wide": (8, 24), "layers.0.tall": (40, 16), "layers.0.bias": (40,), "head.weight": (130, 64)}
    ours = {key: nn.Parameter(torch.randn(shape)) for key, shape in shapes.items()}
    theirs = {key: nn.Parameter(parameter.detach().clone()) for key, parameter in ours.items()}
    optimizer = _sharded(ours, name, clip)
    originals = _originals(name, theirs)
    for _ in range(3):
        optimizer.begin(1)
        for key in shapes:
            gradient = torch.randn(shapes[key])
            ours[key].grad, theirs[key].grad = gradient.clone(), gradient.clone()
        optimizer.step()
        if clip:
            nn.utils.clip_grad_norm_(theirs.values(), clip)
        for original in originals:
            original.step()
    for key in shapes:
        torch.testing.assert_close(ours[key], theirs[key], rtol=2e-6, atol=2e-6 if name != "muon" else 2e-5, msg=key)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
@pytest.mark.parametrize("dim", [0, 1])
def test_tensor_ranks_update_a_matrix_as_one(name, dim):
    torch.manual_seed(0)
    whole, gradient = torch.randn(8, 12), torch.randn(8, 12)
    alone = nn.Parameter(whole.clone())
    alone.grad = gradient.clone()
    single = _shards({"layers.0.w": (8, 12)}, alone)
    single[0].weights.grad = gradient.clone()
    make_algorithms(_work(_spec(name), single, SingleRank(), CPU))[0].step()

    def on_a_rank(group):
        half = whole.size(dim) // 2
        part = Slice(dim=dim, pieces=((group.rank * half, (group.rank + 1) * half),))
        parameter = nn.Parameter(part.take(whole))
        (shard,) = make_shards("layers.0.w", parameter, ParameterShard((8, 12), part), range(parameter.size(0)))
        shard.weights.grad = part.take(gradient)
        make_algorithms(_work(_spec(name), [shard], group, CPU))[0].step()
        return parameter.detach()

    found = torch.cat(run_together(2, on_a_rank), dim)
    torch.testing.assert_close(found, single[0].parameter.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*OPTIMIZERS, "sgd, momentum"])
def test_states_are_there_before_the_first_update_and_change_nothing(name):
    parameters = {"layers.0.w": nn.Parameter(torch.randn(70, 64)), "norm": nn.Parameter(torch.randn(5))}
    before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    optimizer = _sharded(parameters, name)
    pieces = states.pieces(optimizer)
    assert {piece.state for piece in pieces} == {states.MASTER, *optimizer.spec.states}
    assert all(float(piece.numbers().abs().max()) < 1e-29 for piece in pieces if piece.state != states.MASTER)
    for piece in pieces:
        assert piece.numbers().numel() == math.prod(piece.shape or parameters[piece.name].shape)
    assert all(torch.equal(parameter, before[key]) for key, parameter in parameters.items())
    assert optimizer.num_steps == 0


def test_nothing_is_updated_where_the_caller_does_not_approve():
    def refuse(norm, votes):
        raise ArithmeticError(f"{norm} {votes}")

    parameter = nn.Parameter(torch.ones(4))
    optimizer = ShardedOptimizer(
        Trained(parameters={"w": parameter}, places={"w": ParameterShard((4,))}),
        _spec("adamw"),
        Groups(tensor=SingleRank()),
        clip=1.0,
        device=CPU,
        votes=lambda: [2.0, torch.tensor(True)],
        approve=refuse,
    )
    optimizer.begin(1)
    parameter.grad = torch.full((4,), 2.0)
    with pytest.raises(ArithmeticError, match=re.escape("4.0 [2.0, 1.0]")):
        optimizer.step()
    assert parameter.tolist() == [1.0] * 4


@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 3_000_001])
def test_norms_of_large_tensors_are_exact(count):
    torch.manual_seed(count)
    values = torch.randn(count) * torch.rand(count).pow(6)
    found = float(square_sum([values, values[: count // 2]], CPU))
    assert found == pytest.approx(
        float(values.double().square().sum() + values[: count // 2].double().square().sum()), rel=1e-6
    )


def test_the_apex_on_pypi_is_taken_for_what_it_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.delitem(sys.modules, "apex.optimizers", raising=False)
    assert nvidia_fused_adam() is None
    unrelated = types.ModuleType("apex.optimizers")
    monkeypatch.setitem(sys.modules, "apex.optimizers", unrelated)
    assert nvidia_fused_adam() is None
    unrelated.FusedAdam = object
    assert nvidia_fused_adam() is object


def test_8_bits_need_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    message = "--optimizer adamw8bit needs bitsandbytes: pip install 'megasft[quantized]', or use --optimizer adamw"
    with pytest.raises(UserError, match=re.escape(message)):
        make_algorithms(_work(_spec("adamw8bit"), _shards({"w": (2, 2)}), SingleRank(), CPU))


def test_nvidias_adam_is_used_on_a_gpu_where_it_is(monkeypatch):
    made = []
    monkeypatch.setattr(adamw, "nvidia_fused_adam", lambda: lambda groups, **options: made.append(options) or "theirs")
    assert make_algorithms(_work(_spec("adamw"), _shards({"w": (2, 2)}), SingleRank(), torch.device("cuda"))) == [
        "theirs"
    ]
    assert made == [{"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6, "adam_w_mode": True}]
    assert isinstance(
        make_algorithms(_work(_spec("adamw"), _shards({"w": (2, 2)}), SingleRank(), CPU))[0], torch.optim.AdamW
    )
    assert isinstance(
        make_algorithms(_work(_spec("sgd"), _shards({"w": (2, 2)}), SingleRank(), CPU))[0], torch.optim.SGD
    )


def _work(spec, shards, group, device):
    return Work(spec=spec, shards=shards, group=group, device=device)


def _originals(name, parameters):
    matrices = [parameter for parameter in parameters.values() if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters.values() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adam = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6}
    if name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return [AdamW8bit(groups, **adam)]
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return [Adafactor(groups, lr=1e-2, scale_parameter=False, relative_step=False, warmup_init=False)]
    if name == "muon":
        inside = [parameter for key, parameter in parameters.items() if parameter.dim() > 1 and "layers" in key]
        groups[0]["params"] = [parameters["head.weight"]]
        return [
            torch.optim.Muon(inside, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(groups, **adam),
        ]
    if name.startswith("sgd"):
        return [torch.optim.SGD(groups, lr=1e-2, momentum=0.9 if "momentum" in name else 0.0)]
    return [torch.optim.AdamW(groups, **adam)]


def _sharded(parameters, name, clip=1.0):
    places = {key: ParameterShard(tuple(parameter.shape)) for key, parameter in parameters.items()}
    trained = Trained(parameters=parameters, places=places, outside=("head.weight",))
    return ShardedOptimizer(trained, _spec(name), Groups(tensor=SingleRank()), clip=clip, device=CPU)


def _shards(shapes, parameter=None):
    made = [
        make_shards(
            name,
            parameter if parameter is not None else nn.Parameter(torch.zeros(shape)),
            ParameterShard(shape),
            range(shape[0]),
        )
        for name, shape in shapes.items()
    ]
    return [shard for some in made for shard in some]


def _spec(name):
    return OptimizerSpec(
        name=name.partition(",")[0],
        lr=1e-2,
        beta1=0.9,
        beta2=0.95,
        eps=1e-6,
        weight_decay=0.1,
        momentum=0.9 if "momentum" in name else 0.0,
    )


def test_a_new_optimizer_is_one_file_and_one_line(monkeypatch):
    """Signs of gradients, with one state of a number for each weight."""

    class Signs(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    state = self.state[parameter]
                    state.setdefault("last_sign", torch.zeros_like(parameter))
                    state["last_sign"].copy_(parameter.grad.sign())
                    parameter.data.add_(state["last_sign"], alpha=-group["lr"])

    file = types.ModuleType("sft.optimizer.algorithms.signs")
    file.make = lambda work: [Signs(decaying_groups(work), lr=work.spec.lr)]
    monkeypatch.setitem(sys.modules, file.__name__, file)
    kind = OptimizerKind(matrix_bytes=4.0, other_bytes=4.0, states=("last_sign",))
    monkeypatch.setitem(OPTIMIZERS, "signs", kind)
    parameter = nn.Parameter(torch.zeros(3, 2))
    optimizer = _sharded({"layers.0.w": parameter}, "signs", clip=0.0)
    optimizer.begin(1)
    parameter.grad = torch.tensor([[2.0, -3.0], [0.0, 5.0], [-1.0, 1.0]])
    optimizer.step()
    assert torch.equal(parameter.detach(), -1e-2 * torch.tensor([[1.0, -1.0], [0.0, 1.0], [-1.0, 1.0]]))
    assert {piece.state for piece in states.pieces(optimizer)} == {states.MASTER, "last_sign"}
    assert optimizer.spec.kind is kind  # the planner's bytes
