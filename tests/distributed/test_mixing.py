"""Mixed data sets from the command line: what metrics say was seen is what a plain count gives, also after a resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft.plan.mixing import MixPart
from sft.plan.sampler import Sampler
from tests.distributed.site import Site, make_site

RECIPE = """
run_name: mixed
checkpoint: base
seq: 256
datasets:
  - {name: wards, files: [train.jsonl]}
  - {name: short, files: [short.csv], question_key: q, answer_key: a}
mix: [short=0.5]
global_batch: 6
epochs: 2
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Site:
    site = make_site(tmp_path_factory.mktemp("mixing"), smollm2)
    (site.root / "recipe.yaml").write_text(RECIPE)
    (site.root / "short.csv").write_text("q,a\n" + "".join(f"Is it {number}?,Yes.\n" for number in range(10)))
    return site


def num_rows(site: Site) -> int:
    return len((site.root / "train.jsonl").read_text().splitlines())


def test_seen_shares(site: Site):
    rows, batch = num_rows(site), 6
    done = site.sft("--config", "recipe.yaml", "--id", "whole")
    assert done.returncode == 0, done.stderr
    (run,) = [folder.name for folder in (site.root / "checkpoints").iterdir()]
    metrics = site.metrics(run)
    total = rows + 10
    half = total // 2
    parts = (
        MixPart(name="wards", documents=rows, per_epoch=total - half),
        MixPart(name="short", documents=10, per_epoch=half),
    )
    sampler, seen = Sampler(total, batch, 1234, parts), 0
    for number, record in enumerate(metrics):
        seen += int((sampler.documents(number) >= rows).sum())
        assert record["seen/short"] == pytest.approx(seen / (batch * (number + 1)), abs=1e-6)
        assert record["seen/wards"] == pytest.approx(1 - record["seen/short"], abs=2e-6)
    assert metrics[-1]["seen/short"] == pytest.approx(0.5, abs=batch / total)


def test_one_after_another(site: Site):
    done = site.sft("--config", "recipe.yaml", "--id", "order", "--order", "curriculum", "--epochs", 1)
    assert done.returncode == 0, done.stderr
    (run,) = [folder.name for folder in (site.root / "checkpoints").iterdir() if folder.name.endswith("order")]
    shares = [record["seen/short"] for record in site.metrics(run)]
    assert shares[0] == 0.0
    assert shares == sorted(shares)
    assert shares[-1] > 0


def test_no_data_set_of_that_name(site: Site):
    done = site.sft("--config", "recipe.yaml", "--id", "bad", "--mix", "long=0.5")
    assert done.returncode == 2
    assert "--mix long=0.5: no data set is named 'long': the data sets are wards, short" in done.stderr
