"""`sft generate`: the ids of transformers, answers that end where they were trained to end, files that are gone on
with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft.cli import entry
from sft.evaluate import decode
from sft.evaluate.decode import Decoder, Prompt, Sampling
from tests import tiny
from tokenize_data.prompts import open_format

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def tuned(folders: Path, family: Callable[[str], Path]) -> Path:
    return tiny.tune(tiny.make_model(folders / "tuned", family("smollm")), tiny.LEARNT)


@pytest.fixture
def sft(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        code = entry([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def questions(folder: Path, rows: list[dict[str, Any]], name: str = "questions.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox", "opt"])
def test_greedy_ids_are_those_of_transformers(name: str, folders: Path, family: Callable[[str], Path]) -> None:
    """Sixteen prompts of unequal length, each against `generate` alone; windows are shorter than prompts, rows end at
    different times.
    """
    folder = folders / name
    if not folder.exists():
        tiny.make_model(folder, family("smollm"), name)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 30, (16,), generator=generator).tolist()
    prompts = [torch.randint(5, model.config.vocab_size, (length,), generator=generator).tolist() for length in lengths]
    stop = 7 if name == "llama" else _a_frequent_id(model, prompts[0])
    expected = {}
    for number, ids in enumerate(prompts):
        whole = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=stop,
            pad_token_id=0,
        )[0, len(ids) :].tolist()
        expected[number] = whole[:-1] if whole[-1] == stop else whole
    decoder = Decoder(model, stop_ids=[stop], text_of=str)
    for batch_size in (1, 16):
        written = decoder.write(
            [Prompt(number=n, ids=ids) for n, ids in enumerate(prompts)], Sampling(max_tokens=12), batch_size
        )
        assert {answer.number: answer.ids for answer in written} == expected
    assert len({tuple(ids) for ids in expected.values()}) > 8, "answers that are all alike would prove little"


def _a_frequent_id(model: Any, ids: list[int]) -> int:
    """A token that this model writes: then rows end at different times."""
    written = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=8,
        min_new_tokens=8,
    )
    return int(written[0, -2])


def test_prompt_ids_are_those_of_apply_chat_template(tuned: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Größe?\n"}]
    expected = AutoTokenizer.from_pretrained(tuned).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert open_format(tuned).prompt(messages) == expected


def test_a_tuned_model_stops_at_the_end_of_turn(tuned: Path, sft: Run) -> None:
    for question, answer in tiny.LEARNT.items():
        assert sft("generate", tuned, "--prompt", question, "--device", "cpu") == (0, f"{answer}\n", "")


def test_a_file_of_questions(tuned: Path, sft: Run, tmp_path: Path) -> None:
    rows = [{"q": question, "id": number} for number, question in enumerate(tiny.LEARNT)]
    out = tmp_path / "out.jsonl"
    code, _, err = sft(
        "generate", tuned, "--data", questions(tmp_path, rows), "--question_key", "q", "--out", out, "--batch_size", 3
    )
    assert code == 0
    assert "5 answers" in err
    answers = read(out)
    assert [(row["q"], row["answer"], row["id"]) for row in answers] == [
        (*pair, n) for n, pair in enumerate(tiny.LEARNT.items())
    ]
    assert {row["generation"]["finish"] for row in answers} == {"stop"}


def test_a_half_written_file_is_gone_on_with(
    tuned: Path, sft: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = questions(tmp_path, [{"prompt": question} for question in tiny.LEARNT]), tmp_path / "out.jsonl"
    command = ("generate", tuned, "--data", data, "--out", out, "--batch_size", 2)
    assert sft(*command)[0] == 0
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(lines[3] + lines[1] + lines[0][:40])  # as it is while it is written, and torn by a kill
    asked: list[int] = []
    original = Decoder.write

    def counting(self: Decoder, prompts: Any, *rest: Any) -> Iterator[Any]:
        asked.extend(prompt.number for prompt in prompts)
        yield from original(self, prompts, *rest)

    monkeypatch.setattr(Decoder, "write", counting)
    assert sft(*command)[0] == 0
    assert out.read_bytes() == whole
    assert sorted(asked) == [0, 2, 4]
    code, _, err = sft(*command, "--max_tokens", 3)
    assert code == 2
    assert "holds 5 answers to other questions, or of another model or setting" in err
    assert out.read_bytes() == whole


def test_an_interrupt_keeps_what_is_answered(
    tuned: Path, sft: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = questions(tmp_path, [{"prompt": question} for question in tiny.LEARNT]), tmp_path / "out.jsonl"
    original = Decoder.write

    def interrupted(self: Decoder, *arguments: Any) -> Iterator[Any]:
        for number, answer in enumerate(original(self, *arguments)):
            if number == 2:
                raise KeyboardInterrupt
            yield answer

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "write", interrupted)
        code, _, err = sft("generate", tuned, "--data", data, "--out", out)
    assert (code, len(read(out))) == (130, 2)
    assert "run the same command to resume" in err
    assert sft("generate", tuned, "--data", data, "--out", out)[0] == 0
    assert [row["answer"] for row in read(out)] == list(tiny.LEARNT.values())


def test_chat_remembers_and_begins_anew(tuned: Path, sft: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter(["Are you coming?", "/new", "Was blood pressure normal?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    code, out, _ = sft("generate", tuned, "--chat")
    assert code == 0
    assert out.splitlines() == ["Yes, at 8.", "no"]


def test_stop_texts_and_limits(tuned: Path, sft: Run) -> None:
    asked = ("generate", tuned, "--prompt", "Summarise the dialogue.")
    assert sft(*asked, "--stop", "Ben", "xyz")[1] == "Anna and\n"
    cut = sft(*asked, "--max_tokens", 2)[1].strip()
    assert "Anna and Ben meet at eight.".startswith(cut)
    assert len(cut) < 20


def test_sampling_does_not_depend_on_the_batch(folders: Path, family: Callable[[str], Path]) -> None:
    folder = folders / "random"
    tiny.make_model(folder, family("smollm"))
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    decoder = Decoder(model, stop_ids=[3], text_of=str)
    prompts = [Prompt(number=n, ids=[5 + n, 9, 30]) for n in range(6)]

    def ids(batch_size: int, **settings: Any) -> dict[int, list[int]]:
        answers = decoder.write(prompts, Sampling(max_tokens=12, **settings), batch_size)
        return {answer.number: answer.ids for answer in answers}

    sampled = ids(6, temperature=2.0, top_p=0.95)
    assert ids(1, temperature=2.0, top_p=0.95) == sampled
    assert ids(6, temperature=2.0, top_p=0.95, seed=5) != sampled
    assert ids(6, temperature=1.0, top_k=1) == ids(6) == ids(6, temperature=1.0, top_p=1e-6)


def test_top_p_keeps_the_smallest_share_that_reaches_it() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(400, 1)
    generators = [torch.Generator().manual_seed(n) for n in range(400)]
    chosen = decode._choose(logits, generators, Sampling(temperature=1.0, top_p=0.7))
    assert set(chosen.tolist()) == {0, 1}
    assert 0.5 < (chosen == 0).float().mean() < 0.75


def test_prompts_longer_than_the_context_get_no_answer(tuned: Path, sft: Run, tmp_path: Path) -> None:
    data = questions(tmp_path, [{"prompt": "Are you coming?"}, {"prompt": "very " * 400}])
    code, _, err = sft("generate", tuned, "--data", data, "--out", tmp_path / "out.jsonl")
    assert code == 0
    assert "1 prompts are longer than the model's context" in err
    assert [row["answer"] for row in read(tmp_path / "out.jsonl")] == ["Yes, at 8.", ""]


def test_a_model_without_a_template(tuned: Path, sft: Run, tmp_path: Path, family: Callable[[str], Path]) -> None:
    bare = tiny.make_model(tmp_path / "bare", family("llama2"), template="llama2")
    (bare / "chat_template.jinja").unlink()
    code, _, err = sft("generate", bare, "--prompt", "x")
    assert code == 2
    assert "lacks <|im_start|> <|im_end|> of template 'megatron'" in err
    assert sft("generate", bare, "--prompt", "x", "--template", "plain", "--max_tokens", 2)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "x.jsonl"], "--data needs --out FILE"),
        (["--data", "x.jsonl", "--prompt", "x"], "--prompt and --data: give one of them"),
        ([], "nothing to ask: give --prompt TEXT"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature -1.0 must be 0 or more"),
        (["--prompt", "x", "--top_p", "0"], "--top_p 0.0 must be above 0 and at most 1"),
        (["--prompt", "x", "--batch_size", "0"], "--batch_size 0 must be at least 1"),
        (["--prompt", "x", "--template", "none.jinja"], "--template none.jinja: No such file or directory"),
    ],
)
def test_wrong_flags(arguments: list[str], message: str, tuned: Path, sft: Run) -> None:
    code, _, err = sft("generate", tuned, *arguments)
    assert code == 2
    assert message in err


def test_what_is_no_model(sft: Run, tmp_path: Path) -> None:
    assert "is not a model: give a Hugging Face folder" in sft("generate", tmp_path, "--prompt", "x")[2]
    (tmp_path / "config.json").write_text("{}")
    assert "no *.safetensors: give a folder with weights" in sft("generate", tmp_path, "--prompt", "x")[2]
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.toml").write_text("")
    assert "is a run without a model or a checkpoint yet" in sft("generate", run, "--prompt", "x")[2]


def test_a_row_with_the_answer_s_key(tuned: Path, sft: Run, tmp_path: Path) -> None:
    data = questions(tmp_path, [{"prompt": "Are you coming?", "answer": "mine"}])
    code, _, err = sft("generate", tuned, "--data", data, "--out", tmp_path / "out.jsonl")
    assert code == 2
    assert "line 1: the row has a key 'answer' of its own: choose another --answer_field" in err
    assert sft("generate", tuned, "--data", data, "--out", tmp_path / "out.jsonl", "--answer_field", "model")[0] == 0
    assert read(tmp_path / "out.jsonl")[0]["model"] == "Yes, at 8."


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses what transformers is going to remove
def test_an_adapter_on_its_base(tuned: Path, sft: Run, tmp_path: Path) -> None:
    """An adapter that makes the base say something else, without a tokenizer of its own; asked through its folder and
    through its run's.
    """
    peft = pytest.importorskip("peft")
    from sft.evaluate.models import base_of, find_model

    base: Any = AutoModelForCausalLM.from_pretrained(tuned)
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    run = tmp_path / "run"
    adapted.save_pretrained(run / "adapter")
    settings = json.loads((run / "adapter" / "adapter_config.json").read_text())
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(tuned)}))
    ids = open_format(tuned).prompt([{"role": "user", "content": "Are you coming?"}])
    written = adapted.eval().generate(
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=6
    )
    expected = open_format(tuned).text(written[0, len(ids) :].tolist()).strip()
    assert expected != "Yes, at 8."
    for model in (run, run / "adapter"):
        assert sft("generate", model, "--prompt", "Are you coming?", "--max_tokens", 6)[1].strip() == expected
    assert base_of(find_model(str(run))) == str(tuned)
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "./gone"}))
    assert "is an adapter of ./gone, which cannot be found" in sft("generate", run, "--prompt", "x")[2]
