"""The files of checkpoints and the protocol that makes them visible, without processes and without a model."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sft.checkpoint import commit
from sft.checkpoint.commit import ALONE, Peers, PendingSave, find_latest, prune, step_folders
from sft.checkpoint.fragments import Checkpoint, Fragment, write_fragments
from sft.checkpoint.manifest import FileRecord, damage
from sft.model.slices import Slice
from sft.spec.errors import CheckpointError
from tokenize_data.errors import UserError

ROOT = Path(__file__).parents[2]
CONTENT = {"optimizer_step": 3, "states": ["master"], "layout": {"tp": 1, "pp": 1, "dp": 1}, "facts": {"lr": 0.1}}
Write = Callable[[Path], list[FileRecord]]


def fragment(
    values: torch.Tensor, name: str = "w", offset: int = 0, shape: Any = None, part: Slice | None = None
) -> Fragment:
    shape = values.shape if shape is None else shape
    return Fragment(name=name, state="master", shape=tuple(shape), part=part, offset=offset, values=values.flatten())


def save(root: Path, iteration: int, fragments: list[Fragment] | None = None, limit_bytes: int = 1000) -> Path:
    values = torch.arange(600.0) + iteration
    fragments = fragments or [fragment(values[:400], shape=[600]), fragment(values[400:], offset=400, shape=[600])]
    return PendingSave(
        root, iteration, lambda folder: write_fragments(folder, fragments, 0, 1, limit_bytes), CONTENT, ALONE
    ).finish()


def save_ranks(root: Path, iteration: int, ranks: list[list[Fragment]]) -> Path:
    """What each rank has, in files of its own."""

    def write(folder: Path) -> list[FileRecord]:
        return [
            file
            for rank, mine in enumerate(ranks)
            for file in write_fragments(folder, mine, rank, len(ranks), limit_bytes=50)
        ]

    return PendingSave(root, iteration, write, CONTENT, ALONE).finish()


def split(whole: torch.Tensor, part: Slice | None, cuts: list[int]) -> list[Fragment]:
    """As ZeRO-1 does it: a part, flat, cut anywhere."""
    flat = (part.take(whole) if part else whole.clone()).flatten()
    bounds = [0, *cuts, flat.numel()]
    return [fragment(flat[start:stop], offset=start, shape=whole.shape, part=part) for start, stop in pairwise(bounds)]


def even(dim: int, length: int, ranks: int) -> list[Slice | None]:
    """With padding where it does not come out even."""
    share = -(-length // ranks)
    return [Slice(dim=dim, pieces=((rank * share, (rank + 1) * share),)) for rank in range(ranks)]


def test_any_layout_is_read_from_any(tmp_path: Path) -> None:
    rng = random.Random(0)
    fused: list[Slice | None] = [Slice(dim=0, pieces=((4 * r, 4 * r + 4), (8 + 2 * r, 10 + 2 * r))) for r in range(2)]
    number = 0
    for shape, dim in (((12, 5), 0), ((7, 12), 1), ((3, 10, 2), 1), ((11,), 0), ((), 0)):
        whole = torch.randn(shape)
        length = whole.shape[dim] if shape else 1
        layouts: list[list[Slice | None]] = [[None], *([even(dim, length, 2), even(dim, length, 4)] if shape else [])]
        layouts += [fused] if shape == (12, 5) else []
        for written in layouts:
            number += 1
            ranks = []
            for part in written:
                size = (part.take(whole) if part else whole).numel()
                ranks.append(
                    split(whole, part, sorted(rng.sample(range(1, size), min(3, size - 1))) if size > 1 else [])
                )
            checkpoint = Checkpoint(save_ranks(tmp_path, number, [rng.sample(mine, len(mine)) for mine in ranks]))
            assert torch.equal(checkpoint.read("w", "master"), whole)
            for part in (part for layout in layouts for part in layout):
                expected = part.take(whole) if part else whole
                assert torch.equal(checkpoint.read("w", "master", part), expected)
                start, stop = sorted(rng.choices(range(expected.numel() + 1), k=2))
                assert torch.equal(
                    checkpoint.read_stretch("w", "master", part, start, stop), expected.flatten()[start:stop]
                )


def test_a_part_sliced_along_another_dimension_is_read_too(tmp_path: Path) -> None:
    whole = torch.randn(6, 8)
    checkpoint = Checkpoint(save_ranks(tmp_path, 1, [split(whole, part, [5]) for part in even(0, 6, 2)]))
    (_, second) = even(1, 8, 2)
    assert second is not None
    assert torch.equal(checkpoint.read("w", "master", second), second.take(whole))
    assert torch.equal(checkpoint.read_stretch("w", "master", second, 3, 9), second.take(whole).flatten()[3:9])


def test_files_are_safetensors_of_limited_size(tmp_path: Path) -> None:
    values = [torch.full((100,), float(n), dtype=torch.bfloat16 if n % 2 else torch.float32) for n in range(5)]
    folder = save(tmp_path, 2, [fragment(value, name=f"w{n}") for n, value in enumerate(values)], limit_bytes=700)
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert files == [
        "rank-00000-of-00001-1.safetensors",
        "rank-00000-of-00001-2.safetensors",
        "rank-00000-of-00001.safetensors",
    ]
    stored = {key: value for file in files for key, value in load_file(folder / file).items()}
    assert all(torch.equal(stored[f"w{n}|master|0"], value) for n, value in enumerate(values))
    checkpoint = Checkpoint(folder)
    assert (checkpoint.names(), checkpoint.states(), checkpoint.iteration) == (
        [f"w{n}" for n in range(5)],
        ["master"],
        2,
    )
    assert checkpoint.whole_shape("w1") == (100,)
    assert checkpoint.read("w1", "master").dtype == torch.bfloat16


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save(tmp_path, 1, [fragment(torch.ones(4), shape=[10])]))
    with pytest.raises(UserError, match=r"step-0000001 lacks 6 of the values of w \(master\): take another checkpoint"):
        checkpoint.read("w", "master")
    assert torch.equal(checkpoint.read_stretch("w", "master", None, 0, 4), torch.ones(4))


def test_a_checkpoint_is_whole_and_pointed_to(tmp_path: Path) -> None:
    folder = save(tmp_path, 800)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-0000800"]
    assert (tmp_path / "latest").read_text() == "step-0000800\n"
    found, skipped = find_latest(tmp_path)
    assert found is not None
    assert (found.folder, found.manifest["facts"], skipped) == (folder, {"lr": 0.1}, [])
    assert torch.equal(found.read("w", "master"), torch.arange(600.0) + 800)


def test_a_committed_step_is_left_alone(tmp_path: Path) -> None:
    folder = save(tmp_path, 800)
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]}
    assert save(tmp_path, 800, [fragment(torch.zeros(3))]) == folder
    assert before == {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]}


def test_a_damaged_step_is_replaced(tmp_path: Path) -> None:
    (save(tmp_path, 800) / "manifest.json").unlink()
    assert damage(save(tmp_path, 800)) is None
    prune(tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-0000800"]


def _truncate(file: Path, other: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def _zero(file: Path, other: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def _empty(file: Path, other: Path) -> None:
    file.write_bytes(b"")


def _delete(file: Path, other: Path) -> None:
    file.unlink()


def _swap(file: Path, other: Path) -> None:
    shutil.copyfile(other, file)


def _link(file: Path, other: Path) -> None:
    shutil.move(file, other.parent / "elsewhere")
    file.symlink_to(other.parent / "elsewhere")


@pytest.mark.parametrize("harm", [_truncate, _zero, _empty, _delete, _swap, _link])
def test_damage_to_any_file_is_found_and_the_one_before_taken(
    tmp_path: Path, harm: Callable[[Path, Path], None]
) -> None:
    names = [file.name for file in save(tmp_path / "good", 8).iterdir()]
    assert len(names) == 3
    for name in names:
        root = tmp_path / name
        old, new = save(root, 4), save(root, 8)
        harm(new / name, old / name)
        (old / "elsewhere").unlink(missing_ok=harm is not _link)
        found, skipped = find_latest(root)
        assert found is not None
        assert found.folder == old
        assert len(skipped) == 1
        assert skipped[0].startswith("step-0000008 is not used: ")
        assert name in skipped[0]


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    rng = random.Random(1)
    folder = save(tmp_path, 8, [fragment(torch.ones(3))])
    for file in folder.iterdir():
        good = file.read_bytes()
        for position in rng.sample(range(len(good) * 8), min(500, len(good) * 8)):
            bad = bytearray(good)
            bad[position // 8] ^= 1 << position % 8
            file.write_bytes(bad)
            assert damage(folder) is not None, (file.name, position)
        file.write_bytes(good)
    assert damage(folder) is None


def test_a_step_under_another_number_is_found(tmp_path: Path) -> None:
    save(tmp_path, 4).rename(tmp_path / "step-0000009")
    assert "is that of iteration 4" in str(damage(tmp_path / "step-0000009"))


def test_a_manifest_cannot_point_elsewhere(tmp_path: Path) -> None:
    folder = save(tmp_path, 4)
    commit.write_manifest(
        folder, {**CONTENT, "iteration": 4, "files": [{"name": "../../x.safetensors", "bytes": 1, "sha256": ""}]}
    )
    assert "files of other names than sft gives" in str(damage(folder))


def test_no_whole_checkpoint_is_an_error_and_none_is_none(tmp_path: Path) -> None:
    assert find_latest(tmp_path / "nothing") == (None, [])
    (tmp_path / "notes").mkdir()
    assert find_latest(tmp_path) == (None, [])
    for iteration in (4, 8):
        (save(tmp_path, iteration) / "manifest.json").unlink()
    with pytest.raises(
        UserError,
        match=r"no checkpoint in .* is complete \(step-0000008 is not used: .*; step-0000004 .*\): restore one",
    ):
        find_latest(tmp_path)


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    file = save(tmp_path, 4) / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2}))
    assert "format 2, this version of sft reads 1" in str(damage(file.parent))


def together(world: int, work: Callable[[Peers], Any]) -> list[Any]:
    """Ranks as threads. What each returned or raised."""
    barrier, board, results = threading.Barrier(world), [None] * world, [None] * world

    def gather(rank: int, mine: Any) -> list[Any]:
        board[rank] = mine
        barrier.wait(20)
        everyone = list(board)
        barrier.wait(20)
        return everyone

    def run(rank: int) -> None:
        try:
            results[rank] = work(Peers(rank=rank, size=world, gather=lambda mine: gather(rank, mine)))
        except UserError as error:
            results[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def saving(root: Path, iteration: int, write: Callable[[Path, int], list[FileRecord]]) -> Callable[[Peers], Path]:
    return lambda peers: PendingSave(root, iteration, lambda folder: write(folder, peers.rank), CONTENT, peers).finish()


def write_share(folder: Path, rank: int) -> list[FileRecord]:
    return write_fragments(folder, [fragment(torch.full((5,), float(rank)), offset=5 * rank, shape=[20])], rank, 4)


def test_ranks_save_and_verify_together(tmp_path: Path) -> None:
    assert together(4, saving(tmp_path, 8, write_share)) == [tmp_path / "step-0000008"] * 4
    for found, skipped in together(4, lambda peers: find_latest(tmp_path, peers=peers)):
        assert not skipped
        assert found.read("w", "master").tolist() == [float(n // 5) for n in range(20)]
    file = tmp_path / "step-0000008" / "rank-00002-of-00004.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    errors = together(4, lambda peers: find_latest(tmp_path, peers=peers))
    assert all("rank-00002-of-00004.safetensors is not what was written" in str(error) for error in errors)


def test_a_failure_on_one_rank_is_one_on_all(tmp_path: Path) -> None:
    save(tmp_path, 4)

    def failing(folder: Path, rank: int) -> list[FileRecord]:
        if rank == 2:
            raise OSError(28, "No space left on device", "/x/rank-2")
        return write_share(folder, rank)

    errors = together(4, saving(tmp_path, 8, failing))
    assert {str(error) for error in errors} == {
        f"the checkpoint of iteration 8 was not saved (rank 2 on {socket.gethostname()}: No space left on device "
        "(/x/rank-2)): "
        "free some space, or fix what it names; earlier checkpoints are untouched"
    }
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-0000004"]


@pytest.mark.parametrize("name", ["write_manifest", "fsync_folder", "_point_to"])
def test_a_failure_of_rank_0_at_the_end_is_one_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    save(tmp_path, 4)

    def broken(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(commit, name, broken)
    errors = together(2, saving(tmp_path, 8, write_share))
    assert all("rank 0 on" in str(error) and "Input/output error" in str(error) for error in errors)
    monkeypatch.undo()
    found, _ = find_latest(tmp_path)
    assert found is not None
    assert found.iteration == (8 if name == "_point_to" else 4)
    assert not list(tmp_path.glob(".writing*"))


def test_storage_that_not_all_hosts_share_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "_PATIENCE_SECONDS", 0.3)

    def on_own_disk(folder: Path, rank: int) -> list[FileRecord]:
        (own := tmp_path / f"own-{rank}").mkdir()
        return write_share(folder if rank == 0 else own, rank)

    errors = together(2, saving(tmp_path / "root", 8, on_own_disk))
    assert all("rank-00001-of-00004.safetensors is not visible here" in str(error) for error in errors)


def test_a_full_disk_is_said_and_leaves_the_one_before(tmp_path: Path) -> None:
    program = """
        import resource, sys, pathlib
        from tests.unit.test_checkpoint import fragment, save, torch
        root = pathlib.Path(sys.argv[1])
        save(root, 4)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        save(root, 8, [fragment(torch.ones(50_000))])
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert "the checkpoint of iteration 8 was not saved (rank 0 on" in done.stderr
    assert "File too large" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-0000004"]


def test_a_killed_save_leaves_nothing_visible_and_is_cleared_away(tmp_path: Path) -> None:
    save(tmp_path, 4)
    program = """
        import os, sys, pathlib
        from sft.checkpoint.commit import ALONE, PendingSave
        PendingSave(pathlib.Path(sys.argv[1]), 8, lambda folder: os._exit(9), {}, ALONE).finish()
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False).returncode == 9
    (leftover,) = tmp_path.glob(".writing-step-0000008@*")
    found, skipped = find_latest(tmp_path)
    assert found is not None
    assert (found.iteration, skipped) == (4, [])
    assert prune(tmp_path, keep=3) == [leftover]
    assert not leftover.exists()


def test_prune_keeps_the_newest_the_best_and_what_is_in_use(tmp_path: Path) -> None:
    for iteration in (2, 4, 6, 8, 10):
        save(tmp_path, iteration)
    (tmp_path / "step-0000010" / "manifest.json").unlink()
    names = [
        f".writing-step-0000012@{socket.gethostname()}@{os.getpid()}@00ff",
        f".writing-step-0000012@{socket.gethostname()}@{os.getppid()}@00ff",
        ".writing-step-0000012@another@1@00ff",
        ".removing-step-0000001@another@1@00ff",
        ".writing-mine",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    gone = prune(tmp_path, keep=2, best=2, in_use=tmp_path / names[0])
    assert [folder.name for folder in gone] == ["step-0000004", names[3]]
    assert [folder.name for folder in step_folders(tmp_path)] == [
        "step-0000010",
        "step-0000008",
        "step-0000006",
        "step-0000002",
    ]
    assert all((tmp_path / name).exists() == (name != names[3]) for name in names)
    os.utime(tmp_path / names[2], (0, 0))
    prune(tmp_path, keep=2, best=2)
    assert not (tmp_path / names[0]).exists()
    assert not (tmp_path / names[2]).exists()
    assert (tmp_path / names[1]).exists()


def test_training_goes_on_while_a_thread_writes(tmp_path: Path) -> None:
    may_write = threading.Event()

    def write(folder: Path) -> list[FileRecord]:
        may_write.wait(20)
        return write_fragments(folder, [fragment(torch.ones(3))], 0, 1)

    pending = PendingSave(tmp_path, 8, write, CONTENT, ALONE)
    assert pending.poll() is None
    assert find_latest(tmp_path) == (None, [])
    may_write.set()
    while (done := pending.poll()) is None:
        pass
    assert done == pending.finish() == tmp_path / "step-0000008"
    assert damage(done) is None
