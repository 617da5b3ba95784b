"""`sft --config` from the command line: recipe, run, and an upload that fails, to a Hub on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.site import Site, make_site
from tests.fake_hub import fake_hub

_RECIPE = """
extends: shared.yaml
run_name: orders
datasets:
  - name: first orders
    files: [train.jsonl]
    prompt: "Order: {prompt}"
    samples: 24
val_datasets:
  - {files: val.jsonl, prompt: "Order: {prompt}"}
eval_interval: 1
early_stopping: 5
push_to_hub: me/orders
"""
_SHARED = "checkpoint: ${BASE}\nseq: 256\nglobal_batch: 12\nlr: 1e-3\nloss: full\ntensorboard: no\niters: 9\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Site:
    site = make_site(tmp_path_factory.mktemp("recipe"), smollm2)
    (site.root / "recipe.yaml").write_text(_RECIPE)
    (site.root / "shared.yaml").write_text(_SHARED)
    return site


def test_a_recipe_trains_and_what_could_not_be_uploaded_is_uploaded_later(site: Site):
    with fake_hub() as hub:
        given = {
            "BASE": "base",
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(site.root / "home"),
            "HF_TOKEN": "hf_t",
            "HF_HUB_DISABLE_XET": "1",
        }
        command = ["--config", "recipe.yaml", "--iters", "2"]
        refused = site.sft(*command, env={**given, "HF_TOKEN": ""})
        assert (refused.returncode, "needs a token" in refused.stderr) == (2, True)
        assert not (site.root / "checkpoints").exists()
        hub.fail_at = "/commit/"
        first = site.sft(*command, env=given)
        assert first.returncode == 0, first.stderr
        assert "warning: " in first.stderr
        assert "could not be uploaded as me/orders" in first.stderr
        run = site.root / "checkpoints" / "llama-base-orders-seq256-loss1"
        assert site.status(run.name)["state"] == "finished"
        assert len(site.metrics(run.name)) == 2
        assert site.metrics(run.name)[0]["documents"] == 12
        hub.fail_at = None
        again = site.sft(*command, env=given)
        assert again.returncode == 0, again.stderr
        assert "uploaded  " in again.stdout
        card = hub.files("me/orders")["README.md"].decode()
        assert "| training | first orders | train.jsonl | qa | " in card
        assert 'prompt: "Order: {prompt}"' in card
        assert "validation loss" in card
        assert {"loss.png", "model.safetensors", "tokenizer.json", "recipe.yaml"} <= hub.files("me/orders").keys()
        assert site.sft(*command, env=given).returncode == 1
    (site.root / "saved.yaml").write_bytes((run / "recipe.yaml").read_bytes())
    same = site.sft("--config", "saved.yaml")
    assert same.returncode == 2  # it would upload, and there is no token
    assert "needs a token" in same.stderr
    assert "iters: 2" in (run / "recipe.yaml").read_text()
