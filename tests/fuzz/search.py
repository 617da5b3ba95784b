"""The process that fuzzes one target: python -m tests.fuzz.search TARGET SECONDS FOLDER. With atheris; without it,
mutations by chance.
"""

from __future__ import annotations

import hashlib
import importlib
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.fuzz import structure
from tests.fuzz.__main__ import FOUND

HANG_SECONDS = 300  # for a single input; libFuzzer's own limit against hanging
LONGEST = 4096
One = Callable[[bytes], None]


def main(target: str, seconds: str, folder: str) -> None:
    try:
        import atheris
    except ImportError:
        sys.stderr.write("atheris is not installed (pip install atheris): mutations by chance, without coverage\n")
        module = importlib.import_module(f"tests.fuzz.{target}")
        _by_chance(module.one, _seeds(target, module.SEEDS), int(seconds))
        return
    with atheris.instrument_imports(include=["sft", "tokenize_data"]):
        module = importlib.import_module(f"tests.fuzz.{target}")
    for seed in _seeds(target, module.SEEDS):
        module.one(seed)
        (Path(folder) / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
    options = [
        f"-max_total_time={seconds}",
        f"-timeout={HANG_SECONDS}",
        f"-max_len={LONGEST}",
        "-rss_limit_mb=4096",
        "-verbosity=1",
    ]
    options += ["-print_final_stats=1", f"-artifact_prefix={folder}/../{target}-"]
    plain = getattr(module, "PREFIX", None) is None
    mutator = (
        {}
        if plain
        else {"custom_mutator": structure.mutator(module.PREFIX, lambda data, longest: atheris.Mutate(data, longest))}
    )
    atheris.Setup([sys.argv[0], *options, folder], module.one, **mutator)
    atheris.Fuzz()


def _seeds(target: str, own: list[bytes]) -> list[bytes]:
    return [*own, *(file.read_bytes() for file in sorted((FOUND / target).glob("*")))]


def _by_chance(one: One, corpus: list[bytes], seconds: int) -> None:
    rng, end, count = random.Random(0), time.monotonic() + seconds, 0
    for seed in corpus:
        one(seed)
    while time.monotonic() < end:
        data = bytearray(rng.choice(corpus))
        for _ in range(rng.randint(1, 5)):
            at, other = rng.randrange(len(data) + 1), rng.choice(corpus)
            cut = sorted(rng.randrange(len(other) + 1) for _ in range(2))
            data[at : at + rng.choice((0, 0, 1, 4))] = rng.choice(
                (bytes([rng.randrange(256)]), other[cut[0] : cut[1]], b"")
            )
        count += 1
        try:
            one(bytes(data[:LONGEST]))
        except Exception:
            traceback.print_exc()
            sys.exit(f"{bytes(data)!r}")
    sys.stderr.write(f"{count} inputs\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
