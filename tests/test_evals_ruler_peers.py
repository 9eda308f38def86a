"""RULER as lm-evaluation-harness has it, which follows NVIDIA's: the same words in the prompts, the same scores.

Its modules are imported with stand-ins for what they do not need here: a tokenizer, and a splitter of sentences that
has to be downloaded.
"""
import importlib
import random
import re
import sys
from collections import Counter
from types import SimpleNamespace

import lm_eval  # noqa: F401  (it has to be there)
import numpy as np
import pytest
from scipy.special import zeta

from evals.items import Item, Options
from evals.tasks import ruler
from evals.tasks.ruler.needles import NAMES, NEEDLE, NOISE
from pykvc.prose import prose
from test_evals_ruler import UUID, paragraph, write


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


@pytest.fixture(autouse=True)
def seeds():
    """They draw from the global generators."""
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Our first item of a set, 1,000 words long."""
    root = tmp_path_factory.mktemp("data")
    (root/"niah"/"haystack").mkdir(parents=True)
    (root/"niah"/"haystack"/"text.txt").write_text(prose(400))
    write(root/"squad"/"validation.jsonl", [paragraph(i) for i in range(40)])

    def of(name: str) -> Item:
        settings = {**ruler.SETTINGS, "sets": name, "length": 1000}
        return ruler.load(Options(lambda text: len(text.split()), root, 1, 0, True, settings))[0]
    return of


def tokens(text: str) -> SimpleNamespace:
    return SimpleNamespace(input_ids=text.split())


def blank(text: str) -> str:
    """Without what is drawn: keys, numbers, variables. A word that they and NVIDIA spell wrong is spelled as here."""
    text = UUID.sub("UUID", text.replace("assgined", "assigned"))
    text = re.sub(r"for \S.*? (is:|mentioned)", r"for KEY \1", text)
    return re.sub(r"\b[A-Z]{5}\b", "VARIABLE", re.sub(r"\d+", "0", text))


@pytest.mark.parametrize("name", NAMES)
def test_needle_prompts(theirs, ours, name):
    kind, item = NAMES[name], ours(name)
    haystacks = {"repeat": NOISE, "needle": NEEDLE.replace("{kind}", "{type_needle_v}"), "essay": prose(400).split()}
    [sample] = theirs("prepare_niah").generate_samples(
        haystacks[kind.haystack], tokens, max_seq_length=1000, type_haystack=kind.haystack, num_samples=1,
        type_needle_k=kind.keys, type_needle_v=kind.values, num_needle_k=kind.n_keys, num_needle_v=kind.n_values,
        num_needle_q=kind.n_asked, template=theirs("niah_utils").TEMPLATE)
    opening, *lines, question = sample["input"].split("\n")
    assert item.context.startswith(opening + "\n") and item.context.endswith("\n")
    assert blank(item.query) == blank(question) and blank(item.cue) == blank(sample["gen_prefix"])
    assert [len(value) for value in item.gold] == [len(value) for value in sample["outputs"]]
    if kind.haystack == "essay":
        assert item.context.count("One of the special magic ") == sample["input"].count("One of the special magic ")
    else:
        assert {blank(line) for line in item.context.splitlines()[1:]} == {blank(line) for line in lines}


def test_vt_prompts(theirs, ours):
    module, item = theirs("vt_utils"), ours("vt")
    text, names = module.generate_input_output(60, 1, 4)
    opening, haystack, rest = re.fullmatch(r"(.*?\n\n)(.*\n)\n(Question.*)", text, re.DOTALL).groups()
    example, _, body = item.context.rpartition(opening)
    chain = re.compile(r"VAR \w+ = VAR \w+  |VAR \w+ = 0 ")
    assert chain.findall(blank(body)) == chain.findall(blank(haystack)) and len(names) == len(item.gold) == 5
    assert set(chain.sub("", blank(body)).split("\n")) == set(chain.sub("", blank(haystack)).split("\n"))
    assert blank(item.question) == blank(rest).strip()
    shown, names = module.generate_input_output(10, 1, 4, is_icl=True)
    assert example.startswith(opening) and len(names) == len(re.findall(r"VAR ([A-Z]{3}) = ", example)) == 5
    assert re.sub("[A-Z]{3}", "", blank(shown).split("Question")[1]).strip() in blank(example)


def times(text: str) -> Counter:
    """Of the words of a numbered list."""
    return Counter(re.findall(r"\d+\. (\D+?)(?= \d+\.|\s*$)", text))


def test_cwe_prompts(theirs, ours):
    item = ours("cwe")
    example, text, answer = theirs("cwe_utils").generate_input_output(100, 1000)
    opening, numbers, question = text.split("\n")
    _, shown, answered, again, body, end = item.context.split("\n")
    assert item.context.startswith(opening + "\n") and again == opening and end == "" and item.question == question
    assert set(times(body).values()) == set(times(numbers).values()) == {6, 1} and len(answer) == len(item.gold)
    assert Counter(times(shown).values()) == Counter(times(example.split("\n")[1]).values()) == {3: 10, 1: 10}
    without_words = re.compile(r"(?<=\. )\D+?(?= \d|$)")
    assert without_words.sub("", answered) == without_words.sub("", example.split("\n")[2])


def test_fwe_prompts(theirs, ours):
    item = ours("fwe")
    text, answer, _ = theirs("fwe_utils").generate_input_output(1000, tokens, num_words=400, vocab_size=20)
    opening = text[:text.index("coded words. ") + len("coded words. ")]
    assert item.context.startswith(opening) and text.endswith("\n" + item.question) and len(answer) == len(item.gold)
    counted = sorted(Counter(item.context.removeprefix(opening).split()).values(), reverse=True)
    expected = [[int(n*k**-2.0/zeta(2.0)) for k in range(1, 21)] for n in range(100, 2000)]
    assert counted in [[n for n in one if n] for one in expected]


def test_qa_prompts(theirs, ours):
    item, module = ours("qa_1"), theirs("qa_utils")
    docs = re.findall(r"Document \d+:\n(.*?)\n\n(?=Document|$)", item.context, re.DOTALL)
    question = {"query": item.query.rpartition("Question: ")[2], "outputs": item.gold, "context": [0]}
    text, _ = module.generate_input_output(0, len(docs), [question], docs)
    opening = text[:text.index("Document 1:")]
    assert item.context.startswith(opening) and text.endswith("\n\n" + item.query)
    assert item.cue == module.CONFIG["answer_prefix"]

    def shuffled(context: str) -> list[str]:
        return sorted(re.split(r"Document \d+:", context.removeprefix(opening)))
    assert shuffled(item.context) == shuffled(text.removesuffix(item.query))


def test_scores(theirs):
    """Of qa with one reference, where both take the same: theirs has the share of them, NVIDIA's and ours any."""
    module, rng = theirs("common_utils"), random.Random(0)
    for _ in range(300):
        gold = [str(rng.randint(10, 40)) for _ in range(rng.randint(1, 5))]
        answer = rng.choice(["\t", ""]) + " and\x02 ".join(str(rng.randint(10, 40)) for _ in range(rng.randint(0, 8)))
        said = module.postprocess_pred([answer])
        vt, one, several = (Item("", "", of, tags={"set": name})
                            for name, of in (("vt", gold), ("qa_1", gold[:1]), ("qa_2", gold)))
        assert ruler.score(vt, answer) == module.string_match_all(said, [gold])
        assert ruler.score(one, answer) == module.string_match_part(said, [gold[:1]])
        assert ruler.score(several, answer) == max(module.string_match_part(said, [[text]]) for text in gold)
