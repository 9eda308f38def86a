"""Text -> character spans -> token spans. No model."""
import pytest

from pykvc.spans import (check_spans, message_spans, piece_spans, regex_spans, segment_spans, sentence_spans, separator_spans,
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


# -- messages -----------------------------------------------------------------------------------------------------

CHAT = [{"role": role, "content": content} for role, content in
        (("system", "Be brief."), ("user", "one"), ("assistant", "1"), ("user", "two"))]


def chatml(messages):
    return "".join(f"<{m['role']}>{m['content']}</>" for m in messages)


def test_messages_are_spans_but_for_system_and_the_last():
    assert cut(chatml(CHAT), message_spans(CHAT, chatml)) == ["<user>one</>", "<assistant>1</>"]


def test_messages_of_a_template_that_is_no_prefix_of_itself():
    def counted(messages):
        return f"[{len(messages)}]" + chatml(messages)
    assert cut(counted(CHAT), message_spans(CHAT, counted)) == ["one", "1"]


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
