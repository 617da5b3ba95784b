"""Memory that does not grow with the rows: bytes are counted, those of numpy and Python by tracemalloc, those of Arrow
by its pool.
"""

from __future__ import annotations

import json
import multiprocessing
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import pair
from tokenize_data.append import joined
from tokenize_data.convert import Converted, Reject
from tokenize_data.drawn import Drawn
from tokenize_data.manifest import Manifest, read
from tokenize_data.pool import ordered_map
from tokenize_data.reader import ShardReader
from tokenize_data.shards import ShardWriter
from tokenize_data.sources import Chunk, open_sources
from tokenize_data.split import Split, part_of
from tokenize_data.tally import Tally

CHUNK = 5000
LENGTH = 4


def chunks(documents):
    for first in range(0, documents, CHUNK):
        counts = np.full(CHUNK, 2, np.uint32)
        yield Converted(
            Chunk(0, first + 1, b"", 0),
            ids=np.arange(CHUNK * LENGTH, dtype=np.uint16),
            lengths=counts * 2,
            trained=counts,
            cut=counts * 0,
            lines=np.arange(first + 1, first + 1 + CHUNK, dtype=np.uint32),
            runs_per_document=counts,
            run_lengths=np.repeat(counts, 2),
            run_roles=np.tile(np.array([2, 3], np.uint32), CHUNK),
        )


def write(folder, documents, prefix="part-x"):
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, prefix, np.dtype(np.uint16))
    for chunk in chunks(documents):
        writer.add(chunk)
    return writer.close()


def peak(work):
    """The most bytes at once."""
    before = pa.total_allocated_bytes()
    most = 0
    tracemalloc.start()
    try:
        for _ in work():
            most = max(most, pa.total_allocated_bytes() - before)
        return tracemalloc.get_traced_memory()[1] + most
    finally:
        tracemalloc.stop()


def test_ten_times_the_rows_are_written_in_the_same_memory(tmp_path):
    def work(documents):
        folder = tmp_path / str(documents)
        folder.mkdir()
        writer = ShardWriter(folder, "part-x", np.dtype(np.uint16))
        for chunk in chunks(documents):
            writer.add(chunk)
            yield
        writer.close()
        yield

    list(work(CHUNK))  # what is imported at first use
    few, many = peak(lambda: work(100_000)), peak(lambda: work(1_000_000))
    assert many < few + 200_000  # the index has 18 bytes a document


def manifest_of(bench, shards, index):
    content = bench.manifest() | {"documents": index.documents, "files": []}
    content |= {"shards": shards, "index": index}
    return Manifest(**{key: value for key, value in content.items() if key != "unknown"})


def test_an_appended_index_is_joined_in_the_same_memory(bench):
    bench.tokenize("--data", bench.jsonl([pair()]))

    def work(documents):
        folder = bench.tokenized / str(documents)
        found = manifest_of(bench, *write(folder, documents))
        added = manifest_of(bench, *write(folder, 10_000, "part-y"))
        yield
        made = joined(found, added, folder, "part-z")
        yield
        numbers = ShardReader.of(folder, made)
        assert numbers.index["source"][[0, documents - 1, documents, -1]].tolist() == [0, 0, 1, 1]
        assert numbers.index["line"][[documents - 1, documents]].tolist() == [documents, 1]

    list(work(CHUNK))
    few, many = peak(lambda: work(200_000)), peak(lambda: work(2_000_000))
    assert many < few + 20 * (1 << 20)  # a stretch of a million rows, whatever the number of rows
    assert many < 18 * 2_000_000


def test_the_index_is_one_record_batch_that_is_mapped(tmp_path):
    _, info = write(tmp_path / "d", 100_000)
    with pa.memory_map(str(tmp_path / "d" / info.file)) as mapped, pa.ipc.open_file(mapped) as opened:
        assert opened.num_record_batches == 1  # all that older releases read
        before = pa.total_allocated_bytes()
        batch = opened.get_batch(0)
        assert batch.schema.names == ["length", "trained", "cut", "line", "source"]
        assert batch.column("line").to_numpy().tolist() == list(range(1, 100_001))
        assert pa.total_allocated_bytes() == before


def test_a_killed_writer_leaves_nothing_in_the_folder_but_its_shard(tmp_path):
    writer = ShardWriter(tmp_path, "part-x", np.dtype(np.uint16))
    for chunk in chunks(CHUNK):
        writer.add(chunk)
    assert [entry.name for entry in tmp_path.iterdir()] == ["part-x-00000.arrow"]
    writer.abandon()


def test_many_different_reasons_are_counted_together(bench):
    source = open_sources([str(bench.jsonl([pair()]))])
    tally = Tally(10_000, source, bench.tokenized.parent / "rejected.jsonl")
    for number in range(1500):
        word = "".join(chr(ord("a") + int(digit)) for digit in str(number))
        tally.add(Converted(Chunk(0, 1, b"", 0), read=1, rejects=[Reject(number + 1, f"no key {word}", b"{}")]))
    tally.close()
    assert len(tally.reasons) == 1001
    assert tally.reasons["other reasons"] == 500
    assert sum(tally.reasons.values()) == 1500


# ---- workers


def test_results_that_wait_for_an_earlier_one_are_bounded():
    taken = multiprocessing.get_context("fork").Value("i", 0)
    release = multiprocessing.get_context("fork").Event()

    def tasks():
        for number in range(100):
            taken.value = number + 1
            if number == 15:  # the last one that may be taken while the first is not done
                release.set()
            yield number

    def work(number):
        if number == 0:
            assert release.wait(60)
        return number

    results = ordered_map(work, tasks(), 2)
    assert next(results) == 0
    assert taken.value <= 17
    assert list(results) == list(range(1, 100))


# ---- what a split draws


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=300), st.data())
def test_the_smallest_numbers_are_those_of_a_sorted_list(tmp_path_factory, numbers, data):
    numbers = [*numbers, *numbers[::3]]
    count = data.draw(st.integers(1, len(numbers) - 1))
    with Drawn(tmp_path_factory.mktemp("drawn")) as drawn:
        for at in range(0, len(numbers), 50):
            drawn.add(np.array(numbers[at : at + 50], np.uint64))
        assert len(drawn) == len(numbers)
        assert drawn.smallest(count) == sorted(numbers)[count - 1]
        groups = drawn.smallest_groups(count)
    at_most = [number for number in numbers if sum(other <= number for other in numbers) <= count]
    assert groups == max(at_most, default=min(numbers))


def test_a_million_numbers_take_as_much_memory_as_a_few(tmp_path):
    rng = np.random.default_rng(0)

    def work(count):
        with Drawn(tmp_path) as drawn:
            for _ in range(count // 10_000):
                drawn.add(rng.integers(0, 2**64 - 1, 10_000, np.uint64))
            yield drawn.smallest(count // 20)

    list(work(10_000))
    few, many = peak(lambda: work(1_100_000)), peak(lambda: work(5_500_000))
    assert many < few + 100_000  # 8 bytes a number are in a file


@pytest.mark.parametrize("group", [None, "who"])
def test_a_split_keeps_as_many_rows_as_were_asked_for(bench, group):
    rows = [{**pair(), "who": number // 7} for number in range(3000)]
    sources = open_sources([str(bench.jsonl(rows))])
    split = Split(wanted="10%", seed=3, group=group)
    part = part_of(split, sources, True, bench.tokenized.parent)
    kept = [number for number, row in enumerate(rows, 1) if part.has(0, number, row)]
    assert len(kept) == (300 if group is None else 294)


# ---- end to end


def test_rejected_rows_of_both_parts_stay_on_the_list(bench):
    bench.tokenize("--data", bench.write(json.dumps(pair()) + "\nfirst\n"), "--max_bad_rows", "1")
    more = bench.write(json.dumps(pair("Other?")) + "\nsecond\n", "more.jsonl")
    assert bench.tokenize("--data", more, "--max_bad_rows", "1", "--append").code == 0
    lines = (bench.tokenized / "r" / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == ["first", "second"]
    found = read(bench.tokenized / "r")
    assert found is not None
    named = {info.file.split("/")[0] for info in found.all_files()} | {"manifest.json", "rejected.jsonl"}
    assert {entry.name for entry in (bench.tokenized / "r").iterdir()} == named
    assert found.index.documents == 2
