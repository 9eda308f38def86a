"""RULER: prompts that fill a length, with what is asked for in them; its scores; and the leaderboard over its sets."""
import json
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from evals import leaderboard, report, study
from evals.cli import app
from evals.items import Item, Options
from evals.prompts import count
from evals.tasks import ruler, settings_of
from evals.tasks.ruler import documents, words
from evals.work import open_model
from pykvc import _core
from pykvc.prose import prose

SETS = list(ruler.MODULES)
ANNOUNCEMENTS = ("hidden within", "Memorize", "quiz you", "Read the following", "Below is", "Answer the question", "Question:")


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Essays, paragraphs and passages of our own."""
    root = tmp_path_factory.mktemp("data")
    (root/"niah"/"haystack").mkdir(parents=True)
    for i in range(2):
        (root/"niah"/"haystack"/f"text{i}.txt").write_text(prose(250, seed=i))
    write(root/"squad"/"validation.jsonl", [
        {"id": str(i), "title": f"article {i//3}", "context": f"{prose(4, seed=i)}The prize of {i} was {i} pears.", "question": f"What was the prize of {i}?",
         "answers": {"text": [f"{i} pears", "pears"] if i % 7 else []}} for i in range(60)])
    passages = ["".join(f"Passage {k}:\nTown {10*i + k} (a town)\nIts mayor is M{i}{k}. {prose(3, seed=10*i + k)}\nIts second paragraph is M{i}{k}.\n"
                        for k in range(10)) for i in range(6)]
    for i, name in enumerate(documents.SETS):
        write(root/"longbench"/f"{name}.jsonl", [
            {"input": f"Who is the mayor of Town {20*i + 3}?", "context": passages[2*i], "answers": [f"M{2*i}3"]},
            {"input": f"Are Town {20*i + 11} and Town {20*i + 12} towns?", "context": passages[2*i + 1], "answers": ["yes"]},
            {"input": "Who is Xerxes?", "context": passages[2*i], "answers": ["A king"]}])
    return root


@pytest.fixture(scope="module")
def counted():
    """The model's tokens of a text."""
    vocabulary = open_model(None).vocabulary
    return lambda text: count(vocabulary, text)


@pytest.fixture
def load(folder, counted):
    def of(sets: str, n: int = 2, seed: int = 0, data_dir: Path | None = folder, **settings) -> list[Item]:
        return ruler.load(Options(counted, data_dir, n, seed, True, {**ruler.SETTINGS, "sets": sets, "length": 1000, **settings}))
    return of


# -- prompts ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("announce", [1, 0])
@pytest.mark.parametrize("length", [1000, 2500])
@pytest.mark.parametrize("name", SETS)
def test_a_prompt_and_its_answer_fill_the_length_from_below(load, counted, name, length, announce):
    for item in load(name, length=length, announce=announce):
        assert 0.9*length <= counted(item.context) + counted(item.question) + item.max_tokens <= length
        assert item.question.endswith(item.cue) and item.question.startswith(item.query) and item.tags == {"set": name, "length": length}


@pytest.mark.parametrize("name", SETS)
def test_a_seed_gives_the_same_items_and_more_of_them_begin_alike(load, name):
    two = load(name)
    assert load(name) == two and load(name, n=1) == two[:1] and len(load(name, n=3)) == 3
    assert [item.context for item in load(name, seed=1)] != [item.context for item in two]
    assert len({item.id for item in load(",".join(SETS), n=3)}) == 3*len(SETS) == len({item.context for item in load(",".join(SETS), n=3)})


def test_answers_are_as_long_as_the_benchmark_has_them(load):
    assert {item.tags["set"]: item.max_tokens for item in load(",".join(SETS), n=1)} == {
        **{name: 128 for name in SETS if name.startswith("niah")}, "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}


@pytest.mark.parametrize("name, n_needles, n_gold", [
    ("niah_single_1", 1, 1), ("niah_single_2", 1, 1), ("niah_single_3", 1, 1), ("niah_multikey_1", 4, 1), ("niah_multikey_2", None, 1),
    ("niah_multikey_3", None, 1), ("niah_multivalue", 4, 4), ("niah_multiquery", 4, 4)])
def test_each_needle_that_is_asked_for_stands_there_once(load, name, n_needles, n_gold):
    for item in load(name, n=4):
        needles = re.findall(r"One of the special magic (?:numbers|uuids) for (.+?) is: (\S+)\.", item.context)
        assert len(item.gold) == n_gold == len(set(item.gold)) and [item.context.count(gold) for gold in item.gold] == [1]*n_gold
        assert len(needles) == n_needles if n_needles else len(needles) == item.context.count("\n") - 1 > 8
        asked = {key for key, value in needles if value in item.gold}
        assert len(asked) == (4 if name == "niah_multiquery" else 1) and all(key in item.query and key in item.cue for key in asked)
        uuids = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
        assert all(bool(uuids.fullmatch(value)) == (name in ("niah_single_3", "niah_multikey_3")) for value in item.gold)
        one = n_gold == 1
        assert item.context.startswith("A special magic " if one else "Some special magic numbers are hidden")
        assert item.query.startswith("What is the" if one else "What are all the") and item.cue.endswith(" is" if one else " are")


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_2", "niah_single_2"])
def test_needles_are_spread_over_the_text(load, name):
    depths = [item.context.index(item.gold[0])/len(item.context) for item in load(name, n=20)]
    assert min(depths) < 0.35 and max(depths) > 0.65


def test_essays_come_whole_but_for_the_needles(load, folder):
    text = " ".join(" ".join(path.read_text() for path in sorted((folder/"niah"/"haystack").glob("*.txt"))).split())
    for item in load("niah_multivalue", n=5):
        _, _, body = item.context.partition("afterwards.\n")
        assert " ".join(re.sub(r"One of the special magic numbers for .+? is: \d+\.", "", body).split()) in f"{text} {text}"


def test_vt_is_one_chain_of_five_variables_and_a_worked_example(load):
    for item in load("vt", n=3):
        example, text = item.context.split("Memorize and track")[1:]
        value = re.search(r"assigned the value (\d{5}) in", item.query)[1]
        chain = re.findall(r"VAR ([A-Z]{5}) = (?:VAR ([A-Z]{5})|(\d{5}))", text)
        assert [name for name, _, _ in chain] == item.gold and [before for _, before, _ in chain] == ["", *item.gold[:-1]]
        assert chain[0][2] == value and text.count(value) == 1 and len(set(item.gold)) == 5
        shown = re.findall(r"VAR ([A-Z]{3}) = ", example)
        assert len(shown) == 5 and example.strip().endswith("they are: " + " ".join(shown)) and not any(name in text for name in shown)


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
        assert all(a > b for a, b in zip(times[:4], times[1:])) and all(re.fullmatch("[a-z]{6}", word) for word, _ in others)


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_documents_have_the_answer_and_others_are_near_to_it(load, name):
    for item in load(name, n=9, length=1500):
        found = re.findall(r"Document (\d+):\n(.*?)\n\n(?=Document|$)", item.context, re.DOTALL)
        assert [i for i, _ in found] == [str(i) for i in range(1, len(found) + 1)] and len(found) == len({text for _, text in found}) > 4
        if item.gold != ["yes"]:
            assert any(item.gold[0] in text for _, text in found)
        if name == "qa_2":
            assert "second paragraph" not in item.context and all(f"{town} (a town)" in item.context for town in re.findall(r"Town \d+", item.query))
    assert len(load(name, n=99)) == (51 if name == "qa_1" else 6)  # those without an answer are left out


@pytest.mark.parametrize("name", SETS)
def test_without_the_announcement_a_context_does_not_tell_what_will_be_asked(load, name):
    for told, bare in zip(load(name), load(name, announce=0)):
        assert any(phrase in told.context for phrase in ANNOUNCEMENTS) and not any(phrase in bare.context for phrase in ANNOUNCEMENTS)
        assert (told.gold, told.question, told.cue) == (bare.gold, bare.question, bare.cue) and told.id != bare.id


# -- scores -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SETS)
def test_a_share_of_the_answer_is_a_share_of_the_score(load, name):
    for item in load(name):
        assert ruler.score(item, "Well: " + ", ".join(item.gold).upper()) == 1 and ruler.score(item, "") == 0 and ruler.score(item, "I do not know.") == 0
        several = replace(item, gold=["one", "two", "three", "four"])
        assert ruler.score(several, "\tTwo\x01and three") == (1 if name.startswith("qa") else 0.5)


# -- mistakes -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sets, settings, says", [
    ("niah_single_4", {}, "--sets takes niah_single_1, .*, qa_2, not 'niah_single_4'"), ("vt", {"announce": 2}, "--announce is 1, or 0 "),
    ("vt", {"length": 400}, r"--length is \d+ or more for vt"), ("niah_multikey_3", {"length": 300}, r"--length is \d+ or more for niah_multikey_3"),
    ("qa_1", {"length": 100}, r"--length is \d+ or more for qa_1"), ("niah_single_2", {"length": 100_000}, "niah_single_2 of --length 100000 needs more text"),
    ("qa_2", {"length": 9000}, r"qa_2 of --length 9000 needs more text than there is here, which gives \d+ tokens")])
def test_what_cannot_be_had_is_refused(load, sets, settings, says):
    with pytest.raises(ValueError, match=says):
        load(sets, **settings)


@pytest.mark.parametrize("sets, missing, says", [
    ("niah_single_2", "niah/haystack/*.txt", r"has no niah/haystack/\*\.txt"), ("qa_1", "squad/*", r"has no squad/validation\.jsonl"),
    ("qa_2", "longbench/musique*", r"has no longbench/musique\.jsonl")])
def test_data_that_are_missing_are_named(load, folder, tmp_path, sets, missing, says):
    import shutil
    shutil.copytree(folder, tmp_path/"data")
    for path in (tmp_path/"data").glob(missing):
        path.unlink()
    with pytest.raises(ValueError, match=says):
        load(sets, data_dir=tmp_path/"data")
    assert load("vt,fwe,niah_single_1,niah_multikey_3", n=1, data_dir=tmp_path/"data")  # which take none


def test_no_answer_in_any_passage_is_refused(load, tmp_path):
    for name in documents.SETS:
        write(tmp_path/"longbench"/f"{name}.jsonl", [{"input": "Who paid?", "context": "Passage 1:\nA\nB", "answers": ["C"]}])
    with pytest.raises(ValueError, match="qa_2 of ruler finds no answer"):
        load("qa_2", data_dir=tmp_path)


def test_the_package_of_words_is_named_where_it_is_missing(load, monkeypatch):
    words.english.cache_clear()
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    for name in ("cwe", "niah_single_1"):
        with pytest.raises(ValueError, match="pip install wonderwords"):
            load(name)
    assert load("vt,fwe,niah_multikey_3", n=1)


def test_settings_are_checked():
    assert settings_of(["ruler"], {"sets": "vt", "announce": 0}) == {"ruler": {"sets": "vt", "announce": 0}}
    with pytest.raises(ValueError, match="--announce is a whole number"):
        settings_of(["ruler"], {"announce": "no"})


# -- on a model ---------------------------------------------------------------------------------------------------------

def test_a_run_a_report_and_a_leaderboard(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("evals.tasks.ruler.needles.MAX_TOKENS", 8)
    how = ["--task", "ruler", "--sets", "niah_single_1,vt", "--length", "1000", "--n", "1", "--data-dir", folder, "--out", tmp_path, "--threads", "1",
           "--policy", "full,snapkv:window=8", "--budget", "75%,25%", "--n-parallel", "1"]
    result = CliRunner().invoke(app, ["run", *map(str, how)])
    assert result.exit_code == 0, result.stderr
    rows = report.scored(tmp_path)
    assert len(rows) == 2*3 and {row["set"] for row in rows} == {"niah_single_1", "vt"} and all(row["n_context"] + row["n_predicted"] < 1060 for row in rows)
    assert all(row["evictions"] == (row["policy"] != "full") for row in rows)
    result = CliRunner().invoke(app, ["report", "--out", str(tmp_path), "--no-pictures"])
    assert result.exit_code == 0 and "## ruler, vt, length 1000, smollm2-135m, question-out" in result.stdout, result.stderr
    result = CliRunner().invoke(app, ["leaderboard", "--out", str(tmp_path)])
    assert result.exit_code == 0 and "| method | 0 % | 25 % | 75 % |" in result.stdout and "At equal bytes" in result.stdout, result.stderr
    assert (tmp_path/"leaderboard.md").read_text().strip() == result.stdout.strip() and len((tmp_path/"leaderboard.csv").read_text().splitlines()) == 4
    (tmp_path/"own.toml").write_text('title = "Own"\n[[run]]\ntask = "ruler"\n')
    assert any("| method |" in said for said in study.report(study.read(str(tmp_path/"own.toml")), tmp_path))
    assert (tmp_path/"leaderboard.md").read_text().startswith("# Own\n")


# -- the leaderboard ----------------------------------------------------------------------------------------------------

def row(name: str, item: int, policy: str, score: float, budget: str = "", used: float = 1.0, **more) -> dict:
    return {"model": "m", "task": "ruler", "set": name, "settings": "", "protocol": "question-out", "chat": True, "n_ubatch": 512, "seed": 0, "type_k": "f16",
            "type_v": "f16", "policy": _core.parse_spec(policy), "budget": budget, "decode_budget": "", "cells": "", "item": f"{name}/{item}", "score": score,
            "bytes_used": used*2**20, **more}


def rows(policy: str, a: list[float], b: list[float], budget: str = "", used: float = 1.0, **more) -> list[dict]:
    return [row(name, i, policy, score, budget, used, **more) for name, scores in (("a", a), ("b", b)) for i, score in enumerate(scores)]


def test_every_set_weighs_the_same():
    (line,) = leaderboard.lines(rows("snapkv", [1]*8, [0, 0], "0.25"))
    assert (line["score"], line["n"], line["n_sets"], line["removed"], line["share_of_full"]) == (0.5, 10, 2, "75 %", None)
    half = [(interval[1] - interval[0]) for interval in (report.stats.wilson(8, 8), report.stats.wilson(0, 2))]
    assert line["score_low"] == pytest.approx(0.5 - half[0]/2) and line["score_high"] == pytest.approx(0.5 + half[1]/2)


def test_the_interval_covers_the_mean_about_as_often_as_it_says():
    rng, shares = np.random.default_rng(0), np.array([1.0, 0.95, 0.9, 0.7, 0.5, 0.3, 0.1])
    found = [leaderboard.stratified(rng.binomial(1, shares[:, None], (len(shares), 10)).tolist()) for _ in range(2000)]
    covered = np.mean([low <= shares.mean() <= high for _, low, high in found])
    assert 0.93 < covered < 0.985
    assert leaderboard.stratified([[1]*20, [1]*20])[1] < 0.95 and leaderboard.stratified([[0.25], [1.0]])[1:] != (0.625, 0.625)


def test_shares_are_columns_and_the_best_method_stands_first():
    found = [*rows("full", [1, 1], [1, 0]), *rows("random", [0, 0], [0, 0], "0.5"), *rows("snapkv", [1, 1], [0, 0], "0.5"),
             *rows("snapkv", [1, 0], [0, 0], "0.125"), *rows("snapkv", [1, 1], [1, 1], "64"), *rows("random", [1, 1], [], "0.125"), *rows("random", [1], [1], "64")]
    text = leaderboard.markdown(leaderboard.lines(found))
    lines = text.splitlines()
    start = lines.index("### The eviction does not see the question") + 2
    assert lines[0] == "## ruler, m" and lines[start] == "| method | 0 % | 50 % | 87.5 % | all but 64 |"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2:start + 5]]
    assert [of[0] for of in cells] == ["`full`", "`random`", "`snapkv`"] and cells[0][1].startswith("75.0 (") and cells[0][2:] == ["", "", ""]
    assert cells[2][1:3] == ["", cells[2][2]] and cells[2][2].startswith("50.0 (") and cells[2][3].startswith("25.0 (") and cells[2][4].startswith("100.0 (")
    assert cells[1][3] == "1 of 2 sets" and cells[1][4].endswith(", n 2")


def test_what_sees_the_question_stands_apart():
    found = [*rows("full", [1], [1]), *rows("full", [1], [1], protocol="question-in"), *rows("snapkv", [1], [0], "0.5", protocol="question-in"),
             *rows("finch", [1], [1], "0.5"), *rows("keydiff", [0], [0], "0.5")]
    blind, aware = leaderboard.markdown(leaderboard.lines(found)).split("### The eviction sees the question")
    aware = aware.partition("###")[0]
    assert "`keydiff`" in blind and "`full`" in blind and "`finch`" not in blind and "question-in" not in blind
    assert "| `snapkv`, question-in |" in aware and "| `finch` |" in aware and "`full`" not in aware


def test_equal_bytes_stand_under_one_another():
    q8, q4 = dict(type_k="q8_0", type_v="q8_0"), dict(type_k="q4_0", type_v="q4_0")
    found = [*rows("full", [1], [1], used=16), *rows("full", [1], [1], used=8.5, **q8), *rows("full", [0], [1], used=4.5, **q4),
             *rows("keydiff", [1], [1], "0.5", used=8), *rows("keydiff", [0], [0], "0.25", used=4.2), *rows("keydiff", [1], [0], "0.5", used=4.25, **q8),
             *rows("finch", [1], [1], "0.5", used=8)]
    text = leaderboard.markdown(leaderboard.lines(found)).partition("### At equal bytes")[2]
    table = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in (line.split("|") for line in text.splitlines() if line.startswith("| `"))}
    assert "| method | 100 % | 50 % | 25 % |" in text and list(table)[:3] == ["`full`", "`full q8_0/q8_0`", "`full q4_0/q4_0`"] and len(table) == 5
    assert [cell.partition(" ")[0] for cell in table["`keydiff`"]] == ["", "100.0", "0.0"] and table["`keydiff`"][2].endswith("at 4.2 MiB")
    assert table["`full q4_0/q4_0`"][2].startswith("50.0 (") and table["`keydiff q8_0/q8_0`"][2].startswith("50.0 (")
    assert "equal bytes" not in leaderboard.markdown(leaderboard.lines(found[2:]))  # nothing to be a share of


def test_a_failed_answer_counts_nowhere_and_a_mistake_is_one_sentence(tmp_path):
    assert leaderboard.lines([row("a", 0, "full", None), *rows("full", [1], [1])])[0]["n"] == 2
    result = CliRunner().invoke(app, ["leaderboard", "--out", str(tmp_path)])
    assert result.exit_code == 2 and "holds no answers" in result.stderr and len(result.stderr.splitlines()) == 1
    result = CliRunner().invoke(app, ["leaderboard", "--task", "rules", "--out", str(tmp_path)])
    assert result.exit_code == 2 and "ruler" in result.stderr
