"""Text -> character spans -> token spans."""
import re
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, strategies as st

import pykvc
from pykvc import _core, prompts
from pykvc.spans import (check_spans, piece_spans, regex_spans, segment_spans, sentence_spans, separator_spans,
                         token_lengths, token_spans)


def cut(text, spans):
    return [text[begin:end] for begin, end in spans]


def test_sentences_cover_the_text_and_carry_their_white_space():
    text = 'It rains. "Does it?" he said!  Yes\n\nA heading\n\nThe end'
    assert cut(text, sentence_spans(text)) == ["It rains. ", '"Does it?" ', "he said!  ", "Yes\n\n", "A heading\n\n", "The end"]


def test_sentences_of_other_scripts_and_none():
    assert cut("今日は。雨だ。", sentence_spans("今日は。雨だ。")) == ["今日は。", "雨だ。"]
    assert sentence_spans("Version 3.14 is out") == [(0, 19)]  # a point inside a number ends nothing
    assert sentence_spans("") == [] and sentence_spans(" \n") == []


# name -> a text's sentences, and what is left out: test_server.py has them, too
SENTENCES = {
    "abbreviations": ["Dr. ", "Smith paid approx. ", "3.50 (cash). ", '"Why?" ', "he asked... ", "Nobody knew!"],
    "line breaks": ["A heading\nin two lines\n\n", "One.\n", "Two\nand more.\r\n \t\n", "Three\n"],
    "no full stop": ["It rains. ", "And then"],
    "one sentence": ["x = a.b(1)\ny = [2, 3]"],
    "scripts": ["今日は。", "雨だ！\u3000", "そう？", "Ça va\xa0? ", "Oui… “Bien.” ", "Fini\xa0! ", "🙂 (Ok.)\u2003", "(Non.a)"],
    "white space": [],
    "empty": [],
}
TEXTS = {name: "".join(sentences) for name, sentences in SENTENCES.items()} | {"white space": " \n\n\t\n "}


@pytest.mark.parametrize("name", SENTENCES)
def test_sentences(name):
    assert cut(TEXTS[name], sentence_spans(TEXTS[name])) == SENTENCES[name]


SENTENCE_END = re.compile(r"[.!?。！？][\"'”’)\]]*(?:\s+|(?<=[。！？])|$)|\n\s*\n\s*")


@given(st.text(st.sampled_from("ab.!?。！”’\"') \n\r\x1f\x85\u2009\u3000é🙂\ud800\udc85"), max_size=30), st.text(st.sampled_from("a.\né🙂"), min_size=1, max_size=2))
def test_sentences_and_separators_by_regular_expression(text, separator):
    for spans, pattern in ((sentence_spans(text), SENTENCE_END), (separator_spans(text, separator), re.compile(re.escape(separator)))):
        cuts = [0, *(found.end() for found in pattern.finditer(text) if found.end() < len(text)), len(text)]
        assert spans == [(a, b) for a, b in zip(cuts, cuts[1:]) if text[a:b].strip()]


class Seen(pykvc.Policy):
    name, spans = "seen", True

    def score(self, layer):
        return layer.pos

    def budgets(self, request):
        self.found = request.spans
        return [request.budget]*len(request.layers)


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if text])
def test_the_engine_finds_the_same_sentences(model_path, name):
    """Where nobody gave it spans, as in other programs."""
    model, seen = _core.Model(str(model_path)), Seen()
    ids, spans = prompts.encode(model, True, TEXTS[name], None, None, "tokens", None, first=True)
    ctx = _core.Context(model, n_ctx=256, n_threads=2, policy=seen, budget="1")
    ctx.decode(np.array(ids, np.int32))
    assert ctx.evict() and seen.found == spans
    assert len(spans) == len(SENTENCES[name])


def test_separator_belongs_to_the_piece_before_it():
    assert cut("a\n\nb\n\n\n\nc", separator_spans("a\n\nb\n\n\n\nc", "\n\n")) == ["a\n\n", "b\n\n", "c"]
    assert separator_spans("abc", "|") == [(0, 3)]


def test_regex_marks_beginnings_and_leaves_the_head_out():
    text = "Answer briefly.\nQ: one\nA: 1\nQ: two\nA: 2"
    assert cut(text, regex_spans(text, "^Q: ")) == ["Q: one\nA: 1\n", "Q: two\nA: 2"]


@pytest.mark.parametrize("segment, pieces", [
    ("sentence", ["a. ", "b;c"]), ("sep:;", ["a. b;", "c"]), (";", ["a. b;", "c"]), ("re:[bc]", ["b;", "c"]), ("sep:sep:", ["a. b;c"]),
])
def test_segment(segment, pieces):
    assert cut("a. b;c", segment_spans("a. b;c", segment)) == pieces


@pytest.mark.parametrize("segment, says", [
    ("sentences", "is \"sentence\""), ("message", "chat"), ("re:(", "not a regular expression"), ("re:z", "matches nowhere"),
    ("sep:", "needs a separator"), ("", "not ''"), (3, "not 3"),
])
def test_bad_segment(segment, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        segment_spans("a. b;c", segment)


def test_pieces():
    assert piece_spans(["ab", "", "c"]) == [(0, 2), (2, 3)]
    with pytest.raises(ValueError, match="list of strings"):
        piece_spans(["ab", 3])


@pytest.mark.parametrize("spans, says", [
    ([(0, 2), (1, 3)], "overlaps"), ([(2, 2)], "empty"), ([(-1, 2)], "leaves"), ([(0, 11)], "has 10 tokens"), ([(0, 1, 2)], "pairs"), (3, "pairs"),
])
def test_bad_spans(spans, says):
    with pytest.raises(ValueError, match=says):
        check_spans(spans, 10)


def test_spans_are_sorted():
    assert check_spans([(4, 6), (0, 4)], 10) == [(0, 4), (4, 6)]


# -- tokens -------------------------------------------------------------------------------------------------------

def test_a_token_belongs_to_the_span_of_its_first_byte():
    text, pieces = "ab cd ef", [b"a", b"b c", b"d e", b"f"]
    lengths = token_lengths(text.encode(), pieces)
    assert lengths == [1, 3, 3, 1]
    assert token_spans(text, [(0, 3), (3, 6), (6, 8)], lengths) == [(0, 2), (2, 3), (3, 4)]


def test_a_span_in_which_no_token_begins_vanishes():
    assert token_spans("abcd", [(0, 1), (1, 2), (2, 4)], [3, 1]) == [(0, 1), (1, 2)]


def test_tokens_split_a_character():
    text = "é€!"  # 2 + 3 + 1 bytes
    assert token_spans(text, [(0, 1), (1, 2), (2, 3)], [1, 1, 2, 1, 1]) == [(0, 2), (2, 4), (4, 5)]


def test_added_tokens_are_in_no_span():
    lengths = token_lengths(b"Hi there", [b"<s>", b" Hi", b" there"])
    assert lengths == [0, 2, 6]
    assert token_spans("Hi there", [(0, 8)], lengths) == [(1, 3)]


def test_a_tokenizer_that_changes_the_text_is_refused():
    with pytest.raises(ValueError, match="give spans in tokens"):
        token_lengths("Ä".encode(), [b"a"])


def test_character_spans_are_checked():
    with pytest.raises(ValueError, match="characters"):
        token_spans("abc", [(0, 4)], [1, 1, 1])


def test_a_bos_is_in_no_span_whether_the_prompt_is_text_or_tokens():
    pieces = [b"<s>", b" Hi", b".", b" You", b" there"]
    model = SimpleNamespace(n_vocab=5, bos=0, add_bos=True, piece=lambda token, special: pieces[token], tokenize=lambda *_: [0, 1, 2, 3, 4])
    for text, tokens in (("Hi. You there", None), (None, [0, 1, 2, 3, 4])):
        assert prompts.encode(model, True, text, tokens, None, "tokens", None, first=True)[1] == [(1, 4), (4, 5)]
