"""RULER as lm-evaluation-harness has it, which follows NVIDIA's: the same words in the prompts, the same needles, the same scores.

Its modules are imported with stand-ins for what they do not need here: a tokenizer, and a splitter of sentences that is downloaded.
"""
import importlib
import random
import re
import sys
from collections import Counter
from types import SimpleNamespace

import lm_eval  # noqa: F401  (it has to be there)
import pytest
from scipy.special import zeta

from evals.items import Item, Options
from evals.tasks import ruler
from evals.tasks.ruler import needles
from pykvc.prose import prose
from test_evals_ruler import write

NOISE = needles.NOISE


@pytest.fixture(scope="module")
def theirs():
    """Their module of a name."""
    def sentences(text: str) -> list[str]:
        return re.split(r"(?<=[.!?]) ", text)
    stand_ins = {"transformers": SimpleNamespace(AutoTokenizer=None),
                 "nltk": SimpleNamespace(data=SimpleNamespace(find=lambda name: name), sent_tokenize=sentences)}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stand_ins.items():
            patch.setitem(sys.modules, name, module)
        yield lambda name: importlib.import_module(f"lm_eval.tasks.ruler.{name}")
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ruler")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Our first item of a set, lengths in words."""
    root = tmp_path_factory.mktemp("data")
    (root/"niah"/"haystack").mkdir(parents=True)
    (root/"niah"/"haystack"/"text.txt").write_text(prose(400))
    write(root/"squad"/"validation.jsonl", [{"title": "a", "context": f"{prose(4, seed=i)}It was {i}.", "question": "What was it?", "answers": {"text": [str(i)]}}
                                            for i in range(40)])
    return lambda name, length=1000: ruler.load(Options(lambda text: len(text.split()), root, 1, 0, True,
                                                        {**ruler.SETTINGS, "sets": name, "length": length}))[0]


def tokens(text: str) -> SimpleNamespace:
    return SimpleNamespace(input_ids=text.split())


def blank(text: str) -> str:
    """Without what is drawn: keys, numbers, variables. Theirs has one word spelled wrong, as NVIDIA's has; ours has not."""
    text = re.sub("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID", text)
    text = re.sub(r"for \S.*? (is:|mentioned)", r"for KEY \1", text.replace("assgined", "assigned"))
    return re.sub(r"\b[A-Z]{5}\b", "VARIABLE", re.sub(r"\d+", "0", text))


@pytest.mark.parametrize("name, haystack", [(name, kind.haystack) for name, kind in needles.NAMES.items()])
def test_needle_prompts(theirs, ours, name, haystack):
    kind, item = needles.NAMES[name], ours(name)
    texts = {"repeat": NOISE, "needle": needles.NEEDLE.replace("{kind}", "{type_needle_v}"), "essay": prose(400).split()}
    [sample] = theirs("prepare_niah").generate_samples(
        texts[haystack], tokens, max_seq_length=1000, type_haystack=haystack, type_needle_k=kind.keys, type_needle_v=kind.values, num_needle_k=kind.n_keys,
        num_needle_v=kind.n_values, num_needle_q=kind.n_asked, template=theirs("niah_utils").TEMPLATE, num_samples=1)
    first, *_, last = sample["input"].split("\n")
    assert item.context.startswith(first + "\n") and blank(item.query) == blank(last) and blank(item.cue) == blank(sample["gen_prefix"])
    assert item.context.endswith("\n") and len(item.gold) == len(sample["outputs"]) and len(item.gold[0]) == len(sample["outputs"][0])

    def n_needles(text: str) -> int:
        return text.count("One of the special magic ")
    assert n_needles(item.context) == n_needles(sample["input"]) if haystack != "needle" else abs(n_needles(item.context) - n_needles(sample["input"])) < 25
    if haystack != "essay":
        assert {blank(line) for line in item.context.split("\n")[1:]} == {blank(line) for line in sample["input"].split("\n")[1:-1]} | {""}


def test_vt_prompts(theirs, ours):
    item = ours("vt")
    text, names = theirs("vt_utils").generate_input_output(60, 1, 4)
    opening, haystack, rest = re.fullmatch(r"(.*?\n\n)(.*\n)\n(Question.*)", text, re.DOTALL).groups()
    body = item.context[item.context.rindex(opening):].removeprefix(opening)
    assert Counter(blank(haystack).replace("VAR VARIABLE = 0", "").split("\n")).keys() >= {NOISE, " " + NOISE, ""}
    assert re.findall(r"VAR \w+ = VAR \w+  |VAR \w+ = 0 ", blank(haystack)) == re.findall(r"VAR \w+ = VAR \w+  |VAR \w+ = 0 ", blank(body))
    assert len(names) == len(item.gold) and blank(rest).strip() == blank(item.question)
    shown, shown_names = theirs("vt_utils").generate_input_output(10, 1, 4, is_icl=True)
    example = item.context[:item.context.rindex(opening)]
    assert example.startswith(opening) and len(shown_names[0]) == 3 and blank(shown).split("Question")[1].strip() in blank(example)


def test_cwe_prompts(theirs, ours):
    item = ours("cwe")
    example, text, answer = theirs("cwe_utils").generate_input_output(100, 1000)
    opening = text[:text.index("\n") + 1]
    body, (shown, _) = item.context[item.context.rindex(opening):].removeprefix(opening), item.context.split("\nQuestion")
    assert text.endswith("\n" + item.question) and item.context.startswith(opening) and len(answer) == len(item.gold)
    assert set(times(body).values()) == set(times(text.split("\n")[1]).values()) == {6, 1}
    assert Counter(times(shown.split("\n")[1]).values()) == Counter(times(example.split("\n")[1]).values()) == {3: 10, 1: 10}
    assert re.sub(r"\d+\. \D+?(?= \d|$)", "", example.split("list are:")[1]) == re.sub(r"\d+\. \D+?(?= \d|$)", "", item.context.split("list are:")[1].split("\n")[0])


def times(text: str) -> Counter:
    return Counter(re.findall(r"\d+\. (\D+?)(?= \d+\.|\s*$)", text))


def test_fwe_prompts(theirs, ours):
    item = ours("fwe")
    text, answer, _ = theirs("fwe_utils").generate_input_output(1000, tokens, num_words=400, vocab_size=20)
    opening = text[:text.index("coded words. ") + len("coded words. ")]
    assert item.context.startswith(opening) and text.endswith("\n" + item.question) and len(answer) == len(item.gold)
    counted = sorted(Counter(item.context.removeprefix(opening).split()).values(), reverse=True)
    assert any(counted == [n for k in range(1, 21) if (n := int(n_words*k**-2.0/zeta(2.0)))] for n_words in range(100, 2000))


def test_qa_prompts(theirs, ours):
    item, module = ours("qa_1"), theirs("qa_utils")
    docs = re.findall(r"Document \d+:\n(.*?)\n\n", item.context, re.DOTALL)
    text, answers = module.generate_input_output(0, len(docs), [{"query": "What was it?", "outputs": item.gold, "context": [0]}], docs)
    opening = text[:text.index("Document 1:")]
    assert item.context.startswith(opening) and text.endswith("\n\n" + item.query) and item.cue == module.CONFIG["answer_prefix"] and answers == item.gold
    assert sorted(re.sub(r"Document \d+", "", text.removeprefix(opening).removesuffix(item.query)).split("\n\n")) == sorted(
        re.sub(r"Document \d+", "", item.context.removeprefix(opening)).split("\n\n"))


def test_scores(theirs):
    """Of one reference, too, for qa: theirs takes the share there, where NVIDIA's, as ours, takes any."""
    module, rng = theirs("common_utils"), random.Random(0)
    for _ in range(300):
        gold = [str(rng.randint(10, 40)) for _ in range(rng.randint(1, 5))]
        answer = rng.choice(["\t", ""]) + " and\x02 ".join(str(rng.randint(10, 40)) for _ in range(rng.randint(0, 8)))
        said = module.postprocess_pred([answer])
        assert ruler.score(Item("", "", gold, tags={"set": "vt"}), answer) == module.string_match_all(said, [gold])
        assert ruler.score(Item("", "", gold[:1], tags={"set": "qa_1"}), answer) == module.string_match_part(said, [gold[:1]])
        assert ruler.score(Item("", "", gold, tags={"set": "qa_2"}), answer) == max(module.string_match_part(said, [[one]]) for one in gold)
