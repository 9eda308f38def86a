"""What intervals count once: a question, whatever examples stand before it, or a context that several share."""
from pathlib import Path

import pytest

from evals import pool, report, stats, tasks
from evals.tasks import TASKS
from test_evals_tasks import folder, load  # noqa: F401  (a fixture)

RESULTS = Path(__file__).parent.parent/"docs"/"results"


@pytest.mark.parametrize("name, item, tags, unit", [  # as docs/results holds them
    ("gsm8k", "gsm8k-test-0/1-cot", {}, "gsm8k-test-0"), ("gsm8k", "gsm8k-test-0/8-train-order1", {}, "gsm8k-test-0"),
    ("commonsense_qa", "1afa02df/4-train", {}, "1afa02df"), ("commonsense_qa", "1afa02df/4-cot", {}, "1afa02df"),
    ("mmlu", "anatomy/test/85/5", {"subject": "anatomy"}, "anatomy"),
    ("mmlu", "anatomy/test/85/0", {}, "anatomy/test/85"),
    ("humaneval", "HumanEval/2", {"unsafe_code": False}, "HumanEval/2"),
    ("safety", "jbb_benign/10", {"set": "jbb_benign"}, "jbb_benign/10"), ("humaneval", "HumanEval/2/8-shots-draw1", {}, "HumanEval/2"),
    ("safety", "jbb_benign/10/8-shots", {"set": "jbb_benign"}, "jbb_benign/10"),
    ("niah", "emerson_essays/8000/0/needle-sf@0", {}, "emerson_essays/0"),
    ("niah", "emerson_essays/4000/0/needle-3@33", {}, "emerson_essays/0"),
    ("niah", "emerson_essays/8000/1/needle-3@44", {}, "emerson_essays/1"),
    ("kv_retrieval", "kv75-3/20/2a8d-4b1c", {}, "kv75-3"),
    ("longbench", "hotpotqa/minilongbench-hotpotqa-1/3000", {"set": "hotpotqa"}, "hotpotqa/minilongbench-hotpotqa-1"),
    ("longbench", "qasper/0/0", {"set": "qasper", "document": "ab12"}, "ab12"),
    ("longgenbench", "15+5/8-cot", {}, "15+5"), ("longgenbench", "15+5/8-train", {}, "15+5"),
    ("longgenbench_mmlu", "law/20/5", {"subject": "law"}, "law"),
    ("fidelity", "gsm8k:gsm8k-test-0/8-cot/64", {}, "gsm8k:gsm8k-test-0"),
    ("fidelity", "gsm8k:gsm8k-test-0/1-cot/64/f16", {}, "gsm8k:gsm8k-test-0"),
    ("fidelity", "longgenbench:0+5/8-cot-order1/600", {}, "longgenbench:0+5"),
    ("fidelity", "humaneval:HumanEval/2/64", {}, "humaneval:HumanEval/2"),
    ("fidelity", "mmlu:a/test/1/5/64", {"subject": "law"}, "mmlu:law"),
    ("fidelity", "emerson_essays/2000/64/9475/f16", {}, "emerson_essays/2000/64/9475"),
    ("gsm8k", "7", {}, "7"), ("commonsense_qa", "7", {}, "7"), ("niah", "7", {}, "7"), ("kv_retrieval", "7", {}, "7")])
def test_the_unit_of_an_answer(name, item, tags, unit):
    assert tasks.unit(name, item, tags) == unit


def units(name: str, items: list) -> list[str]:
    return [tasks.unit(name, item.id, item.tags) for item in items]


@pytest.mark.parametrize("name, one, other", [
    ("gsm8k", {"shots": 1}, {"shots": 4, "exemplars": "train", "order": 2}),
    ("commonsense_qa", {}, {"exemplars": "cot"}), ("mmlu", {}, {"shots": 2}),
    ("niah", {"length": 200}, {"length": 300}),
    ("kv_retrieval", {"pairs": 20}, {"pairs": 12}), ("longbench", {}, {"length": 20}),
    ("longgenbench", {}, {"shots": 2, "order": 1}), ("longgenbench_mmlu", {}, {"questions": 2}),
    ("fidelity", {"of": "gsm8k", "shots": 1}, {"of": "gsm8k", "shots": 2, "tokens": 9, "reference": "f16"})])
def test_a_setting_changes_ids_and_no_unit(name, one, other, folder):  # noqa: F811
    first, second = load(name, folder, **one), load(name, folder, **other)
    assert {item.id for item in first}.isdisjoint(item.id for item in second)
    assert units(name, first) == units(name, second)


@pytest.mark.parametrize("name", TASKS)
def test_items_of_one_context_are_one_unit_and_others_are_not(name, folder):  # noqa: F811
    """gsm8k and commonsense_qa ask all questions after the same examples: there the question is the unit."""
    items = load(name, folder)
    found, contexts = units(name, items), [item.whole for item in items]
    if name in ("niah", "mmlu", "kv_retrieval"):
        assert 1 < len(set(found)) < len(items)
        assert len(set(zip(found, contexts))) == len(set(found)) == len(set(contexts))
    elif name == "longbench":
        assert len(items) == 5 and len(set(found)) == 1  # one text in five sets
    else:
        assert len(set(found)) == len(items)


def test_unknown_tasks_are_named():
    with pytest.raises(ValueError, match="unknown task 'chess': valid are niah, gsm8k"):
        tasks.unit("chess", "1", {})


@pytest.mark.parametrize("study, protocol, value, expected", [
    ("1-sensitivity", "question-in", "score", {"streaming_llm": (66, 3.8, -0.7, 8.3),
                                               "pyramidkv": (66, -4.7, -8.3, -1.1)}),
    ("1-sensitivity", "question-out", "score", {"pyramidkv": (66, -4.9, -9.6, -0.2)}),
    ("2-shots", "question-out", "kl", {"streaming_llm": (4, 0.019, None, None), "pyramidkv": (4, 0.009, None, None)}),
    ("3-many-shot", "question-out", "kl", {"streaming_llm": (4, 0.027, None, None),
                                           "random_shot": (4, 0.045, None, None)})])
def test_old_archives_are_read_by_question(study, protocol, value, expected):
    """As docs/results.md has them."""
    rows = [one for one in report.scored(RESULTS/study) if one["protocol"] == protocol]
    lines = {line["policy"]: line for line in pool.pool(rows, ["policy"], "snapkv", value)}
    scale, places = (100, 0.05) if value == "score" else (1, 0.0005)
    for policy, (n, *figures) in expected.items():
        line = lines[policy]
        assert line["n_units"] == n < line["n_answers"]
        found = [line[name] and scale*line[name] for name in ("difference", "difference_low", "difference_high")]
        assert found == pytest.approx(figures, abs=places + 1e-9)  # of four questions, KL has no interval


CLAIMS = [  # of docs: study, columns, against, comparisons, of which rows, and which of them exclude 0 when corrected
    ("1-sensitivity", ["settings", "budget"], "full", 28, {"task": "humaneval", "protocol": "question-out"},
     {"0.2", "0.1"}),
    ("1-sensitivity", ["settings", "budget"], "full", 28, {"task": "humaneval", "protocol": "question-in"},
     {"0.3", "0.2", "0.1"}),
    ("1-sensitivity", ["settings", "budget"], "full", 28,
     {"task": "commonsense_qa", "settings": "exemplars cot", "protocol": "question-in"}, {"0.3", "0.2", "0.1"}),
    ("1-sensitivity", ["set", "budget"], "full",
     28, {"task": "safety", "set": "jbb_harmful", "protocol": "question-out"}, set()),
    ("1-sensitivity", ["task", "policy"], "snapkv", 10, {"task": "humaneval", "protocol": "question-in"}, {"h2o"}),
    ("1-sensitivity", ["task", "policy"], "snapkv", 10, {"task": "humaneval", "protocol": "question-out"}, set()),
    ("1-sensitivity", ["policy"], "snapkv", 5, {"protocol": "question-in"}, set()),
    ("1-sensitivity", ["policy"], "snapkv", 5, {"protocol": "question-out"}, set()),
    ("4-long-generation", ["policy", "decode_budget", "budget"], "full", 15,
     {"task": "longgenbench", "settings": "questions 5"}, set()),
    ("9-ruler", ["budget", "policy"], "keydiff", 43, {"settings": "", "budget": ("0.5", "0.25", "0.125"), "policy": (
        "keydiff", "tova", "streaming_llm", "chunkkv", "knorm", "snapkv", "pyramidkv", "random")},
     {"tova", "streaming_llm", "chunkkv", "knorm", "snapkv", "pyramidkv", "random"}),
    ("needles/end", ["policy"], "finch", 12, {},
     {"keydiff", "snapkv", "expected_attention", "adakv", "shotkv", "kvzip"}),
    ("needles/bound", ["policy"], "finch", 12, {}, {"snapkv", "expected_attention", "adakv", "shotkv", "kvzip"})]


@pytest.mark.parametrize("study, by, against, n, wanted, found", CLAIMS)
def test_what_the_pages_claim_excludes_0_when_corrected(study, by, against, n, wanted, found):
    def fits(row: dict) -> bool:
        named = {**row, "policy": row["policy"].partition(":")[0]}
        return all(named[name] in value if isinstance(value, tuple) else named[name] == value
                   for name, value in wanted.items())
    rows = [row for row in report.scored(RESULTS/study) if row["policy"] == "full" or fits(row)]  # full is no line
    lines = pool.pool(rows, by, against, n_comparisons=n)
    exclude = [line[by[-1]] for line in lines if pool.excludes_0(line)]
    assert set(exclude) == found
    if study == "9-ruler":
        assert len(exclude) == len(lines) == 21


def test_old_needles_are_read_by_text():
    table = report.table(report.scored(RESULTS/"needles"/"bound"))
    (finch,) = [line for line in table if line["policy"].startswith("finch")]
    low, high = stats.wilson(10, 12)
    assert (finch["n"], finch["n_units"]) == (12, 4) and finch["score"] == pytest.approx(10/12)
    assert finch["score_high"] - finch["score_low"] > 0.5 > high - low  # not as if there were 12 texts


def test_the_readme_s_needles():
    """The command of docs/evals.md#data, in a clone without a data folder of ours."""
    full, keydiff = report.table(report.scored(RESULTS/"needles"/"readme"))
    assert (full["n"], full["n_units"], full["score"]) == (keydiff["n"], keydiff["n_units"], 1) == (60, 20, 1)
    said = f"{100*keydiff['score']:.0f} % ({100*keydiff['score_low']:.0f} to {100*keydiff['score_high']:.0f})"
    text = (RESULTS.parent.parent/"README.md").read_text(encoding="utf-8")
    assert f'("needles") the whole cache finds all, and that quarter finds {said}' in text
