"""Mixing data sets: shares, temperature, a curriculum; against a plain simulation of what they promise."""

from __future__ import annotations

from itertools import count, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.plan.mixing import MixPart, mix, shares_of
from sft.plan.sampler import Sampler, num_iterations
from tokenize_data.errors import UserError
from tokenize_data.manifest import FEISTEL, PERMUTATION

SIZES = {"notes": 100, "letters": 900}
SHUFFLES = (PERMUTATION, FEISTEL)


def parts(*pairs):
    return tuple(MixPart(name=f"d{number}", documents=n, per_epoch=k) for number, (n, k) in enumerate(pairs))


def stream(sampler, epochs):
    iterations = num_iterations(sampler.num_documents, epochs, sampler.global_batch)
    return np.concatenate([sampler.documents(number) for number in range(iterations)])


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_by_size_an_epoch_is_what_it_is_without_a_mix(shuffle):
    made = mix(SIZES, 1.0, ())
    assert [(part.name, part.per_epoch) for part in made] == [("notes", 100), ("letters", 900)]
    plain, mixed = Sampler(1000, 64, 3, shuffle=shuffle), Sampler(1000, 64, 3, made, shuffle=shuffle)
    assert all((plain.documents(number) == mixed.documents(number)).all() for number in range(40))


@pytest.mark.parametrize(
    ("temperature", "wanted", "expected"),
    [
        (1.0, (), (100, 900)),
        (2.0, (), (250, 750)),  # roots 10 and 30
        (1e9, (), (500, 500)),
        (1.0, ("notes=0.3",), (300, 700)),
        (1.0, ("notes=0.25", "letters=0.75"), (250, 750)),
    ],
)
def test_how_much_an_epoch_takes(temperature, wanted, expected):
    made = mix(SIZES, temperature, wanted)
    assert tuple(part.per_epoch for part in made) == expected
    assert sum(part.per_epoch for part in made) == 1000


def test_what_is_left_is_divided_by_size():
    shares = shares_of({"a": 100, "b": 300, "c": 600}, 1.0, {"c": 0.2})
    assert shares == pytest.approx({"a": 0.2, "b": 0.6, "c": 0.2})


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=2, max_size=4),
    st.integers(1, 17),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from(SHUFFLES),
)
def test_every_epoch_has_its_shares_and_every_document_its_turn(pairs, batch, epochs, in_order, shuffle):
    total = sum(k for _, k in pairs)
    pairs = [*pairs[:-1], (pairs[-1][0], pairs[-1][1])]
    sizes = [n for n, _ in pairs]
    if sum(sizes) != total:  # an epoch has as many documents as there are: adjust the last part's share
        difference = sum(sizes) - sum(k for _, k in pairs[:-1])
        if difference < 1:
            return
        pairs[-1] = (sizes[-1], difference)
    made = parts(*pairs)
    sampler = Sampler(sum(sizes), batch, 5, made, in_order, shuffle)
    found = stream(sampler, epochs)
    edges = np.cumsum([0, *sizes])
    for epoch in range(epochs):
        chosen = found[epoch * sum(sizes) : (epoch + 1) * sum(sizes)]
        of_part = np.searchsorted(edges, chosen, side="right") - 1
        assert np.bincount(of_part, minlength=len(pairs)).tolist() == [k for _, k in pairs]
        if in_order:
            assert (np.diff(of_part) >= 0).all()
    whole = found[: epochs * sum(sizes)]
    for number, (size, per_epoch) in enumerate(pairs):
        own = whole[(whole >= edges[number]) & (whole < edges[number + 1])] - edges[number]
        times = np.bincount(own, minlength=size)
        assert times.max() - times.min() <= 1
        assert times.sum() == epochs * per_epoch


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 13), st.integers(0, 30), st.booleans(), st.sampled_from(SHUFFLES))
def test_seeking_and_counting_equal_going_through(batch, iteration, in_order, shuffle):
    made = parts((20, 5), (10, 25))
    sampler = Sampler(30, batch, 7, made, in_order, shuffle)
    batches = [sampler.documents(number) for number in range(iteration + 1)]
    assert Sampler(30, batch, 7, made, in_order, shuffle).documents(iteration).tolist() == batches[-1].tolist()
    before = np.concatenate([np.empty(0, np.uint32), *batches[:-1]])
    assert sampler.seen(iteration).tolist() == [int((before < 20).sum()), int((before >= 20).sum())]
    assert sampler.count(batches[-1]).tolist() == [int((batches[-1] < 20).sum()), int((batches[-1] >= 20).sum())]


def test_seeds_and_epochs_differ():
    made = parts((500, 250), (500, 750))
    one, other = Sampler(1000, 1000, 1, made), Sampler(1000, 1000, 2, made)
    assert one.documents(0).tolist() != other.documents(0).tolist()
    assert one.documents(0).tolist() != one.documents(1).tolist()
    first = set(islice((int(n) for n in one.documents(0) if n < 500), 250))
    second = {int(n) for n in one.documents(1) if n < 500}
    assert first | second == set(islice(count(), 500))  # what one epoch left out comes in the next


@pytest.mark.parametrize(
    ("sizes", "temperature", "wanted", "message"),
    [
        ({"a": 5}, 1.0, ("a=0.5",), "--mix a=0.5 mixes several data sets, but there is one"),
        ({"a": 5}, 2.0, (), "--mix_temperature 2 mixes several data sets, but there is one"),
        (SIZES, 1.0, ("note=0.5",), "--mix note=0.5: no data set is named 'note': did you mean 'notes'?"),
        (SIZES, 1.0, ("x=0.5",), "no data set is named 'x': the data sets are notes, letters"),
        (SIZES, 1.0, ("notes=2",), "--mix notes=2: write a share between 0 and 1, such as notes=0.3"),
        (SIZES, 1.0, ("notes=",), "write a share between 0 and 1"),
        (SIZES, 1.0, ("notes=0.1", "notes=0.2"), "--mix names 'notes' twice"),
        (SIZES, 1.0, ("notes=0.5", "letters=0.4"), "the shares of all data sets add up to 0.9: make it 1"),
        ({**SIZES, "c": 9}, 1.0, ("notes=0.5", "letters=0.5"), "--mix leaves nothing for 'c'"),
        (SIZES, 1.0, ("notes=0.0001",), "none of 1,000 documents would be of 'notes'"),
    ],
)
def test_what_cannot_be_mixed(sizes, temperature, wanted, message):
    with pytest.raises(UserError) as caught:
        mix(sizes, temperature, wanted)
    assert message in str(caught.value)
