"""The page of a run: what it says, that it is one file without a network, what it hides, and how a browser shows it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import threading
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sft.cli import entry
from sft.config.flags import add_flags, typed_values
from sft.config.settings import Settings
from sft.observe import report, serve
from sft.spec.run_folder import write_run_toml, write_status
from tests.conftest import Workbench, pair
from tokenize_data.errors import OneLineParser

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (path := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium")
KEY = "sk-0123456789abcdefghij"


def make_run(folder: Path, iterations: int = 40, offset: float = 0.0, state: Any = "finished", **values: Any) -> Path:
    folder.mkdir(parents=True)
    config = Settings.of(run_name="orders", checkpoint="my model/hf", data=("a b.jsonl",), lr=1e-4, **values).as_json()
    resolved = {
        "base": "owner/base",
        "model_type": "llama",
        "iterations": iterations,
        "tp": 1,
        "pp": 1,
        "dp": 1,
        "micro_batch": 1,
        "recompute": "none",
        "dtype": "fp32",
        "sequence_parallel": False,
    }
    write_run_toml(folder, config=config, resolved=resolved, versions={"torch": "2.13.0"})
    write_status(
        folder,
        state=state,
        iteration=iterations,
        iterations=iterations,
        reason="loss is NaN" if state == "failed" else "",
    )
    lines = []
    for number in range(1, iterations + 1):
        record: dict[str, float] = {
            "iteration": number,
            "loss": offset + 3 / number,
            "lr": 1e-4,
            "grad_norm": 1.0,
            "tokens": 100,
        }
        record |= {"trained_tokens": 10, "seconds": 0.5, "tokens_per_second": 200.0}
        record |= {"val_loss": offset + 3.3 / number} if number % 10 == 0 else {}
        lines.append(json.dumps(record))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def add_evaluation(folder: Path, answer: str) -> None:
    (folder / "evaluation").mkdir()
    score = {"value": 0.5, "low": 0.4, "high": 0.6, "count": 3}
    change = {"value": 0.25, "low": 0.1, "high": 0.4, "p": 0.01, "count": 3}
    before, after = {"rows": 3, "scores": {"exact_match": score}}, {"rows": 3, "scores": {"exact_match": score}}
    after["differences"] = {"exact_match": change}
    models = [{"label": label, "datasets": {"test": table}} for label, table in (("base", before), ("tuned", after))]
    (folder / "evaluation" / "scores.json").write_text(json.dumps({"base": "base", "models": models}))
    rows = [
        {
            "model": label,
            "dataset": "test",
            "row": row,
            "question": f"question {row}?",
            "references": ["CAR/1"],
            "answer": text,
            "scores": {"exact_match": float(text == "CAR/1")},
        }
        for label, text in (("base", answer), ("tuned", "CAR/1"))
        for row in range(3)
    ]
    (folder / "evaluation" / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def facts_in(page: str) -> dict[str, Any]:
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert text
    content: dict[str, Any] = json.loads(text.group(1))
    return content


def test_the_page_says_what_the_folder_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", iterations=40)
    add_evaluation(run, "no idea")
    (run / "warnings.log").write_text("step-0000010 is damaged\nstep-0000010 is damaged\n")
    assert entry(["report", str(run)]) == 0
    assert "report.html" in capsys.readouterr().out
    (facts,) = facts_in((run / "report.html").read_text())["runs"]
    assert facts["series"]["loss"] == [list(range(1, 41)), [float(f"{3 / n:.6g}") for n in range(1, 41)]]
    assert facts["series"]["val_loss"][0] == [10, 20, 30, 40]
    assert (facts["tokens"], facts["seconds"], facts["warnings"]) == (4000, 20.0, ["step-0000010 is damaged"])
    assert facts["samples"][0]["answers"] == {
        "base": {"text": "no idea", "right": False},
        "tuned": {"text": "CAR/1", "right": True},
    }
    assert facts["versions"] == {"torch": "2.13.0"}


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    page = report.page([make_run(tmp_path / "run")])
    assert not re.search(
        r"""(?:src|href)\s*=\s*["'](?!data:)|@import|url\((?!#|data:)""", page.replace("url(#${clip})", "")
    )
    assert "default-src 'none'" in page


def test_texts_cannot_leave_the_data(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    add_evaluation(run, "</script><script>document.title='broken'</script><!--")
    page = report.page([run])
    assert page.count("<script") == 2
    assert facts_in(page)["runs"][0]["samples"][0]["answers"]["base"]["text"].startswith("</script>")


def test_keys_and_passwords_are_not_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", val=("https://me:pass1234@host/x.jsonl",))
    add_evaluation(run, f"use {KEY} or hf_abcdefghijklmnop or Authorization: Bearer abcdef123456789")
    (run / "warnings.log").write_text(f"cannot log in with api_key={KEY}\n")
    page = report.page([run])
    for secret in (KEY, "hf_abcdefghijklmnop", "abcdef123456789", "pass1234"):
        assert secret not in page
    assert page.count("[hidden]") >= 5


SECRETS = {
    "a key of Weights & Biases": ("login with {}", "0123456789abcdef0123456789abcdef01234567"),
    "a password": ("password: {}", "hunter22"),
    "in quotes": ('{{"password": "{}"}}', "two words"),
    "a variable": ("WANDB_API_KEY={} sft", "abcd"),
    "YAML": ("api_key: {}", "abcd-efgh"),
    "a flag": ("--hub_token={}", "abcdefg"),
    "basic": ("Authorization: Basic {}", "dXNlcjpwYXNz"),
    "a secret": ("client_secret = '{}'", "it's"[:2]),
    "cut off": ("x" * 3990 + " {}", KEY),
}


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_are_not_shown(tmp_path: Path, name: str) -> None:
    text, secret = SECRETS[name]
    run = make_run(tmp_path / "run")
    (run / "warnings.log").write_text(text.format(secret) + "\n")
    (shown,) = facts_in(report.page([run]))["runs"][0]["warnings"]
    assert "[hidden]" in shown or name == "cut off"
    assert secret not in shown.replace("client_secret", "")
    assert secret[:8] not in shown or name == "a secret"


def test_settings_that_are_secrets_by_their_name(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    commit = "89abcdef0123456789abcdef0123456789abcdef"
    resolved = {
        "api_key": "short",
        "base_folder": f"/hub/snapshots/{commit}",
        "revision": commit,
        "max_new_tokens": 5,
        "deep": {"password": 12345},
    }
    write_run_toml(run, config={}, resolved=resolved, versions={})
    shown = facts_in(report.page([run]))["runs"][0]["resolved"]
    assert shown == {**resolved, "api_key": "[hidden]", "deep": {"password": "[hidden]"}}


def deep(inner: str, depth: int) -> str:
    return '{"a":' * depth + inner + "}" * depth


@pytest.mark.parametrize("depth", [300, 900, 100_000])
def test_what_is_deeply_nested_spoils_no_report(tmp_path: Path, depth: int) -> None:
    run = make_run(tmp_path / "run", iterations=3)
    lines = [
        deep("1", depth),
        f'{{"iteration": 4, "loss": {deep("1", depth)}}}',
        "[" * depth + "]" * depth,
        '{"iteration": "4", "loss": 1}',
    ]
    lines += [
        '{"iteration": 4, "loss": 1' + "0" * 400 + "}",
        '{"iteration": 5, "loss": 0.25, "note": {"a": 1}}',
        '{"loss": 1}',
        '{"iteration": true}',
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n".join(lines) + "\n")
    add_evaluation(run, "x")
    scores = json.loads((run / "evaluation" / "scores.json").read_text())
    (run / "evaluation" / "scores.json").write_text(json.dumps(scores)[:-1] + f', "more": {deep("1", depth)}}}')
    facts = facts_in(report.page([run]))["runs"][0]
    assert facts["series"]["loss"][0][-1] == 5
    assert facts["series"]["loss"][1][-1] == 0.25
    (run / "status.json").write_text(deep("1", depth))
    (run / "run.toml").write_text("config = " + "[" * depth + "]" * depth + "\nresolved = 3\n")
    assert facts_in(report.page([run]))["runs"][0]["config"] == {}


@pytest.mark.parametrize("host", ["[", "]", "[::1", "a]b", "evil.example:x"])
def test_a_host_that_is_none(server: tuple[str, Path], host: str) -> None:
    url, _ = server
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(f"{url}/", Host=host)
    assert caught.value.code == 403
    caught.value.close()
    assert facts_in(get(f"{url}/?a=["))["live"] is True


def test_long_runs_are_thinned_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", iterations=10_000)
    iterations, values = report.run_facts(run)["series"]["lr"]
    assert len(iterations) == len(values) == 10_000 // 7 + 1
    assert iterations[-1] == 10_000
    assert set(values) == {1e-4}
    assert len(report.page([run])) < 250_000


def test_the_command_gives_the_same_configuration(tmp_path: Path) -> None:
    config = Settings.of(
        run_name="r",
        checkpoint="a folder/hf",
        data=("x y.jsonl", "z.jsonl"),
        lr=3e-4,
        tensorboard=False,
        early_stopping=3,
        min_lr=1.25e-6,
    )
    write_run_toml(tmp_path, config=config.as_json(), resolved={}, versions={})
    command = report.repeat_command(tomllib.loads((tmp_path / "run.toml").read_text())["config"])
    import shlex

    parser = OneLineParser()
    add_flags(parser)
    assert Settings.of(**typed_values(parser.parse_args(shlex.split(command)[1:]))) == config


def test_data_sets_of_a_recipe_are_written_as_one(tmp_path: Path) -> None:
    from tokenize_data.dataset import Cleaning, DatasetSpec
    from tokenize_data.recipe import read_data

    specs = (DatasetSpec(name="a", files=("x.jsonl",), prompt="Say: {q}", weight=0.5, clean=Cleaning(lower=True)),)
    config = Settings.of(run_name="r", datasets=specs)
    write_run_toml(tmp_path, config=config.as_json(), resolved={}, versions={})
    facts = report.run_facts(tmp_path)
    assert facts["command"] == "sft --config recipe.yaml --run_name r"
    (tmp_path / "recipe.yaml").write_text(facts["recipe"])
    assert read_data(tmp_path / "recipe.yaml").training == specs


def test_damaged_files_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", state="failed")
    (run / "run.toml").write_text("[config")
    (run / "evaluation").mkdir()
    (run / "evaluation" / "scores.json").write_text("{}")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 41, "lo')
    facts = report.run_facts(run)
    assert facts["scores"] is None
    assert facts["warnings"] == ["failed after iteration 40: loss is NaN"]


@pytest.mark.parametrize(("name", "message"), [("none", "no such folder"), ("empty", "is not a run folder")])
def test_what_is_no_run(name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert entry(["report", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


def test_the_data_s_lengths_are_shown(tmp_path: Path, bench: Workbench) -> None:
    data = bench.jsonl([pair(f"Question {n}?", "word " * n) for n in range(1, 40)])
    assert bench.tokenize("--data", data).code == 0
    run = make_run(tmp_path / "run")
    text = (
        (run / "run.toml").read_text().replace("[resolved]\n", f'[resolved]\ndata_folder = "{bench.tokenized / "r"}"\n')
    )
    (run / "run.toml").write_text(text)
    facts = report.run_facts(run)
    assert sum(facts["lengths"]["counts"]) == facts["data"]["documents"] == 39
    assert facts["data"]["files"][0]["rows"] == 39


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    run = make_run(tmp_path / "run", state="running")
    made = serve.make_server([run], 0)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}", run
    made.shutdown()
    made.server_close()
    thread.join()


def get(url: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as response:
        text: str = response.read().decode()
        return text


def test_a_running_run_is_served_live(server: tuple[str, Path]) -> None:
    url, run = server
    assert facts_in(get(f"{url}/"))["live"] is True
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 41, "loss": 0.5}\n')
    assert json.loads(get(f"{url}/data.json"))["runs"][0]["series"]["loss"][0][-1] == 41
    for request, status in ((f"{url}/../run.toml", 404), (f"{url}/metrics.jsonl", 404)):
        with pytest.raises(urllib.error.HTTPError) as caught:
            get(request)
        assert caught.value.code == status
        caught.value.close()
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(f"{url}/", Host="evil.example")
    assert caught.value.code == 403
    caught.value.close()


def test_a_port_in_use(server: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url, run = server
    assert entry(["report", "--watch", str(run), "--port", url.rsplit(":", 1)[1]]) == 2
    assert "cannot be used (Address already in use): give another" in capsys.readouterr().err


# ---- in a browser


@pytest.fixture
def dom(tmp_path: Path) -> Callable[..., str]:
    """The page's document after its scripts have run."""

    def load(address: str, milliseconds: int = 1000) -> str:
        command = [
            str(BROWSER),
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
        ]
        command += [f"--virtual-time-budget={milliseconds}", "--window-size=1200,1600", "--dump-dom", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return load


@needs_browser
def test_a_browser_draws_the_page(tmp_path: Path, dom: Callable[..., str]) -> None:
    """One start of the browser, two pages of runs: with a pointer over the first chart, and errors of the scripts in
    the title.
    """
    runs = [
        make_run(tmp_path / "run-a", iterations=150),
        make_run(tmp_path / "run-b", iterations=120, offset=1.0, seed=5),
    ]
    add_evaluation(runs[0], "</script><script>document.title='broken'</script>")
    extra = """<script>
      const box = document.querySelector("svg").getBoundingClientRect();
      const at = {clientX: box.left + box.width / 2, clientY: box.top + 50};
      document.querySelector("svg").dispatchEvent(new PointerEvent("pointermove", at));
    </script>"""
    head = (
        "<script>window.onerror = (message) => { document.documentElement.dataset.error = message; };</script></head>"
    )
    page = report.page(runs).replace("</head>", head, 1).replace("</body>", extra + "</body>", 1)
    (tmp_path / "page.html").write_text(page)
    found = dom(f"file://{tmp_path / 'page.html'}")
    assert "data-error" not in found
    body = found[: found.index('id="data"')]
    assert "<title>2 runs</title>" in found
    assert body.count("<polyline") == 2 * (2 + 1 + 3)  # loss, smoothed, validation; learning rate, norm, speed
    assert body.count('class="state finished"') == 2
    assert "Answers before and after" in body
    assert html.escape("</script><script>document.title='broken'</script>", quote=False) in body
    tip = re.search(r'<div class="tip".*?</table>', found, re.DOTALL)
    assert tip
    assert re.search(r"<b>iteration \d+</b>", tip.group())
    assert "run-b, validation" in tip.group()


@needs_browser
def test_a_live_page_follows_the_run(
    server: tuple[str, Path], dom: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, run = server
    page = report.page

    def page_then_go_on(folders: Sequence[Path], *, is_live: bool = False) -> str:
        made = page(folders, is_live=is_live)
        write_status(run, state="finished", iteration=77, iterations=77)
        assert "77" not in json.dumps(facts_in(made)["runs"][0]["status"])
        return made

    monkeypatch.setattr(report, "page", page_then_go_on)
    found = dom(url, 6000)
    assert "iteration 77 of 77" in found[: found.index('id="data"')]
