"""Mutations of JSON that leave it JSON: keys and values that go, come twice, change places, or become something odd."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

ODD: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    10**30,
    0.5,
    -0.0,
    1e308,
    1e400,
    float("nan"),
    "",
    " ",
    "a",
    "0",
    "²",
    "٣",
    "\x00",
    "\ud800",
    "\u0301",
    "\ufeff",
    "../../x",
    "/",
    "a" * 300,
    "{x}",
    "{{",
    "<|im_end|>",
    [],
    {},
    [[]],
    [None],
    {"": None},
    {"a": {"a": {}}},
]


def mutator(prefix: int, otherwise: Callable[[bytes, int], bytes]) -> Callable[[bytes, int, int], bytes]:
    """For atheris: of inputs that are `prefix` bytes and then JSON. What is none is mutated byte by byte, and so is
    some of the rest.
    """

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        rng = random.Random(seed)
        try:
            value = json.loads(data[prefix:])
        except (ValueError, RecursionError):
            return otherwise(data, longest)
        if rng.random() < 0.2:
            return otherwise(data, longest)
        for _ in range(rng.choice((1, 1, 2, 5))):
            value = _mutated(value, rng)
        try:
            made = data[:prefix] + json.dumps(value, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
        except (ValueError, RecursionError):
            return otherwise(data, longest)
        return made if len(made) <= longest else otherwise(data, longest)

    return mutate


def changed(whole: dict[str, Any], change: bytes) -> dict[str, Any] | None:
    """With other values at some keys; what is a mapping on both sides is changed key by key. None where `change` is no
    JSON object.
    """
    try:
        given = json.loads(change)
    except (ValueError, RecursionError):
        return None
    if not isinstance(given, dict):
        return None
    return {
        **whole,
        **{
            k: {**whole[k], **v} if isinstance(v, dict) and isinstance(whole.get(k), dict) else v
            for k, v in given.items()
        },
    }


def _mutated(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.85:
        value, key = dict(value), rng.choice(list(value))
        action = rng.randrange(8)
        if action == 0:
            del value[key]
        elif action == 1:
            value[key + rng.choice((" ", "s", "\u0301", "_"))] = value.pop(key)
        elif action == 2:
            value[rng.choice(list(value))] = value[key]
        else:
            value[key] = _mutated(value[key], rng)
        return value
    if isinstance(value, list) and value and rng.random() < 0.85:
        value, at = list(value), rng.randrange(len(value))
        action = rng.randrange(6)
        if action == 0:
            del value[at]
        elif action == 1:
            value.insert(at, value[rng.randrange(len(value))])
        else:
            value[at] = _mutated(value[at], rng)
        return value
    if isinstance(value, str) and rng.random() < 0.5:
        at = rng.randrange(len(value) + 1)
        return value[:at] + str(rng.choice(ODD)) + value[at + rng.randrange(3) :]
    return rng.choice(ODD)
