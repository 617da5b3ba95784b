"""The checks of a data set: what they find, where, and what they leave alone."""

from __future__ import annotations

import json
import random
import stat

import numpy as np

from tests.conftest import pair
from tokenize_data.checks import near, outliers
from tokenize_data.checks.digests import groups
from tokenize_data.checks.private import hidden
from tokenize_data.checks.texts import Text

WORDS = tuple(
    "fever cough liver heart kidney dose scan ward nurse blood plasma tablet rash joint bone nerve skin lung".split()  # noqa: SIM905
)


def rows(count, seed=0):
    """Questions unlike each other, with answers of their own."""
    draw = random.Random(seed)
    return [
        pair(f"Case {seed} {number}: " + " ".join(draw.choices(WORDS, k=14)) + "?", f"It is {number} {seed} days.")
        for number in range(count)
    ]


def found(bench, data, *flags, name="data.jsonl", **others):
    outcome = bench.tokenize("--data", bench.jsonl(data, name), *flags, **others)
    assert outcome.code == 0, outcome.err
    return outcome


def inspect(bench, *flags):
    outcome = bench.inspect("--documents", "0", *flags)
    assert outcome.code == 0, outcome.err
    return outcome.out


def test_clean_data_gives_no_warning(bench):
    assert "warning" not in found(bench, rows(80)).err
    out = inspect(bench)
    assert "nothing found" in out
    assert "all 80 documents were checked" in out
    assert "warning" not in out


def test_exact_duplicates_and_contradictions(bench):
    data = rows(80)
    data += [data[3], data[3], {**data[7], "gold": "Something else."}]
    outcome = found(bench, data)
    expected = "2 of 83 documents (2.4%) repeat an earlier one exactly"
    assert expected in outcome.err
    out = inspect(bench)
    assert expected in out
    assert "data.jsonl line 4 = data.jsonl line 81, data.jsonl line 82" in out
    assert "2 of 83 documents (2.4%) ask what others ask, and answer it differently (1 such question)" in out
    assert "[data.jsonl line 8 = data.jsonl line 83]" in out


def test_copies_by_weight_are_no_duplicates(bench):
    data = [{**row, "w": 2} for row in rows(40)]
    assert "repeat" not in found(bench, data, "--weight_key", "w").err
    assert "repeat" not in inspect(bench)


def test_near_duplicates(bench):
    data = rows(60)
    data.append(pair(data[5]["prompt"].replace("?", " now?"), "Another answer."))
    found(bench, data)
    out = inspect(bench)
    assert "1 of 61 documents (1.6%) are nearly the same as an earlier one" in out
    assert "[data.jsonl line 61 = data.jsonl line 6]" in out


def test_a_shared_prompt_does_not_make_documents_alike():
    shared = "Read the following dialogue between two friends and write a short summary of it in one sentence please: "
    draw = random.Random(4)
    texts = [
        Text(number, f"row {number}", shared + " ".join(draw.choices(WORDS, k=8)), "a", number) for number in range(100)
    ]
    assert near.within(texts) == []


def test_near_duplicates_of_texts_without_spaces():
    one = "患者は三日前から発熱と咳があり来院したが薬は飲んでいない"
    texts = [Text(0, "row 0", one, "a", 0), Text(1, "row 1", one + "です", "a", 1), Text(2, "row 2", one[::-1], "a", 2)]
    (finding,) = near.within(texts)
    assert [str(example) for example in finding.examples] == ["row 1 = row 0"]


def test_minhash_finds_what_comparing_all_pairs_finds():
    draw = random.Random(1)
    texts = []
    for number in range(1, 151):
        words = draw.choices(WORDS, k=draw.randint(10, 40)) if number % 3 else texts[-1].question.split()
        words = [draw.choice(WORDS) if draw.random() < 0.04 else word for word in words] if number % 3 == 0 else words
        texts.append(Text(number, str(number), " ".join(words), "", number)) if words else None
    sets = near._shingles(texts)
    every = {
        (one, two)
        for one in range(len(sets))
        for two in range(len(sets))
        if one != two and sets[one] and len(sets[one] & sets[two]) >= near.ALIKE * len(sets[one] | sets[two])
    }
    proposed = {pair for pair in near._pairs(sets, sets) if pair[0] != pair[1]}
    assert len(every) > 10
    assert proposed <= every
    assert len(proposed) >= 0.95 * len(every)


def test_validated_and_trained(bench):
    data = rows(50)
    val = bench.jsonl([*rows(9, seed=1), pair(data[2]["prompt"], "Other.")], "val.jsonl")
    outcome = found(bench, data, "--val", val)
    expected = "1 of 10 validation documents (10.0%) ask what is also trained, word for word"
    assert expected in outcome.err
    out = inspect(bench)
    assert expected in out
    assert "[val.jsonl line 10 = data.jsonl line 3]" in out


def test_against_a_test_file(bench):
    data = rows(50)
    found(bench, data)
    test = [{"prompt": data[4]["prompt"].upper()}, {"prompt": data[5]["prompt"] + " Say why."}, rows(1, seed=3)[0]]
    out = inspect(bench, "--against", bench.jsonl(test, "test.jsonl"))
    assert "1 of 3 rows of test.jsonl (33.3%) are trained, word for word" in out
    assert "[test.jsonl line 1 = data.jsonl line 5]" in out
    assert "1 of 3 rows of test.jsonl (33.3%) are nearly the same as a trained one" in out
    assert "[test.jsonl line 2 = data.jsonl line 6]" in out
    clean = inspect(bench, "--against", bench.jsonl(rows(4, seed=5), "clean.jsonl"))
    assert "note: none of the 4 rows of clean.jsonl is among the trained ones" in clean


def test_against_with_other_keys(bench):
    data = rows(20)
    found(bench, data)
    file = bench.jsonl([{"q": data[4]["prompt"]}], "test.jsonl")
    assert "1 of 1 rows" in inspect(bench, "--against", file, "--question_key", "q")
    outcome = bench.inspect("--against", file)
    assert outcome.code == 2
    assert "test.jsonl" in outcome.err
    assert "'prompt'" in outcome.err


def test_one_answer_dominates(bench):
    data = [{**row, "gold": "yes" if number % 4 else "no"} for number, row in enumerate(rows(80))]
    val = bench.jsonl([{**row, "gold": "yes"} for row in rows(10, seed=1)], "val.jsonl")
    expected = (
        '75.0% of the answers are "yes": always giving it scores 75.0% (exact match), 100.0% of the validation set'
    )
    assert expected in found(bench, data, "--val", val).err
    out = inspect(bench)
    assert expected in out
    assert "most frequent answers" in out


def test_constant_answer(bench):
    data = [{**row, "gold": "yes"} for row in rows(60)]
    assert 'every answer is "yes": there is nothing to learn' in found(bench, data).err


def test_empty_answers(bench):
    data = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["gold"]}]}
        for row in rows(60)
    ]
    data[9]["messages"][1]["content"] = ""
    outcome = bench.tokenize("--data", bench.jsonl(data))
    if outcome.code == 2:  # the format refuses them before
        assert "data.jsonl line 10" in outcome.err
    else:
        assert "1 of 60 documents (1.7%) have an empty answer" in outcome.err
        assert "data.jsonl line 10" in outcome.err


def test_unfinished_answers(bench):
    long = " ".join(WORDS[:20])
    data = [{**row, "gold": f"{row['gold']} {long}."} for row in rows(60)]
    data[30]["gold"] = data[30]["gold"].rstrip(".")
    found(bench, data)
    out = inspect(bench)
    assert "1 of 60 long answers (1.7%) end without a full stop where the others have one" in out
    assert "[data.jsonl line 31]" in out


def test_cut_documents(bench):
    data = rows(60)
    data[3]["gold"] = "word " * 300
    found(bench, data, "--seq", "128")
    out = inspect(bench)
    assert "1 of 60 documents (1.7%) are cut at --seq 128, so the end of the answer is missing: raise --seq" in out
    assert "data.jsonl line 4" in out


def test_answers_within_the_question(bench):
    data = rows(60)
    data[3] = pair("The nurse gave him two tablets at noon. What happened?", "The nurse gave him two tablets at noon.")
    found(bench, data)
    assert "1 of 60 answers (1.7%) of 5 words or more appear verbatim in their question" in inspect(bench)
    choice = [{**row, "gold": row["prompt"].split()[3]} for row in rows(60)]
    found(bench, choice, "--retokenize", name="choice.jsonl")
    out = inspect(bench)
    assert "note: 60 of 60 answers (100.0%) appear verbatim in their question, as in multiple choice" in out


def test_special_tokens_in_texts(bench):
    data = rows(60)
    data[3]["prompt"] += " <|im_start|>"
    found(bench, data)
    out = inspect(bench)
    assert "1 of 60 documents (1.7%) have special tokens in what the user or the system says" in out
    assert "[data.jsonl line 4 (<|im_start|>)]" in out
    assert out.count("special tokens") == 1


def test_private_data_is_counted_and_never_shown(bench):
    data = rows(60)
    data[0]["prompt"] += " Write to jane.doe@example.org."
    data[1]["gold"] += " sk-abcdefghijklmnopqrstuvwx"
    found(bench, data)
    page = bench.root / "data.html"
    out = inspect(bench, "--page", page)
    assert "1 of 60 documents (1.7%) contain what looks like e-mail addresses" in out
    assert "1 of 60 documents (1.7%) contain what looks like keys" in out
    for secret in ("jane.doe", "sk-abc"):
        assert secret not in out
        assert secret not in page.read_text()
    assert hidden("from a@b.co, AKIAABCDEFGHIJKLMNOP") == "from [hidden], [hidden]"


def test_other_languages(bench):
    english = " The patient should rest for a few days and drink a lot of water while the fever lasts."
    data = [{**row, "gold": row["gold"] + english} for row in rows(60)]
    data[3] = pair("Der Patient klagt seit drei Wochen über starke Schmerzen im linken Knie.", "Das ist der Meniskus.")
    found(bench, data)
    out = inspect(bench)
    assert "are in another language than the others (en)" in out
    assert "[data.jsonl line 4 (de)]" in out


def test_scripts_are_told_apart_without_a_library():
    texts = [
        Text(n, str(n), "the patient should rest for a few days and drink a lot of cold water and tea", "")
        for n in range(40)
    ]
    texts.append(Text(40, "40", "пациент должен отдыхать несколько дней и пить много воды, пока у него есть жар", ""))
    (finding,) = outliers.languages(texts, outliers.script)
    assert [str(example) for example in finding.examples] == ["40 (Cyrillic)"]


def test_unusual_lengths(bench):
    data = rows(80)
    data[3]["gold"] = "word " * 900
    found(bench, data)
    out = inspect(bench)
    assert "note: 1 of 80 answers (1.2%) are far longer or shorter than the others" in out


def test_plain_texts_have_no_questions(bench):
    data = [{"text": row["prompt"]} for row in rows(60)]
    found(bench, [*data, data[0]])
    out = inspect(bench)
    assert "1 of 61 documents (1.6%) repeat an earlier one exactly" in out
    assert "answer it differently" not in out


def test_the_page(bench):
    data = rows(60)
    data.append(pair("</script><script>alert(1)</script> What is this?", "A tag."))
    data.append(data[0])
    found(bench, data)
    page = bench.root / "data.html"
    assert f"page written to {page}" in inspect(bench, "--page", page)
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
    text = page.read_text()
    assert "<script>alert" not in text
    content = json.loads(text.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    assert content["documents"] == 62
    assert sum(content["lengths"][0]["counts"]) == 62
    assert [finding["name"] for finding in content["findings"]] == ["exact duplicates"]
    samples = {sample["document"]: sample for sample in content["samples"]}
    assert content["findings"][0]["examples"] == [{"place": "data.jsonl line 1 = data.jsonl line 62", "document": 0}]
    assert ["assistant", "It is 0 0 days.<|im_end|>"] in samples[0]["parts"]


def test_a_page_that_cannot_be_written(bench):
    found(bench, rows(5))
    outcome = bench.inspect("--page", bench.root / "nowhere" / "data.html")
    assert outcome.code == 2
    assert "give the path of an .html file" in outcome.err


def test_a_sample_is_said_to_be_one(bench):
    found(bench, rows(60))
    out = inspect(bench, "--checks", "20")
    assert "60 of 60 documents were compared token by token, 20 read as text" in out
    assert "checks" not in inspect(bench, "--checks", "0")


def test_flags_that_contradict(bench):
    found(bench, rows(5))
    outcome = bench.inspect("--checks", "0", "--page", "data.html")
    assert outcome.code == 2
    assert "leave out --checks 0" in outcome.err
    assert bench.inspect("--checks", "-1").code == 2


def test_groups_leave_out_copies_of_a_row():
    keys = np.array([5, 5, 5, 0, 0, 7, 9, 9], dtype=np.uint64)
    rows_ = np.array([1, 1, 2, 3, 4, 5, 6, 6])
    assert [group.tolist() for group in groups(keys, rows_)] == [[0, 2]]


def test_a_page_beside_one_document(bench):
    found(bench, rows(5))
    page = bench.root / "data.html"
    assert f"page written to {page}" in inspect(bench, "--row", "2", "--page", page)
    assert page.exists()


def test_json_is_documents_alone(bench):
    found(bench, rows(5))
    outcome = bench.inspect("--json", "--page", bench.root / "data.html")
    assert outcome.code == 2
    assert "--json prints documents alone: give --against and --page without it" in outcome.err
