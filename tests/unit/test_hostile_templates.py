"""Chat templates that crash, do not come to an end, or want all memory: one line, exit code 2, and this process goes
on.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import time

import pytest

from tests.conftest import pair
from tests.unit.test_bad_input import check_refused
from tokenize_data import rendering
from tokenize_data.errors import RowError, UserError
from tokenize_data.guard import Limits
from tokenize_data.prompts import open_format
from tokenize_data.templates import choose_template
from tokenize_data.tokenizer import load_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "division by zero": ("{{ 1 / (messages|length - messages|length) }}", "division by zero"),
    "long text": ('{{ "x" * (20000000000 + messages|length) }}', "needed more than 512 MiB of memory"),
    "nested ranges": (LOOPS, "took more than 1 s of processor time"),
    "power": ("{{ (9 + messages|length) ** (9 ** 9) }}", "took more than 1 s of processor time"),
    "doubling list": (
        "{% set n = namespace(x=[1]) %}{% for _ in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "needed more than 512 MiB of memory",
    ),
    "lists that are compared": (
        "{% set n = namespace(x=[1], y=[1]) %}{% for _ in range(60) %}{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, "
        "n.y] %}{% endfor %}"
        "{{ n.x == n.y }}",
        "took more than 1 s of processor time",
    ),
    "endless macro": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion"),
    "long output": ("{{ 'x' * 3000000 }}", "characters for a conversation of"),
    "text added to a number": ("{{ 1 + 'a' }}", "unsupported operand"),
    "padded number": ("{{ '%0900000000d' % messages|length }}", "needed more than 512 MiB of memory"),
}
AT_ONCE = {  # when it is compiled
    "constant text": ('{{ "x" * 20000000000 }}', "memory"),
    "constant power": ("{{ 9 ** (9 ** 9) }}", "took more than 1 s of processor time"),
    "constant division": ("{{ 1 / 0 }}", "division by zero"),
    "brackets": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "does not compile"),
    "blocks": ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "does not compile"),
    "a megabyte": ("{# " + "x" * 2_000_000 + " #}", "more than 1,048,576"),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    limit_to(1, monkeypatch)


def limit_to(seconds, monkeypatch):
    monkeypatch.setattr(rendering, "LIMITS", Limits(seconds=seconds, num_bytes=512 << 20))


def only_the_limit_it_meets(fragment, monkeypatch):
    """On a slow machine it takes more than a second to fill 512 MiB, or to recurse as deep as Python allows."""
    if "processor time" not in fragment:
        limit_to(100, monkeypatch)


@pytest.mark.parametrize("name", [*HOSTILE, *AT_ONCE])
def test_refused_before_any_row(bench, name, monkeypatch):
    source, fragment = (HOSTILE | AT_ONCE)[name]
    only_the_limit_it_meets(fragment, monkeypatch)
    template = bench.write(source + CHATML, "own.jinja")
    check_refused(
        bench, bench.tokenize("--data", bench.jsonl([pair()]), "--template", template), ["own.jinja", fragment]
    )


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_refused_at_the_row_that_it_waits_for(bench, name, workers, monkeypatch):
    source, fragment = HOSTILE[name]
    only_the_limit_it_meets(fragment, monkeypatch)
    template = bench.write("{% if messages[0].content == 'now' %}" + source + "{% endif %}" + CHATML, "own.jinja")
    # The first rows and every so manieth are rendered early, to compare tokenizers; the row in question is none of
    # these.
    data = bench.jsonl([*[pair()] * 389, pair("now"), pair()])
    outcome = bench.tokenize("--data", data, "--template", template, "--workers", workers)
    if name in ("nested ranges", "power", "lists that are compared"):
        fragment = "did not finish on one of the rows"
    check_refused(bench, outcome, [fragment])


def test_a_row_that_only_fails_can_be_set_aside(bench):
    template = bench.write("{{ 1 / (messages[0].content|length - 4) }}" + CHATML, "own.jinja")
    outcome = bench.tokenize(
        "--data", bench.jsonl([pair(), pair("then")]), "--template", template, "--max_bad_rows", "1"
    )
    assert outcome.code == 0, outcome.err
    assert "2 rows read = 1 accepted + 1 rejected" in outcome.out


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null/x"])
def test_a_template_that_is_no_file(bench, path):
    check_refused(bench, bench.tokenize("--data", bench.jsonl([pair()]), "--template", path), [path])


def template_of(family, tmp_path, source):
    (tmp_path / "own.jinja").write_text(source)
    return choose_template(str(tmp_path / "own.jinja"), load_tokenizer(str(family("qwen"))))[0]


def test_prompts_of_generation_are_guarded_too(family, tmp_path):
    (tmp_path / "own.jinja").write_text("{% if messages[0].content == 'now' %}" + LOOPS + "{% endif %}" + CHATML)
    chat = open_format(family("qwen"), str(tmp_path / "own.jinja"))
    with pytest.raises(UserError, match="took more than 1 s of processor time on one conversation \\(user\\)"):
        chat.prompt([{"role": "user", "content": "now"}])
    assert chat.prompt([{"role": "user", "content": "then"}])


def test_a_process_that_was_forked_renders_on_its_own(family, tmp_path):
    template = template_of(family, tmp_path, CHATML)
    message = [{"role": "user", "content": "\ud83d é"}]
    here, there = multiprocessing.get_context("fork").Pipe()
    if (child := os.fork()) == 0:
        there.send(template.render(message))
        os._exit(0)
    assert here.recv() == template.render(message) == "<|im_start|>user\n\ud83d é<|im_end|>\n"
    os.waitpid(child, 0)


def test_a_template_takes_its_process_along(family, tmp_path):
    template = template_of(family, tmp_path, CHATML)
    before = set(multiprocessing.active_children())
    process = template._renderer._child._process
    assert process in before
    del template
    gc.collect()
    assert process not in multiprocessing.active_children()


def test_the_process_of_a_template_holds_no_file_of_its_parent(family, tmp_path):
    with (tmp_path / "lock").open("w") as lock:
        template = template_of(family, tmp_path, CHATML)
        held = {os.readlink(file.path) for file in os.scandir(f"/proc/{template._renderer._child._process.pid}/fd")}
        assert not any(str(tmp_path) in name for name in held), (lock, held)


def test_a_killed_process_is_reported_and_made_anew(family, tmp_path):
    template = template_of(family, tmp_path, CHATML)
    message = [{"role": "user", "content": "?"}]
    template._renderer._child._process.kill()
    with pytest.raises(UserError, match="ended its process with SIGKILL"):
        template.render(message)
    assert template.render(message)


def test_time_between_conversations_does_not_count(family, tmp_path):
    """The timer counts processor time of one conversation at a time."""
    slow = "{% for a in range(60000) %}{% endfor %}" + CHATML
    template = template_of(family, tmp_path, slow)
    if (child := os.fork()) == 0:
        while time.process_time() < 1.5:  # of the child
            template.render([{"role": "user", "content": "?"}])
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_conversation_that_is_refused_names_roles(family, tmp_path):
    template = template_of(
        family, tmp_path, "{% if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}" + CHATML
    )
    with pytest.raises(RowError, match=r"refuses this conversation \(user assistant user\): too long"):
        template.render([{"role": role, "content": "?"} for role in ("user", "assistant", "user")])
