"""Several validation data sets: each has figures of its own, against plain transformers with the exported model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.demo import make_rows
from tests.distributed.site import Site, make_site

RECIPE = """
run_name: orders
checkpoint: base
data: [train.jsonl]
seq: 256
val_datasets:
  - {name: wards, files: [val.jsonl]}
  - {name: short, files: [short.csv], question_key: q, answer_key: a}
global_batch: 12
iters: 4
eval_interval: 2
lr: 3e-3
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Site:
    site = make_site(tmp_path_factory.mktemp("parts"), smollm2)
    (site.root / "recipe.yaml").write_text(RECIPE)
    (site.root / "short.csv").write_text("q,a\nIs it?,Yes.\nSure?,No.\n")
    return site


def plain_loss(site: Site, run: str, pairs: list[tuple[str, str]]) -> tuple[float, int]:
    """(mean, number of answer tokens) by transformers, each conversation for itself."""
    folder = site.root / "checkpoints" / run / "hf"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for question, answer in pairs:
        asked = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        ids = [*prompt, *tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].double()
        targets = torch.tensor(ids[len(prompt) :])
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
    return total / count, count


def test_each_has_its_own_figures(site: Site):
    flags = ("--early_stopping", 9, "--early_stopping_on", "short", "--pp", 2, "--nproc_per_node", 2)
    done = site.sft("--config", "recipe.yaml", *flags)
    assert done.returncode == 0, done.stderr
    (run,) = [folder.name for folder in (site.root / "checkpoints").iterdir()]
    last = site.metrics(run)[-1]
    wards = [(row["prompt"], row["gold"]) for row in make_rows(7, 2)]
    expected = {
        "wards": plain_loss(site, run, wards),
        "short": plain_loss(site, run, [("Is it?", "Yes."), ("Sure?", "No.")]),
    }
    for name, (loss, _) in expected.items():
        assert last[f"val_loss/{name}"] == pytest.approx(loss, rel=2e-5)
        assert last[f"val_perplexity/{name}"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-3)
        assert f"  {name}  validation loss {loss:.4f}  perplexity" in done.stdout
    weights = sum(count for _, count in expected.values())
    assert last["val_loss"] == pytest.approx(sum(loss * count for loss, count in expected.values()) / weights, rel=2e-5)
    assert "val_loss/short" in (site.root / "checkpoints" / run / "report.html").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--config", "recipe.yaml"), "--early_stopping_on long: use one of the validation data sets wards, short"),
        (
            ("--checkpoint", "base", "--run_name", "one", "--data", "train.jsonl", "--val", "val.jsonl", "--seq", 256),
            "--early_stopping_on long chooses one of several validation data sets, but there is one: leave it out",
        ),
    ],
)
def test_only_a_data_set_that_is_validated_can_decide(site: Site, flags, message):
    done = site.sft(*flags, "--early_stopping", 2, "--early_stopping_on", "long")
    assert done.returncode == 2
    assert message in done.stderr
