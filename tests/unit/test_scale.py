"""Sizes that no test machine has: ten million documents, seventy billion weights."""

from __future__ import annotations

import json
import resource
import struct
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig

from sft.model.build import build_stage, make_on_meta
from sft.model.collectives import SingleRank
from sft.model.weight_names import match_names
from sft.model.weights import INDEX, WeightFiles
from tests.counting import bytes_read

_TEN_MILLION = """
import re
from pathlib import Path
import numpy as np
from sft.plan.packing import plan_batch
from sft.plan.sampler import Sampler
from tests.counting import lines_run

Sampler(100, 64, 0).documents(0)  # what is imported at first use
lengths = np.random.default_rng(0).integers(20, 2048, 10_000_000).astype(np.uint32)
sampler = Sampler(len(lengths), 64, 0)
first = lines_run(lambda: sampler.documents(0))
batch_of = lambda number: lengths[sampler.documents(number)].tolist()
most = max(lines_run(lambda: plan_batch(batch_of(number), 2048, 4)) for number in range(1, 21))
# ru_maxrss would begin with the parent's
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]
print(first, most, int(peak) / 2**20)
"""


def test_ten_million_documents_are_planned_without_a_loop_over_them_and_in_a_gigabyte():
    """An iteration costs what its 64 documents cost, however many there are."""
    printed = subprocess.run([sys.executable, "-c", _TEN_MILLION], capture_output=True, text=True, check=True).stdout
    first, most, gigabytes = map(float, printed.split())
    assert first < 1000  # lines of Python
    assert most < 64 * 100
    assert gigabytes < 1


@pytest.fixture(scope="module")
def seventy_billion(tmp_path_factory):
    """The files of a 70B model: right in their headers and sizes, and otherwise holes."""
    folder = tmp_path_factory.mktemp("70B")
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=32000,
        architectures=["LlamaForCausalLM"],
    )
    shapes = {
        name: tuple(parameter.shape) for name, parameter in make_on_meta(config, torch.bfloat16).named_parameters()
    }
    names, files = list(shapes), {}
    for number in range(30):
        file, header, at = f"model-{number:05d}-of-00030.safetensors", {}, 0
        for name in names[number::30]:
            size = 2 * torch.Size(shapes[name]).numel()
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [at, at + size]}
            at += size
            files[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as written:
            written.write(struct.pack("<Q", len(text)) + text)
            written.truncate(8 + len(text) + at)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder, config


def test_a_rank_of_a_70b_model_finds_its_slices_from_the_headers(seventy_billion):
    folder, config = seventy_billion
    assert sum(file.stat().st_size for file in folder.iterdir()) > 130e9
    before = bytes_read()
    built = build_stage(
        config,
        range(30, 40),
        SingleRank(rank=5, size=8),
        sequence_parallel=True,
        recompute="none",
        dtype=torch.bfloat16,
        device=torch.device("meta"),
    )
    files = WeightFiles(folder)
    expected = {name: place.shape for name, place in built.all_places.items()}
    names = match_names(
        expected, files, base_prefix=built.base_prefix, tied={}, ignore=built.ignored, grown={}, renames=built.renames
    )
    places = 0
    for name, parameter in built.parameters.items():
        part, shape = built.places[name].part, files.shape(names[name])
        assert tuple(parameter.shape) == (part.shape_of(shape) if part else shape)
        places += len(list(part.spans(shape[part.dim]))) if part else 1
    assert bytes_read() - before < 50e6
    assert places >= len(built.parameters) == 90
    name = "model.layers.35.mlp.down_proj.weight"
    layer = files.read(names[name], built.places[name].part, torch.bfloat16)
    assert layer.shape == (8192, 28672 // 8)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8 * 2**20
