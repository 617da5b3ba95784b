"""Slices put back together are the whole; weights are read by slices, under whatever names, and what does not fit is
refused by name.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from sft.model.slices import Slice
from sft.model.weight_names import match_names
from sft.model.weights import INDEX, SINGLE, WeightFiles, load, read_grown
from tokenize_data.errors import UserError

TENSORS = {
    "model.embed_tokens.weight": torch.arange(24.0).reshape(6, 4),
    "model.layers.0.qkv.weight": torch.arange(48.0).reshape(12, 4),
    "model.layers.0.norm.weight": torch.arange(4.0),
    "model.layers.0.experts": torch.arange(60.0).reshape(3, 4, 5),
    "model.layers.0.scale": torch.tensor(3.0),
    "lm_head.weight": torch.arange(24.0).reshape(6, 4).flip(0),
}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


def folder_of(root: Path, tensors=TENSORS, num_files: int = 1) -> Path:
    root.mkdir(exist_ok=True)
    if num_files == 1:
        save_file(tensors, root / SINGLE)
        return root
    weight_map = {
        name: f"model-{n % num_files + 1:05d}-of-{num_files:05d}.safetensors" for n, name in enumerate(tensors)
    }
    for file in set(weight_map.values()):
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, root / file)
    (root / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return root


def match(root: Path, expected=SHAPES, **options) -> dict[str, str]:
    options = {"base_prefix": "model", "tied": {}, "ignore": (), "grown": {}} | options
    return match_names(expected, WeightFiles(root), **options)


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@st.composite
def partitions(draw):
    """A shape, a dimension, and slices for several ranks that have each index of it exactly once, some with padding."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    dim = draw(st.integers(0, len(shape) - 1))
    length = shape[dim]
    cuts = sorted({0, length + draw(st.integers(0, 3)), *draw(st.lists(st.integers(0, length), max_size=4))})
    pieces = draw(st.permutations(list(itertools.pairwise(cuts))))
    middle = draw(st.integers(0, len(pieces)))
    return shape, [Slice(dim=dim, pieces=tuple(some)) for some in (pieces[:middle], pieces[middle:])]


@given(partitions())
def test_parts_put_together_are_the_whole(drawn):
    shape, slices = drawn
    whole = torch.rand(shape) + 1
    again = torch.zeros(shape)
    for part in slices:
        taken = part.take(whole)
        assert taken.size(part.dim) == part.length
        assert taken.is_contiguous()
        assert taken.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
        part.put(again, taken)
    assert torch.equal(again, whole)
    assert sum(float(part.take(whole).sum()) for part in slices) == pytest.approx(float(whole.sum()))  # padding is zero


@settings(max_examples=40, deadline=None)
@given(partitions())
def test_reading_a_slice_is_taking_it(tmp_path_factory, drawn):
    shape, slices = drawn
    whole = torch.rand(shape)
    files = WeightFiles(folder_of(tmp_path_factory.mktemp("m"), {"t": whole}))
    for part in slices:
        assert torch.equal(files.read("t", part, torch.float32), part.take(whole))


@pytest.mark.parametrize("num_files", [1, 3])
def test_files_are_read_whole_and_cast(tmp_path, num_files):
    files = WeightFiles(folder_of(tmp_path / "m", num_files=num_files))
    assert set(files.names()) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert files.shape(name) == tensor.shape
        found = files.read(name, None, torch.bfloat16)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, tensor.bfloat16())


def test_parameters_are_filled_in_place(tmp_path):
    root = folder_of(tmp_path / "m", num_files=2)
    slices = {
        "model.layers.0.qkv.weight": Slice(dim=0, pieces=((2, 4), (10, 14))),
        "model.layers.0.experts": Slice(dim=1, pieces=((1, 3),)),
    }
    places = {
        name: (nn.Parameter(torch.full_like(part.take(tensor) if part else tensor, 7.0, dtype=torch.float64)), part)
        for name, tensor, part in ((name, tensor, slices.get(name)) for name, tensor in TENSORS.items())
    }
    addresses = {name: parameter.data_ptr() for name, (parameter, _) in places.items()}
    load(places, WeightFiles(root), match(root))
    for name, (parameter, part) in places.items():
        assert torch.equal(parameter.detach().float(), part.take(TENSORS[name]) if part else TENSORS[name]), name
        assert parameter.data_ptr() == addresses[name]
        assert parameter.requires_grad


def test_names_with_and_without_the_prefix(tmp_path):
    bare = {name.removeprefix("model."): tensor for name, tensor in TENSORS.items()}
    found = match(folder_of(tmp_path / "bare", bare))
    assert found["model.layers.0.qkv.weight"] == "layers.0.qkv.weight"
    assert found["lm_head.weight"] == "lm_head.weight"
    shorter = {name.removeprefix("model."): shape for name, shape in SHAPES.items()}
    assert match(folder_of(tmp_path / "full"), shorter)["layers.0.scale"] == "model.layers.0.scale"


@pytest.mark.parametrize(
    ("in_files", "expected"),
    [("decoder.project_in.weight", "model.decoder.project_in.weight"), ("embed_out.weight", "lm_head.weight")],
)
def test_names_of_other_versions_of_transformers(tmp_path, in_files, expected):
    root = folder_of(tmp_path / "m", {in_files: torch.zeros(2, 3)})
    assert match(root, {expected: (2, 3)}, renames=[(r"^embed_out\.", "lm_head.")]) == {expected: in_files}


TIED = {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.parametrize(
    "in_files", [("model.embed_tokens.weight",), ("lm_head.weight",), ("lm_head.weight", "model.embed_tokens.weight")]
)
@pytest.mark.parametrize("expected", [("model.embed_tokens.weight",), ("lm_head.weight", "model.embed_tokens.weight")])
def test_tied_weights_are_found_under_either_name(tmp_path, in_files, expected):
    root = folder_of(tmp_path / "m", {name: torch.arange(24.0).reshape(6, 4) for name in in_files})
    found = match(root, dict.fromkeys(expected, (6, 4)), tied=TIED)
    assert found == dict.fromkeys(expected, in_files[-1])


def test_tied_weights_that_differ_are_refused(tmp_path):
    expected = {name: shape for name, shape in SHAPES.items() if name != "lm_head.weight"}
    message = refusal(match, folder_of(tmp_path / "m"), expected, tied=TIED)
    assert "lm_head.weight and model.embed_tokens.weight differ: set tie_word_embeddings to false" in message


def test_buffers_and_ignored_tensors_may_be_there(tmp_path):
    buffers = (
        "model.layers.0.rotary_emb.inv_freq",
        "gpt_neox.layers.0.attention.bias",
        "gpt_neox.layers.0.attention.masked_bias",
        "my.extra",
    )
    root = folder_of(tmp_path / "m", TENSORS | {name: torch.zeros(1) for name in buffers})
    assert set(match(root, ignore=(r"^my\.",))) == set(SHAPES)


def test_a_trained_attention_bias_is_no_buffer(tmp_path):
    name = "model.layers.0.attention.bias"
    assert match(folder_of(tmp_path / "m", {name: torch.zeros(3)}), {name: (3,)}) == {name: name}


def test_what_does_not_fit_is_named_with_shapes(tmp_path):
    tensors = {name: tensor for name, tensor in TENSORS.items() if name != "lm_head.weight"} | {
        "model.adapter": torch.zeros(2, 7)
    }
    expected = {**SHAPES, "model.layers.0.norm.weight": (5,)}
    message = refusal(match, folder_of(tmp_path / "m", tensors), expected)
    assert f"{tmp_path / 'm'} does not hold the weights of its model" in message
    assert "missing: lm_head.weight [6, 4];" in message
    assert "of another shape: model.layers.0.norm.weight [4] instead of [5];" in message
    assert "in it but not in the model: model.adapter [2, 7]" in message
    assert "give a folder whose config.json and weights belong together" in message


def test_five_of_many_are_named(tmp_path):
    message = refusal(match, folder_of(tmp_path / "m"), SHAPES | {f"more.{n}": (n,) for n in range(8)})
    assert "more.4 [4] and 3 more" in message
    assert "more.5" not in message


def test_a_quantised_model_is_refused(tmp_path):
    root = folder_of(tmp_path / "m", {"w": torch.zeros(2, 3, dtype=torch.int8)})
    assert "quantised: w): give the model that it was quantised from" in refusal(match, root, {"w": (2, 3)})


def test_fewer_rows_are_right_only_where_tokens_were_added(tmp_path):
    root = folder_of(tmp_path / "m")
    name = "lm_head.weight"
    assert name in match(root, SHAPES | {name: (8, 4)}, grown={name: 8})
    assert "[6, 4] instead of [8, 4]" in refusal(match, root, SHAPES | {name: (8, 4)})
    assert "[6, 4] instead of [8, 5]" in refusal(match, root, SHAPES | {name: (8, 5)}, grown={name: 8})
    assert "[6, 4] instead of [5, 4]" in refusal(match, root, SHAPES | {name: (5, 4)}, grown={name: 5})


@pytest.mark.parametrize("whole", [torch.rand(6, 4), torch.rand(6), torch.rand(6, 2, 3)], ids=["2d", "1d", "3d"])
@pytest.mark.parametrize(
    "part",
    [
        None,
        Slice(dim=0, pieces=((0, 3),)),
        Slice(dim=0, pieces=((3, 9),)),
        Slice(dim=0, pieces=((7, 12),)),
        Slice(dim=0, pieces=((8, 12),)),
        Slice(dim=0, pieces=((12, 16),)),
        Slice(dim=0, pieces=((0, 2), (5, 8))),
        Slice(dim=1, pieces=((1, 2),)),
    ],
)
def test_new_rows_are_the_mean_and_padding_is_zero(tmp_path, whole, part):
    if part is not None and part.dim >= whole.dim():
        return
    files = WeightFiles(folder_of(tmp_path / "m", {"t": whole}))
    grown = torch.cat([whole, whole.mean(0, keepdim=True).expand(3, *whole.shape[1:])])
    found = read_grown(files, "t", part, torch.float32, 9)
    torch.testing.assert_close(found, part.take(grown) if part else grown, rtol=1e-6, atol=0)
    parameter = nn.Parameter(torch.full_like(found, 7).bfloat16())
    load({"model.t": (parameter, part)}, files, {"model.t": "t"}, grown={"model.t": 9})
    assert torch.equal(parameter.detach(), found.bfloat16())


def test_the_mean_is_exact_over_many_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("sft.model.weights._CHUNK_ELEMENTS", 100)
    whole = (torch.randn(999, 7) + 100).bfloat16()
    files = WeightFiles(folder_of(tmp_path / "m", {"t": whole}))
    assert torch.equal(files.row_mean("t"), whole.double().mean(0).float())


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "model.pt"]
)
def test_pickles_are_refused_with_the_remedy(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80")
    message = refusal(WeightFiles, tmp_path)
    assert f"{tmp_path} has {name} but no model.safetensors: a pickle can run any program and is not read" in message
    assert ".save_pretrained(" in message


def test_a_folder_without_weights_is_refused(tmp_path):
    assert f"{tmp_path} has neither {SINGLE} nor {INDEX}: give the folder of a Hugging Face model" in refusal(
        WeightFiles, tmp_path
    )
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "it is an adapter: merge it into its base model first" in refusal(WeightFiles, tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    root = folder_of(tmp_path / "m")
    content = (root / SINGLE).read_bytes()[:keep]
    (root / SINGLE).write_bytes(content)
    assert f"{root / SINGLE} ({len(content)} bytes) is not a complete safetensors file" in refusal(WeightFiles, root)


def test_a_truncated_shard_is_named(tmp_path):
    root = folder_of(tmp_path / "m", num_files=3)
    shard = root / "model-00002-of-00003.safetensors"
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert f"{shard} (43 bytes) is not a complete safetensors file" in refusal(match, root)


def test_a_missing_shard_is_named(tmp_path):
    root = folder_of(tmp_path / "m", num_files=3)
    (root / "model-00002-of-00003.safetensors").unlink()
    assert f"{INDEX} names model-00002-of-00003.safetensors, missing in {root}: fetch the folder again" in refusal(
        WeightFiles, root
    )


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": null}}', "\xff"])
def test_a_broken_index_is_named(tmp_path, content):
    (tmp_path / INDEX).write_text(content, encoding="latin-1")
    assert f"{tmp_path / INDEX} is not an index of weights" in refusal(WeightFiles, tmp_path)


def test_an_index_of_another_model_is_named(tmp_path):
    root = folder_of(tmp_path / "m", num_files=2)
    index = json.loads((root / INDEX).read_text())
    index["weight_map"]["other"] = "model-00001-of-00002.safetensors"
    (root / INDEX).write_text(json.dumps(index))
    message = refusal(match, root)
    assert re.search(r"model-00001-of-00002.safetensors does not hold other, which .* says it does", message)


_MEASURED = """
import sys, torch
from pathlib import Path
from sft.model.slices import Slice
from sft.model.weights import WeightFiles
def kib(key): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key + ":"))
files = WeightFiles(Path(sys.argv[1]))
files.read("warm", Slice(dim=0, pieces=((0, 2),)), torch.float32)
Path("/proc/self/clear_refs").write_text("5")
before, dim = kib("VmHWM"), int(sys.argv[2])
parts = [files.read(f"t{n}", Slice(dim=dim, pieces=((512, 1024),)), torch.float32) for n in range(24)]
sys.stdout.write(str((kib("VmHWM") - before) // 1024))
"""


@pytest.mark.parametrize("dim", [0, 1])
def test_memory_is_the_own_share(tmp_path, dim):
    """Of 384 MiB a quarter is read: 96 MiB, and beside it what is mapped at a time."""
    save_file({f"t{n}": torch.zeros(2048, 2048) for n in range(24)} | {"warm": torch.zeros(4, 4)}, tmp_path / SINGLE)
    done = subprocess.run([sys.executable, "-c", _MEASURED, str(tmp_path), str(dim)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 90 <= int(done.stdout) <= 96 + 128 + 16 + 16
