"""Errors that another process caused are recognised by type and origin."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch.distributed as dist

from sft.worker.peers import is_lost_peer

# Rank 1 ends without a word; rank 0 says what it makes of the error that it gets.
_PAIR = """
import os, sys, json, datetime
import torch, torch.distributed as dist
from torch.autograd import Function
from sft.worker.peers import is_lost_peer
rank, file, exchange = int(sys.argv[1]), sys.argv[2], sys.argv[3]
store = dist.FileStore(file, 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
dist.barrier()

class Summed(Function):
    @staticmethod
    def forward(context, tensor):
        return tensor.clone()

    @staticmethod
    def backward(context, gradient):
        dist.all_reduce(gradient)
        return gradient

def exchanged():
    tensor = torch.ones(4, requires_grad=exchange == "backward")
    if exchange == "all_reduce":
        dist.all_reduce(tensor)
    elif exchange == "recv":
        dist.recv(tensor, 1)
    elif exchange == "objects":
        dist.all_gather_object([None, None], {"x": 1})
    elif exchange == "backward":
        Summed.apply(tensor).sum().backward()

if rank == 1:
    os._exit(9)
try:
    while True:  # what was sent before the other end closed may still arrive
        exchanged()
except Exception as error:
    print(json.dumps([type(error).__name__, is_lost_peer(error)]), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("exchange", ["all_reduce", "recv", "objects", "backward"])
def test_an_exchange_with_a_process_that_ended(tmp_path, exchange):
    program = _PAIR
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(tmp_path / "store"), exchange],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in (0, 1)
    ]
    output, _ = pair[0].communicate(timeout=240)
    pair[1].communicate(timeout=240)
    name, is_lost = json.loads(output)
    assert is_lost, name


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (dist.DistBackendError("NCCL error"), True),
        (dist.DistNetworkError("no route"), True),
        (RuntimeError("the connection to the tracker's socket was closed by its peer"), False),
        (ValueError("gloo"), False),
    ],
)
def test_its_text_does_not_matter(error, is_lost):
    assert is_lost_peer(raised(error)) is is_lost
