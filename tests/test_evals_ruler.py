"""RULER: prompts that fill a length, with what is asked for in them; its scores; and the leaderboard over its sets."""
import json
import re
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from evals import leaderboard, report, stats, study
from evals.cli import app
from evals.items import Item, Options
from evals.prompts import count
from evals.tasks import ruler, settings_of
from evals.tasks.ruler import documents, draft
from evals.work import open_model
from pykvc import _core
from pykvc.prose import prose

SETS = list(ruler.MODULES)
NEEDLES = [name for name in SETS if name.startswith("niah")]
ANNOUNCEMENTS = ("hidden within", "Memorize", "quiz you", "Read the following", "Below is", "Answer the question",
                 "Question:")
UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def paragraph(i: int) -> dict:
    """A row of SQuAD; every seventh has no answer."""
    return {"id": str(i), "title": f"article {i//3}", "context": f"{prose(4, seed=i)}The prize of {i} was {i} pears.",
            "question": f"What was the prize of {i}?", "answers": {"text": [f"{i} pears", "pears"] if i % 7 else []}}


def passages(i: int) -> str:
    """The context of a row of LongBench."""
    return "".join(f"Passage {k}:\nTown {10*i + k} (a town)\nIts mayor is M{i}{k}. {prose(3, seed=10*i + k)}\n"
                   f"Its second paragraph is M{i}{k}.\n" for k in range(10))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Essays, paragraphs and passages of our own."""
    root = tmp_path_factory.mktemp("data")
    (root/"niah"/"haystack").mkdir(parents=True)
    for i in range(2):
        (root/"niah"/"haystack"/f"text{i}.txt").write_text(prose(250, seed=i))
    write(root/"squad"/"validation.jsonl", [paragraph(i) for i in range(60)])
    for i, name in enumerate(documents.SETS):
        a, b = 2*i, 2*i + 1
        write(root/"longbench"/f"{name}.jsonl", [
            {"input": f"Who is the mayor of Town {10*a + 3}?", "context": passages(a), "answers": [f"M{a}3"]},
            {"input": f"Are Town {10*b + 1} and Town {10*b + 2} towns?", "context": passages(b), "answers": ["yes"]},
            {"input": "Who is Xerxes?", "context": passages(a), "answers": ["A king"]}])
    return root


@pytest.fixture(scope="module")
def counted():
    """The model's tokens of a text."""
    vocabulary = open_model(None).vocabulary
    return lambda text: count(vocabulary, text)


@pytest.fixture
def load(folder, counted):
    def of(sets: str, n: int = 2, seed: int = 0, data_dir: Path | None = folder, **settings) -> list[Item]:
        settings = {**ruler.SETTINGS, "sets": sets, "length": 1000, **settings}
        return ruler.load(Options(counted, data_dir, n, seed, True, settings))
    return of


# -- prompts -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("announce", [1, 0])
@pytest.mark.parametrize("length", [1000, 2500])
@pytest.mark.parametrize("name", SETS)
def test_a_prompt_and_its_answer_fill_the_length_from_below(load, counted, name, length, announce):
    for item in load(name, length=length, announce=announce):
        assert 0.9*length <= counted(item.context) + counted(item.question) + item.max_tokens <= length
        assert item.question == f"{item.query} {item.cue}" and item.tags == {"set": name, "length": length}


@pytest.mark.parametrize("name", SETS)
def test_a_seed_gives_the_same_items_and_more_of_them_begin_alike(load, name):
    two = load(name)
    assert load(name) == two and load(name, n=1) == two[:1] and len(load(name, n=3)) == 3
    assert [item.context for item in load(name, seed=1)] != [item.context for item in two]


def test_items_differ(load):
    items = load(",".join(SETS), n=3)
    assert len({item.id for item in items}) == len({item.context for item in items}) == len(items) == 3*len(SETS)


def test_answers_are_as_long_as_the_benchmark_has_them(load):
    assert {item.tags["set"]: item.max_tokens for item in load(",".join(SETS), n=1)} == {
        **dict.fromkeys(NEEDLES, 128), "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}


@pytest.mark.parametrize("name, n_needles, n_gold", [
    ("niah_single_1", 1, 1), ("niah_single_2", 1, 1), ("niah_single_3", 1, 1), ("niah_multikey_1", 4, 1),
    ("niah_multikey_2", None, 1), ("niah_multikey_3", None, 1), ("niah_multivalue", 4, 4), ("niah_multiquery", 4, 4)])
def test_each_needle_that_is_asked_for_stands_there_once(load, name, n_needles, n_gold):
    for item in load(name, n=4):
        needles = re.findall(r"One of the special magic (?:numbers|uuids) for (.+?) is: (\S+)\.", item.context)
        assert len(item.gold) == n_gold and [item.context.count(gold) for gold in item.gold] == [1]*n_gold
        assert len(needles) == (n_needles or item.context.count("\n") - 1) and (n_needles or len(needles) > 8)
        asked = {key for key, value in needles if value in item.gold}
        assert len(asked) == (4 if name == "niah_multiquery" else 1)
        assert all(key in item.query and key in item.cue for key in asked)
        of_uuids = name in ("niah_single_3", "niah_multikey_3")
        assert all(bool(UUID.fullmatch(value)) == of_uuids for value in item.gold)


@pytest.mark.parametrize("name", NEEDLES)
def test_one_answer_is_asked_for_in_the_singular(load, name):
    [item] = load(name, n=1)
    one = len(item.gold) == 1
    assert item.context.startswith("A special magic " if one else "Some special magic numbers are hidden")
    assert item.query.startswith("What is the" if one else "What are all the")
    assert item.cue.endswith(" is" if one else " are")


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_2", "niah_single_2"])
def test_needles_are_spread_over_the_text(load, name):
    depths = [item.context.index(item.gold[0])/len(item.context) for item in load(name, n=20)]
    assert min(depths) < 0.35 and max(depths) > 0.65


def test_essays_come_whole_but_for_the_needles(load, folder):
    text = " ".join(" ".join(path.read_text() for path in sorted((folder/"niah"/"haystack").glob("*.txt"))).split())
    for item in load("niah_multivalue", n=5):
        _, _, body = item.context.partition("afterwards.\n")
        without = re.sub(r"One of the special magic numbers for .+? is: \d+\.", "", body)
        assert " ".join(without.split()) in f"{text} {text}"


def test_vt_is_one_chain_of_five_variables_and_a_worked_example(load):
    for item in load("vt", n=3):
        example, text = item.context.split("Memorize and track")[1:]
        value = re.search(r"assigned the value (\d{5}) in", item.query)[1]
        chain = re.findall(r"VAR ([A-Z]{5}) = (?:VAR ([A-Z]{5})|(\d{5}))", text)
        assert [name for name, _, _ in chain] == item.gold and len(set(item.gold)) == 5
        assert [before for _, before, _ in chain] == ["", *item.gold[:-1]]
        assert chain[0][2] == value and text.count(value) == 1
        shown = re.findall(r"VAR ([A-Z]{3}) = ", example)
        assert len(shown) == 5 and example.strip().endswith("they are: " + " ".join(shown))
        assert not any(f"VAR {name} " in text for name in shown)


@pytest.mark.parametrize("length, n_common, n_other", [(1000, 6, 1), (4096, 30, 3)])
def test_cwe_asks_for_the_words_that_are_there_most_often(load, length, n_common, n_other):
    for item in load("cwe", length=length):
        example, text = item.context.split("Below is")[1:]
        entries = re.findall(r"\d+\. (\D+?)(?= \d+\.|\n)", text)
        times = Counter(entries)
        assert len(item.gold) == 10 and {times[word] for word in item.gold} == {n_common}
        assert {n for word, n in times.items() if word not in item.gold} == {n_other}
        assert re.findall(r"(\d+)\. ", text) == [str(i) for i in range(1, len(entries) + 1)]
        assert "Answer: The top 10 words that appear most often in the list are:1. " in example


def test_fwe_asks_for_the_three_most_frequent_words_after_the_dots(load):
    for item in load("fwe", n=4):
        (dots, n_dots), *others = Counter(item.context.split("coded words. ")[1].split()).most_common()
        assert dots == "..." and [word for word, _ in others[:3]] == item.gold
        times = [n_dots, *(n for _, n in others)]
        assert all(a > b for a, b in zip(times[:4], times[1:]))
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in others)


@pytest.mark.parametrize("name, n_questions", [("qa_1", 51), ("qa_2", 6)])
def test_documents_have_the_answer_and_others_are_near_to_it(load, name, n_questions):
    for item in load(name, n=9, length=1500):
        found = re.findall(r"Document (\d+):\n(.*?)\n\n(?=Document|$)", item.context, re.DOTALL)
        assert [i for i, _ in found] == [str(i) for i in range(1, len(found) + 1)]
        assert len(found) == len({text for _, text in found}) > 4
        assert item.gold == ["yes"] or any(item.gold[0] in text for _, text in found)
        if name == "qa_2":
            assert "second paragraph" not in item.context
            assert all(f"{town} (a town)" in item.context for town in re.findall(r"Town \d+", item.query))
    assert len(load(name, n=99)) == n_questions  # those without an answer are left out


@pytest.mark.parametrize("name", SETS)
def test_without_the_announcement_a_context_does_not_tell_what_will_be_asked(load, name):
    for told, bare in zip(load(name), load(name, announce=0)):
        assert any(phrase in told.context for phrase in ANNOUNCEMENTS)
        assert not any(phrase in bare.context for phrase in ANNOUNCEMENTS)
        assert (told.gold, told.question, told.cue) == (bare.gold, bare.question, bare.cue) and told.id != bare.id


# -- scores ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SETS)
def test_a_share_of_the_answer_is_a_share_of_the_score(load, name):
    for item in load(name):
        assert ruler.score(item, "Well: " + ", ".join(item.gold).upper()) == 1
        assert ruler.score(item, "") == ruler.score(item, "I do not say.") == 0
        several = replace(item, gold=["one", "two", "three", "four"])
        assert ruler.score(several, "\tTwo\x01and three") == (1 if name.startswith("qa") else 0.5)


# -- mistakes ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sets, settings, says", [
    ("niah_single_4", {}, "--sets takes niah_single_1, .*, qa_2, not 'niah_single_4'"),
    ("vt", {"announce": 2}, "--announce is 1, or 0 "),
    ("vt", {"length": 400}, r"--length is \d+ or more for vt"),
    ("niah_multikey_3", {"length": 300}, r"--length is \d+ or more for niah_multikey_3"),
    ("qa_1", {"length": 100}, r"--length is \d+ or more for qa_1"),
    ("niah_single_2", {"length": 100_000}, "niah_single_2 of --length 100000 needs more text"),
    ("qa_2", {"length": 9000}, r"qa_2 of --length 9000 needs more text than there is here, which gives \d+ tokens")])
def test_what_cannot_be_had_is_refused(load, sets, settings, says):
    with pytest.raises(ValueError, match=says):
        load(sets, **settings)


@pytest.mark.parametrize("sets, missing, says", [
    ("niah_single_2", "niah/haystack/*.txt", r"has no niah/haystack/\*\.txt"),
    ("qa_1", "squad/*", r"has no squad/validation\.jsonl"),
    ("qa_2", "longbench/musique*", r"has no longbench/musique\.jsonl")])
def test_data_that_are_missing_are_named(load, folder, tmp_path, sets, missing, says):
    shutil.copytree(folder, tmp_path/"data")
    for path in (tmp_path/"data").glob(missing):
        path.unlink()
    with pytest.raises(ValueError, match=says):
        load(sets, data_dir=tmp_path/"data")
    assert load("vt,fwe,niah_single_1,niah_multikey_3", n=1, data_dir=tmp_path/"data")  # which take none


def test_no_answer_in_any_passage_is_refused(load, tmp_path):
    for name in documents.SETS:
        row = {"input": "Who paid?", "context": "Passage 1:\nA\nB", "answers": ["C"]}
        write(tmp_path/"longbench"/f"{name}.jsonl", [row])
    with pytest.raises(ValueError, match="qa_2 of ruler finds no answer"):
        load("qa_2", data_dir=tmp_path)


def test_the_package_of_words_is_named_where_it_is_missing(load, monkeypatch):
    draft.english.cache_clear()
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    for name in ("cwe", "niah_single_1"):
        with pytest.raises(ValueError, match="pip install wonderwords"):
            load(name)
    assert load("vt,fwe,niah_multikey_3", n=1)


def test_settings_are_checked():
    assert settings_of(["ruler"], {"sets": "vt", "announce": 0}) == {"ruler": {"sets": "vt", "announce": 0}}
    with pytest.raises(ValueError, match="--announce is a whole number"):
        settings_of(["ruler"], {"announce": "no"})


# -- on a model --------------------------------------------------------------------------------------------------------

def call(*args) -> str:
    result = CliRunner().invoke(app, list(map(str, args)))
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_a_run_a_report_and_a_leaderboard(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("evals.tasks.ruler.needles.MAX_TOKENS", 8)
    call("run", "--task", "ruler", "--sets", "niah_single_1,vt", "--length", 1000, "--n", 1, "--data-dir", folder,
         "--policy", "full,snapkv:window=8", "--budget", "75%,25%", "--out", tmp_path, "--threads", 1)
    found = report.scored(tmp_path)
    assert len(found) == 2*3 and {one["set"] for one in found} == {"niah_single_1", "vt"}
    assert all(one["n_prompt"] + one["n_predicted"] < 1060 for one in found)  # the template comes on top
    assert all(one["evictions"] == (one["policy"] != "full") for one in found)
    assert "## ruler, vt, length 1000, smollm2-135m, question-out" in call("report", "--out", tmp_path, "--no-pictures")
    text = call("leaderboard", "--out", tmp_path)
    assert "| method | 0 % | 25 % | 75 % |" in text and "### At equal bytes" in text
    assert (tmp_path/"leaderboard.md").read_text().strip() == text.strip()
    assert len((tmp_path/"leaderboard.csv").read_text().splitlines()) == 1 + 3
    (tmp_path/"own.toml").write_text('title = "Own"\n[[run]]\ntask = "ruler"\n')
    assert any("| method |" in said for said in study.report(study.read(str(tmp_path/"own.toml")), tmp_path))
    assert (tmp_path/"leaderboard.md").read_text() == f"# Own\n\n{text.strip()}\n"
    assert (tmp_path/"leaderboard-smollm2-135m-ruler-length_1000.png").exists()


# -- the leaderboard ---------------------------------------------------------------------------------------------------

def rows(policy: str, a: list[float], b: list[float], budget: str = "", used: float = 1.0, **more) -> list[dict]:
    """Answers of two sets."""
    usual = {"model": "m", "task": "ruler", "settings": "", "protocol": "question-out", "chat": True, "n_ubatch": 512,
             "seed": 0, "type_k": "f16", "type_v": "f16", "decode_budget": "", "cells": ""}
    return [{**usual, "policy": _core.parse_spec(policy), "budget": budget, "set": name, "item": f"{name}/{i}",
             "score": score, "bytes_used": used*2**20, **more}
            for name, scores in (("a", a), ("b", b)) for i, score in enumerate(scores)]


def board(*found: list[dict]) -> str:
    return leaderboard.markdown(leaderboard.lines([one for part in found for one in part]))


def table(text: str, heading: str) -> dict[str, list[str]]:
    """Method -> cells; "method" -> columns."""
    grid = text.partition(f"### {heading}\n")[2].partition("\n#")[0]
    lines = [line.strip("|").split("|") for line in grid.splitlines() if line.startswith("|")]
    found = [[cell.strip() for cell in cells] for cells in lines]
    return {name: cells for name, *cells in found if name != "---"}


def test_every_set_weighs_the_same():
    (line,) = leaderboard.lines(rows("snapkv", [1]*8, [0, 0], "0.25"))
    assert (line["score"], line["n"], line["n_sets"], line["removed"]) == (0.5, 10, 2, "75 %")
    assert line["share_of_full"] is None
    assert (line["score_low"], line["score_high"]) == pytest.approx(stats.wilson(5, 10))  # each set is all alike
    (line,) = leaderboard.lines([one for one in rows("full", [1, 0, 0, 0.5], [1]) if one["set"] == "a"])
    assert (line["score_low"], line["score_high"]) == stats.mean_interval([1, 0, 0, 0.5])  # as the report's


def test_a_set_of_one_item_and_sets_that_are_all_alike_are_not_certain():
    for alike in (1.0, 0.1):
        _, low, high = leaderboard.stratified([[alike]*20, [alike]*20])
        assert low < alike - 0.05 and (high > alike + 0.05 or alike == 1)
    _, low, high = leaderboard.stratified([[0.0, 1.0]*20, [1.0]])
    assert low < 0.5  # 3/4 of which half is of one item
    assert leaderboard.stratified([[0.5], [0.5]], apart=False) == (0.5, *stats.wilson(0.5, 1, stats.student(1)))


# of sets: RULER's, as the whole cache, keydiff and snapkv answer them
SHARES = {"full": [1, 1, 1, 1, 1, 0.55, 1, 0.79, 0.42, 0.06, 0.67, 0.4, 0.19],
          "keydiff": [1, 1, 1, 0.7, 0.5, 0.2, 0.8, 0.78, 0.55, 0.03, 0.58, 0.2, 0.19],
          "snapkv": [0.3, 0.2, 0.1, 0.05, 0.05, 0.02, 0.05, 0.1, 0.2, 0.03, 0.2, 0.1, 0.15], "half": [0.5]*13}


@pytest.mark.parametrize("n", [3, 5, 20])
@pytest.mark.parametrize("name", SHARES)
def test_the_interval_covers_the_mean_about_as_often_as_it_says(name, n):
    """Simulated, with n items a set: the true mean is in 94.8 to 98.1 % of the intervals."""
    rng, shares, held = np.random.default_rng(n), np.array(SHARES[name]), 0
    for _ in range(1500):
        _, low, high = leaderboard.stratified(rng.binomial(1, shares[:, None], (13, n)).tolist())
        held += low <= shares.mean() <= high
    print(f"leaderboard, {name}, {n} items a set: {held/1500:.1%}")
    assert 0.93 <= held/1500 <= 0.985


@pytest.mark.parametrize("n", [3, 5, 20])
def test_the_interval_covers_the_mean_of_sets_that_share_their_documents(n):
    """Each is as hard in all sets, so nothing more is known than of one."""
    rng, held = np.random.default_rng(n), 0
    for _ in range(1500):
        _, low, high = leaderboard.stratified([(rng.random(n) < 0.5).astype(float).tolist()]*3, apart=False)
        held += low <= 0.5 <= high
    assert held/1500 >= 0.93


def test_the_picture_has_what_saw_no_question_in_f16_and_the_whole_cache_in_all_types(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(leaderboard, "picture", lambda path, heading, block, lines: shown.append((path.name, heading, lines)))
    found = [rows("full", [1, 1], [1, 1], used=4), rows("full", [1, 0], [1, 1], used=1, type_k="q4_0", type_v="q4_0"),
             rows("full", [1, 1], [1, 0], used=2, type_k="q8_0", type_v="q8_0"), rows("snapkv", [1, 1], [0, 0], "0.5", used=2),
             rows("keydiff", [1], [0], "0.5"), rows("finch", [1, 1], [1, 1], "0.5"), rows("tova", [1, 1], [1, 1], "0.5", protocol="question-in"),
             rows("snapkv", [1, 1], [0, 0], "0.25", type_k="q8_0", type_v="q8_0")]
    assert leaderboard.draw(tmp_path, leaderboard.lines([one for part in found for one in part])) == []  # nothing to show
    ((name, heading, lines),) = shown
    assert (name, heading) == ("leaderboard-m-ruler.png", "m, ruler; full is f16, q8_0/q8_0, q4_0/q4_0")
    assert [(line["policy"].partition(":")[0], line["type_k"]) for line in lines] == [("full", "f16"), ("full", "q4_0"), ("full", "q8_0"), ("snapkv", "f16")]


def test_shares_are_columns_and_the_best_method_stands_first():
    text = board(rows("full", [1, 1], [1, 0]), rows("random", [0, 0], [0, 0], "0.5"),
                 rows("snapkv", [1, 1], [0, 0], "0.5"), rows("snapkv", [1, 0], [0, 0], "0.125"),
                 rows("snapkv", [1, 1], [1, 1], "64"), rows("random", [1, 1], [], "0.125"),
                 rows("random", [0], [0], "64"))
    found = table(text, leaderboard.BLIND)
    assert text.startswith("## ruler, m\n") and list(found) == ["method", "`full`", "`snapkv`", "`random`"]
    assert found["method"] == ["0 %", "50 %", "87.5 %", "all but 64"]
    assert found["`full`"][0].startswith("75.0 (") and found["`full`"][1:] == ["", "", ""]
    assert [cell.partition(" (")[0] for cell in found["`snapkv`"]] == ["", "50.0", "25.0", "100.0"]
    assert found["`random`"][2] == "1 of 2 sets" and found["`random`"][3].endswith(", n 2")


def test_what_sees_the_question_stands_apart():
    text = board(rows("full", [1], [1]), rows("full", [1], [1], protocol="question-in"),
                 rows("snapkv", [1], [0], "0.5", protocol="question-in"), rows("finch", [1], [1], "0.5"),
                 rows("keydiff", [0], [0], "0.5"))
    assert list(table(text, leaderboard.BLIND)) == ["method", "`full`", "`keydiff`"]
    assert list(table(text, leaderboard.AWARE)) == ["method", "`finch`", "`snapkv`, question-in"]
    assert list(table(text, "At equal bytes")) == ["method", "`full`", "`keydiff`"]


def test_equal_bytes_stand_under_one_another():
    q8, q4 = dict(type_k="q8_0", type_v="q8_0"), dict(type_k="q4_0", type_v="q4_0")
    smaller = [rows("full", [1], [1], used=8.5, **q8), rows("full", [0], [1], used=4.5, **q4),
               rows("keydiff", [1], [1], "0.5", used=8), rows("keydiff", [0], [0], "0.25", used=4.2),
               rows("keydiff", [1], [0], "0.5", used=4.25, **q8)]
    found = table(board(rows("full", [1], [1], used=16), *smaller), "At equal bytes")
    assert list(found) == ["method", "`full`", "`full q8_0/q8_0`", "`full q4_0/q4_0`", "`keydiff`",
                           "`keydiff q8_0/q8_0`"]
    assert found["method"] == ["100 %", "50 %", "25 %"]
    figures = {name: [cell.partition(" ")[0] for cell in cells] for name, cells in found.items()}
    assert figures["`keydiff`"] == ["", "100.0", "0.0"] and found["`keydiff`"][2].endswith("at 4.2 MiB")
    assert figures["`full q4_0/q4_0`"] == figures["`keydiff q8_0/q8_0`"] == ["", "", "50.0"]
    assert "equal bytes" not in board(*smaller)  # of nothing to be a share of


def test_a_failed_answer_counts_nowhere():
    assert leaderboard.lines([*rows("full", [None], []), *rows("full", [1], [1])])[0]["n"] == 2


@pytest.mark.parametrize("args, says", [([], "holds no answers"), (["--task", "rules"], "ruler")])
def test_a_mistake_is_one_sentence(tmp_path, args, says):
    result = CliRunner().invoke(app, ["leaderboard", "--out", str(tmp_path), *args])
    assert result.exit_code == 2 and says in result.stderr and len(result.stderr.splitlines()) == 1
