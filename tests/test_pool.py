"""Intervals over units: what they are, that tables count a question once, and how often they hold the true value."""
import json
from typing import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from scipy.stats import binomtest, norm, t
from typer.testing import CliRunner

from evals import attention_report, panels, pool, report, stats
from evals.cli import app
from test_evals import row

# -- intervals ---------------------------------------------------------------------------------------------------------

SCORES = some.lists(some.one_of(some.sampled_from([0.0, 0.5, 1.0]), some.floats(0, 1)), min_size=1, max_size=30)


def test_unit_means():
    assert stats.unit_means([1, 0, 1, 1], ["a", "b", "a", "b"]) == [1, 0.5]
    with pytest.raises(ValueError):
        stats.unit_means([1, 0], ["a"])


@pytest.mark.parametrize("n_right, n", [(0, 1), (0, 9), (3, 9), (9, 9), (17, 60)])
def test_wilson_is_scipy_s(n_right, n):
    known = binomtest(n_right, n).proportion_ci(method="wilson")
    assert stats.wilson(n_right, n) == pytest.approx((known.low, known.high), abs=1e-6)


@pytest.mark.parametrize("values", [(0.1, 0.2, 0.4), (1.0, 5.0), (0.01, 0.3, 0.2, 0.2, 0.7)])
def test_a_figure_s_interval_is_student_s(values):
    known = t.interval(0.95, len(values) - 1, np.mean(values), np.std(values, ddof=1)/len(values)**0.5)
    assert stats.figure_interval(values) == pytest.approx((max(0, known[0]), known[1]))
    shifted = [value + 1 for value in values]
    assert stats.figure_difference(values, [0]*len(values)) == pytest.approx((np.mean(values), *known))
    assert stats.figure_difference(shifted, [1]*len(values)) == pytest.approx((np.mean(values), *known))
    tenths = np.mean(values)/10, max(-1, known[0]/10), min(1, known[1]/10)
    assert stats.paired_difference([value/10 for value in values], [0]*len(values)) == pytest.approx(tenths)


def test_a_mean_s_interval_is_wilson_s_of_as_many_units_as_vary_so():
    """The score interval of Wilson is where |p - mean| = t*sqrt(p(1 - p)/n), here n = 0.24/(0.01/3) = 72."""
    low, high = stats.mean_interval([0.5, 0.6, 0.7])
    for p in (low, high):
        assert abs(p - 0.6) == pytest.approx(4.302653*(p*(1 - p)/72)**0.5, rel=1e-6)
    assert low < 0.6 < high


@pytest.mark.parametrize("n", [2, 4, 20])
def test_equal_values_are_not_certain(n):
    others = binomtest(0, n).proportion_ci(method="wilson").high  # of units that may be other ones
    assert stats.mean_interval([0.25]*n) == pytest.approx((0.25 - 0.25*others, 0.25 + 0.75*others), abs=1e-6)
    assert stats.mean_interval([1]*n) == pytest.approx((1 - others, 1), abs=1e-6)
    fifth = 0.2, 0.2 - 1.2*others, 0.2 + 0.8*others
    assert stats.paired_difference([0.3]*n, [0.1]*n) == pytest.approx(fifth, abs=1e-6)
    tenths = [0.1*(i % 3) for i in range(n)]  # differences are equal but for rounding
    tenth = 0.1, 0.1 - 1.1*others, 0.1 + 0.9*others
    assert stats.paired_difference([value + 0.1 for value in tenths], tenths) == pytest.approx(tenth, abs=1e-6)
    assert stats.figure_interval([0.2]*n) is None  # how far a KL may lie has no end
    assert stats.figure_difference([0.3]*n, [0.1]*n) == (pytest.approx(0.2), None, None)


def test_one_unit_says_nothing():
    assert stats.mean_interval([0.5]) == (0, 1) and stats.paired_difference([0.5], [0.25]) == (0.25, -1, 1)
    assert stats.figure_interval([0.5]) is None and stats.figure_difference([0.5], [0.25]) == (0.25, None, None)


@given(SCORES, SCORES)
def test_intervals_hold_their_mean_and_stay_where_scores_are(a, b):
    n = min(len(a), len(b))
    low, high = stats.mean_interval(a)
    assert -1e-9 <= low <= np.mean(a) + 1e-9 and np.mean(a) - 1e-9 <= high <= 1 + 1e-9
    difference, low, high = stats.paired_difference(a[:n], b[:n])
    assert -1 - 1e-9 <= low <= difference + 1e-9 and difference - 1e-9 <= high <= 1 + 1e-9 and low < high
    assert stats.paired_difference(b[:n], a[:n]) == pytest.approx((-difference, -high, -low), abs=1e-9)


@pytest.mark.parametrize("scores", [[], [0.5, 1.5], [50, 100], [-0.1, 1]])
def test_other_figures_are_no_scores(scores):
    with pytest.raises(ValueError, match=r"no score|\[0, 1\]"):
        stats.mean_interval(scores)
    with pytest.raises(ValueError, match=r"no score|\[0, 1\]"):
        stats.paired_difference(scores, scores)


# -- pooled, and in a report -------------------------------------------------------------------------------------------

def asked(question: int, shots: int, policy: str, score: float, budget: str = "100") -> dict:
    return {**row(question, policy, score, "" if policy == "full" else budget), "task": "gsm8k",
            "item": f"q{question}/{shots}-cot", "settings": f"shots {shots}"}


def test_a_question_is_counted_once_whatever_is_asked_around_it():
    """Another number of shots, protocol, cache type or model: the same answers once more, and the same interval."""
    rng = np.random.default_rng(3)
    once = [asked(q, 8, policy, float(rng.integers(2))) for q in range(12) for policy in ("full", "snapkv", "h2o")]
    more = [{**one, **other} for one in once for other in (
        {"item": one["item"].replace("8-", "1-"), "settings": "shots 1"}, {"protocol": "question-in"},
        {"type_k": "q8_0"}, {"model": "n"})]
    (alone,), (together,) = pool.pool(once, ["task"]), pool.pool(once + more, ["task"])
    assert (alone["n_units"], alone["n_answers"], together["n_units"], together["n_answers"]) == (12, 24, 12, 120)
    for name in ("score", "reference", "difference", "difference_low", "difference_high"):
        assert together[name] == pytest.approx(alone[name])


def test_the_table_counts_a_text_once(tmp_path):
    """Three needles in each of four texts, found or not together: four units."""
    scores = {"full": (1, 1, 1, 1), "snapkv": (1, 0, 0, 0)}
    rows = [{**row(0, policy, score, "100"*(policy != "full")), "item": f"text/8000/{i}/needle-{j}@{10*j}"}
            for j in range(3) for policy in scores for i, score in enumerate(scores[policy])]
    full, snapkv = report.table(rows)
    assert (snapkv["n"], snapkv["n_units"], snapkv["n_paired"]) == (12, 4, 12)
    assert (full["score_low"], full["score_high"]) == stats.wilson(4, 4)
    assert (snapkv["score_low"], snapkv["score_high"]) == stats.wilson(1, 4)
    found = snapkv["difference"], snapkv["difference_low"], snapkv["difference_high"]
    assert found == stats.paired_difference([1, 0, 0, 0], [1]*4)
    text = report.markdown([full, snapkv])
    assert "| n | units | score |" in text and "| 12 | 4 | 25.0 % |" in text
    assert "units" not in report.markdown(report.table([row(i, "full", 1) for i in range(3)]))  # where it is n


def divergence(policy: str, values: list[float], budget: str = "100") -> list[dict]:
    return [{**row(i, policy, 0.5, "" if policy == "full" else budget), "task": "fidelity",
             "item": f"gsm8k:q{i}/8-cot/64", "answer": json.dumps({"kl": [kl], "same": [1]})}
            for i, kl in enumerate(values)]


def test_equal_figures_have_no_interval(tmp_path):
    rows = [*divergence("full", [0, 0, 0]), *divergence("h2o", [0.2, 0.2, 0.2]), *divergence("tova", [0.1, 0.2, 0.3]),
            *divergence("h2o", [0.1, 0.2, 0.2], "50")]
    lines = pool.pool(rows, ["policy", "budget"], value="kl")
    text = pool.markdown(lines, ["policy", "budget"], "full", value="kl")
    assert "| `h2o` | 100 | 3 | 3 | 0.200 | 0.000 | +0.200 | n/a |" in text and "2 comparisons at 95 % each" in text
    assert "| 0.200 (n/a) |" in pool.markdown(lines, ["policy", "budget"], "full", "budget", "kl")
    table = report.table(rows)
    assert ["kl_low" in line for line in table] == [False, False, True, True]
    [path] = panels.draw(tmp_path, [{"x": "n_kept", "y": "kl"}], table)  # a point without an interval beside others
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_table_of_many_comparisons_says_so(tmp_path):
    lines = [asked(q, 8, policy, float((q + i) % 2), budget) for q in range(6) for i, (policy, budget) in enumerate(
        [("full", ""), *((policy, budget) for policy in ("snapkv", "h2o") for budget in ("50", "100"))])]
    saved = [{**line, "answer": "x", "gold": "x", "settings": {"shots": 8}} for line in lines]
    (tmp_path/"m.answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in saved))
    said = [CliRunner().invoke(app, ["pool", "--out", str(tmp_path), *args]).stdout for args in (
        ["--by", "policy,budget"], ["--by", "policy,budget", "--across", "budget"], ["--by", "policy"],
        ["--by", "task"])]
    sentence = "4 comparisons at 95 % each: if nothing differed, about 0.2 of them would exclude 0 by chance."
    assert sentence in said[0] and sentence in said[1]
    assert "2 comparisons" in said[2] and "comparison" not in said[3] and "units" in said[3]


def test_attention_counts_a_text_once():
    def looked_at(task: str, item: str, value: float) -> dict:
        return {"model": "m", "task": task, "settings": {}, "item": item, "tags": {}, "n_tokens": 9,
                "mass": {"question": value}, "mass_bare": {"question": value},
                **dict.fromkeys(("sinks", "entropy", "entropy_bare", "tokens_90", "tokens_90_bare"), value),
                "kept": {"snapkv 0.25": {"question": 1.0 + 1e-7}}}
    shared, apart = attention_report.lines([
        looked_at("niah", "text/1500/0/needle-1@0", 0.2), looked_at("niah", "text/1500/0/needle-2@50", 0.4),
        looked_at("gsm8k", "q0/8-cot", 0.2), looked_at("gsm8k", "q1/8-cot", 0.4)])
    assert (shared["n"], shared["sinks_low"], shared["sinks_high"]) == (2, None, None)
    assert shared["sinks"] == pytest.approx(0.3) == apart["sinks"]
    assert (apart["sinks_low"], apart["sinks_high"]) == pytest.approx(stats.mean_interval([0.2, 0.4]))
    assert apart["kept snapkv 0.25 question_low"] == pytest.approx(stats.wilson(2, 2)[0])  # all in both is not certain


# -- do they hold what they promise? -----------------------------------------------------------------------------------

N_ANSWERS, N_DRAWS, N_WRONG = 6, 1500, 300
CONDITIONS = [(kind, n) for kind in ("binary", "fractional") for n in (8, 20, 60)]


def drawn(rng: np.random.Generator, kind: str, n: int, mean: float, easy: np.ndarray) -> np.ndarray:
    """[n, N_ANSWERS] scores of that mean. easy [n, 1]: a question is as easy for all its answers, so the normal
    variables behind them are correlated, 0.6. binary: does one lie below a threshold? fractional: a soft threshold."""
    x = easy*0.6**0.5 + rng.normal(size=(n, N_ANSWERS))*0.4**0.5
    return (x < norm.ppf(mean)).astype(float) if kind == "binary" else norm.cdf((norm.ppf(mean)*1.5**0.5 - x)/0.5**0.5)


def coverage(n: int, interval: Callable, true: float, draw: Callable) -> tuple[float, float]:
    """The share of intervals that hold the true value: over questions, and over answers as if each were a question."""
    questions, held = np.repeat(np.arange(n), N_ANSWERS).tolist(), [0, 0]
    for k in range(N_DRAWS):
        scores = [one.ravel().tolist() for one in draw()]
        for i, values in enumerate([[stats.unit_means(one, questions) for one in scores], scores][:1 + (k < N_WRONG)]):
            *_, low, high = interval(*values)
            held[i] += low <= true <= high
    return held[0]/N_DRAWS, held[1]/N_WRONG


@pytest.mark.parametrize("kind, n", CONDITIONS)
def test_simulated_scores(kind, n):
    """Simulated: the true mean is in 94.3 to 96.3 % of the intervals over questions, in 65 to 78 % of those over
    answers."""
    rng = np.random.default_rng(1000 + n)
    for mean in (0.3, 0.6):
        def draw() -> list[np.ndarray]:
            return [drawn(rng, kind, n, mean, rng.normal(size=(n, 1)))]
        right, wrong = coverage(n, stats.mean_interval, mean, draw)
        print(f"scores, {kind}, {n} questions, mean {mean}: {right:.1%} over questions, {wrong:.1%} over answers")
        assert 0.92 <= right <= 0.98 and wrong < 0.85


@pytest.mark.parametrize("kind, n", CONDITIONS)
def test_simulated_paired_differences(kind, n):
    """The whole cache answers a question once, and all answers of policies are compared with that, as in pool().
    Simulated: the true difference is in 93.8 to 95.4 % of the intervals over questions, in 66 to 75 % of those over
    answers."""
    rng = np.random.default_rng(2000 + n)

    def draw(ours: float, full: float) -> list[np.ndarray]:
        easy = rng.normal(size=(n, 1))
        return [drawn(rng, kind, n, ours, easy), np.repeat(drawn(rng, kind, n, full, easy)[:, :1], N_ANSWERS, axis=1)]
    for ours, full in ((0.5, 0.5), (0.4, 0.6)):
        right, wrong = coverage(n, stats.paired_difference, ours - full, lambda: draw(ours, full))
        print(f"differences, {kind}, {n} questions, {ours}, {full}: {right:.1%} over questions, {wrong:.1%} answers")
        assert 0.92 <= right <= 0.98 and wrong < 0.85
