"""`sft evaluate`: files, comparison, a judge, a server, data sets of several kinds; what is there already is not done
again.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from sft.cli import entry
from sft.evaluate.decode import Decoder
from tests import tiny
from tests.fake_server import Fake, serve

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, family: Callable[[str], Path]) -> dict[str, Path]:
    """A run's folder with a tuned model in hf/, and a random base."""
    root = tmp_path_factory.mktemp("evaluate")
    base = tiny.make_model(root / "base", family("smollm"))
    run = root / "run"
    tuned = tiny.tune(tiny.make_model(run / "hf", family("smollm")), tiny.LEARNT)
    (run / "run.toml").write_text("")
    config = {"question_key": "q", "answer_key": "a", "seq": 128}
    (tuned / "training.json").write_text(json.dumps({"config": config, "resolved": {"base_folder": str(base)}}))
    data = root / "test.jsonl"
    rows = [
        {"q": question, "a": [answer, "or so"] if n % 2 else answer}
        for n, (question, answer) in enumerate(tiny.LEARNT.items())
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = root / "yesno.jsonl"
    asked = [("Is the patient an adult?", "yes"), ("Was blood pressure normal?", "no")] * 3
    other.write_text("".join(json.dumps({"q": question, "a": answer}) + "\n" for question, answer in asked))
    return {"base": base, "run": run, "tuned": tuned, "data": data, "yesno": other}


@pytest.fixture
def sft(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        code = entry([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_base_against_tuned(folders: dict[str, Path], sft: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    command = (
        "evaluate",
        folders["run"],
        "--data",
        folders["data"],
        folders["yesno"],
        "--compare",
        "base",
        "--max_tokens",
        12,
    )
    code, out, err = sft(*command)
    assert (code, err) == (0, "")
    folder = folders["run"] / "evaluation"
    summary = json.loads((folder / "scores.json").read_text())
    assert [model["label"] for model in summary["models"]] == ["base", "run"]
    base, tuned = (model["datasets"] for model in summary["models"])
    assert tuned["test"]["scores"]["exact_match"] == {"value": 1.0, "low": 1.0, "high": 1.0, "count": 5}
    assert (
        tuned["yesno"]["scores"]["accuracy"]["value"] == tuned["yesno"]["scores"]["accuracy_likelihood"]["value"] == 1.0
    )
    assert tuned["all"]["rows"] == 11
    assert tuned["all"]["scores"]["perplexity"]["value"] < 1.2 < base["all"]["scores"]["perplexity"]["value"]
    assert tuned["all"]["differences"]["exact_match"]["p"] <= 0.002
    assert "exact match" in out
    assert "(p < 0.002)" in out
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == 22
    last = predictions[-1]
    assert (last["model"], last["dataset"], last["row"], last["answer"], last["references"]) == (
        "run",
        "yesno",
        5,
        "no",
        ["no"],
    )
    assert last["place"].endswith("yesno.jsonl line 6")
    rows = list(csv.reader((folder / "comparison.csv").read_text().splitlines()))
    sheet = openpyxl.load_workbook(folder / "comparison.xlsx").active
    assert rows[0] == [
        "data",
        "score",
        "rows",
        "base",
        "base: low",
        "base: high",
        "run",
        "run: low",
        "run: high",
        "run: difference",
        "run: p",
    ]
    assert [cell.value for cell in sheet[1]] == rows[0]
    assert sheet.max_row == len(rows) == 1 + sum(len(data["scores"]) for data in tuned.values())
    page = (folder / "comparison.html").read_text()
    assert page.count("<tr>") == len(rows)
    assert 'class="n up"' in page

    def never(*arguments: Any) -> Any:
        raise AssertionError("asked again")

    monkeypatch.setattr(Decoder, "_batch", never)
    before = (folder / "predictions.jsonl").read_bytes()
    assert sft(*command)[0] == 0
    assert (folder / "predictions.jsonl").read_bytes() == before
    assert sft(*command, "--limit", 3)[0] == 0
    assert len((folder / "predictions.jsonl").read_text().splitlines()) == 12
    monkeypatch.undo()
    assert sft(*command, "--limit", 1, "--max_tokens", 2)[0] == 0, "other settings are other answers, beside those"


def test_a_judge_rates_and_compares(folders: dict[str, Path], sft: Run, tmp_path: Path) -> None:
    def likes_short(request: dict[str, Any]) -> str:
        said = request["messages"][1]["content"]
        if "<first answer>" in said:
            first, second = (said.split(f"<{name} answer>\n")[1].split("\n</")[0] for name in ("first", "second"))
            return json.dumps({"reason": "", "better": "first" if len(first) < len(second) else "second"})
        return '{"reason": "fine", "score": 0.75}'

    with serve(Fake(likes_short)) as fake:
        command = (
            "evaluate",
            folders["run"],
            "--data",
            folders["yesno"],
            "--compare",
            "base",
            "--max_tokens",
            12,
            "--out",
            tmp_path,
        )
        command += ("--judge_url", fake.url, "--judge_pairwise", "--no_likelihood", "--judge_prices", 1, 5)
        code, out, _ = sft(*command)
        asked = len(fake.requests)
        assert sft(*command)[0] == code == 0
        assert len(fake.requests) == asked, "verdicts are kept"
    assert "requests, about" in out
    tuned = json.loads((tmp_path / "scores.json").read_text())["models"][1]["datasets"]["yesno"]["scores"]
    assert (tuned["judge"]["value"], tuned["judge_wins"]["value"]) == (0.75, 1.0)
    assert "perplexity" not in tuned


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_server_instead_of_a_model(api: str, folders: dict[str, Path], sft: Run, tmp_path: Path) -> None:
    from tokenize_data.prompts import open_format

    chat = open_format(folders["tuned"])

    def reply(request: dict[str, Any]) -> str:
        text = (
            chat.tokenizer.backend.decode(request["prompt"])
            if api == "completions"
            else request["messages"][-1]["content"]
        )
        return next(answer for question, answer in tiny.LEARNT.items() if question in text)

    with serve(Fake(reply)) as fake:
        out = tmp_path / "out.jsonl"
        files = ("--data", folders["data"], "--answer_key", "none", "--out", out)
        code, _, _ = sft(
            "generate", folders["tuned"], *files, "--server_url", fake.url, "--server_api", api, "--max_tokens", 9
        )
        scored, _, _ = sft(
            "evaluate",
            folders["tuned"],
            "--data",
            folders["data"],
            "--out",
            tmp_path,
            "--server_url",
            fake.url,
            "--server_api",
            api,
        )
        path, content, _ = fake.requests[0]
    assert code == scored == 0
    assert [json.loads(line)["answer"] for line in out.read_text().splitlines()] == list(tiny.LEARNT.values())
    assert (path, content["max_tokens"], content["model"]) == (
        f"/v1/{'chat/' if api == 'chat' else ''}completions",
        9,
        "model-1",
    )
    if api == "completions":
        assert content["stop_token_ids"] == list(chat.stop_ids)
        assert content["prompt"] in [chat.prompt([{"role": "user", "content": question}]) for question in tiny.LEARNT]
    scores = json.loads((tmp_path / "scores.json").read_text())["models"][0]["datasets"]["test"]["scores"]
    assert scores["exact_match"]["value"] == 1.0


def test_plain_text_has_a_perplexity(folders: dict[str, Path], sft: Run, tmp_path: Path) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": f"Anna and Ben meet at eight. {n}"}) + "\n" for n in range(3)))
    assert sft("evaluate", folders["base"], "--data", data, "--out", tmp_path / "out")[0] == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["models"][0]["datasets"]["text"]["scores"]
    assert list(scores) == ["perplexity"]


def test_a_base_without_a_template_is_asked_with_the_tuned_one_s(
    folders: dict[str, Path], sft: Run, tmp_path: Path
) -> None:
    import shutil

    base = shutil.copytree(folders["base"], tmp_path / "bare")
    (base / "chat_template.jinja").unlink()
    command = (
        "evaluate",
        folders["run"],
        "--data",
        folders["yesno"],
        "--compare",
        base,
        "--max_tokens",
        4,
        "--out",
        tmp_path / "out",
    )
    assert sft(*command)[0] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to evaluate on: give --data FILE"),
        (["--data", "DATA", "--no_answers", "--no_likelihood"], "--no_answers leaves nothing"),
        (["--data", "DATA", "--judge_pairwise"], "--judge_pairwise needs --judge_url and --compare"),
        (
            ["--data", "DATA", "--answer_key", "nope"],
            "test.jsonl line 1: no answer to compare with: no key 'nope'; the row has 'q', 'a'",
        ),
        (["--data", "DATA", "--question_key", "nope"], "test.jsonl line 1: no key 'nope'"),
        (["--data", "missing.jsonl"], "missing.jsonl: no such file"),
        (
            ["--data", "DATA", "--judge_url", "http://127.0.0.1:9", "--judge_rubric", "none.txt"],
            "--judge_rubric none.txt: No such file",
        ),
    ],
)
def test_what_is_wrong(flags: list[str], message: str, folders: dict[str, Path], sft: Run, tmp_path: Path) -> None:
    given = [str(folders["data"]) if flag == "DATA" else flag for flag in flags]
    code, _, err = sft("evaluate", folders["run"], *given, "--max_tokens", 2, "--out", tmp_path)
    assert code == 2
    assert message in err


def test_rows_that_are_cut_before_their_answer_are_counted(folders: dict[str, Path], sft: Run, tmp_path: Path) -> None:
    code, out, _ = sft(
        "evaluate", folders["run"], "--data", folders["data"], "--seq", 20, "--no_answers", "--out", tmp_path
    )
    assert code == 0
    assert "5 rows are cut before their answer (--seq) and do not count in the perplexity" in out


def test_keys_within_keys(folders: dict[str, Path], sft: Run, tmp_path: Path) -> None:
    """A list of answers is several references, for `sft generate --data` as for `sft evaluate`."""
    (question, answer), *_ = tiny.LEARNT.items()
    data = tmp_path / "nested.jsonl"
    data.write_text(json.dumps({"ask": [{"text": question}], "gold": {"aliases": ["or so", answer]}}) + "\n")
    keys = ("--data", data, "--question_key", "ask[0].text", "--answer_key", "gold.aliases", "--max_tokens", 12)
    code, _, err = sft("evaluate", folders["run"], *keys, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    (predicted,) = map(json.loads, (tmp_path / "out" / "predictions.jsonl").read_text().splitlines())
    assert (predicted["question"], predicted["references"]) == (question, ["or so", answer])
    assert predicted["scores"]["exact_match"] == 1.0
    code, _, err = sft("generate", folders["run"], *keys, "--out", tmp_path / "answers.jsonl")
    assert code == 0, err
    assert answer in (tmp_path / "answers.jsonl").read_text().splitlines()[0]
    code, _, err = sft("generate", folders["run"], *keys[:3], "ask[1].text", "--out", tmp_path / "none.jsonl")
    assert code == 2
    assert "nested.jsonl line 1: no 'ask[1].text': 'ask' is a list of 1, so it has no [1]: use --question_key" in err
