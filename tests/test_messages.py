"""Where the messages of a chat are in its prompt, for templates of all kinds."""
from pykvc.messages import message_spans

CHAT = [{"role": role, "content": content} for role, content in
        (("system", "Be brief."), ("user", "one"), ("assistant", "1"), ("user", "two"))]
ALONE = CHAT[1:]


def chatml(messages):
    return "".join(f"<{m['role']}>{m['content']}</>" for m in messages)


def found(template, messages, begun="", eos=""):
    """The texts of the spans. begun: how an answer begins."""
    prompt = template(messages).removesuffix(eos) + begun
    return [prompt[begin:end] for begin, end in message_spans(prompt, messages, template, eos)]


def test_messages_are_spans_but_for_system_and_the_last():
    assert found(chatml, CHAT) == found(chatml, CHAT, begun="<assistant>") == ["<user>one</>", "<assistant>1</>"]
    assert found(chatml, CHAT[:2]) == found(chatml, CHAT[1:2]) == []


def test_a_template_that_is_no_prefix_of_itself():
    def counted(messages):
        return f"[{len(messages)}]" + chatml(messages)
    assert found(counted, CHAT) == ["<user>one</>", "<assistant>1</>"]


def test_a_template_that_ends_a_chat_with_eos():
    def ended(messages):
        return chatml(messages) + "<eos>"
    assert found(ended, CHAT, "<assistant>", "<eos>") == ["<user>one</>", "<assistant>1</>"]
    prompt = chatml(CHAT) + "<assistant>"
    unknown = message_spans(prompt, CHAT, ended)  # so that it is not known where a message ends
    assert [prompt[begin:end] for begin, end in unknown] == ["one", "1"]


def test_a_default_system_prompt_is_in_no_span():
    """Though it has the words of the first message in it."""
    def default(messages):
        return ("" if messages[0]["role"] == "system" else "<system>Answer one by one.</>") + chatml(messages)
    assert found(default, ALONE) == ["<user>one</>", "<assistant>1</>"]
    assert found(default, ALONE[:2]) == ["<user>one</>"]


def test_a_template_that_strips_refuses_and_merges():
    """As Gemma's and Llama 2's: a system prompt is part of the first turn, and no chat ends with it."""
    def merged(messages):
        if messages[-1]["role"] == "system":
            raise ValueError("no system prompt alone")
        system = messages[0]["content"] + "\n" if messages[0]["role"] == "system" else ""
        first, *rest = [{**m, "content": m["content"].strip()} for m in messages if m["role"] != "system"]
        return chatml([{**first, "content": system + first["content"]}, *rest])
    spaced = [{**m, "content": f"  {m['content']}\n"} for m in CHAT]
    assert found(merged, spaced) == ["one</>", "<assistant>1</>"]
    assert found(merged, spaced[1:]) == ["<user>one</>", "<assistant>1</>"]


def test_a_template_that_drops_thoughts_of_earlier_turns():
    def thoughtless(messages):
        return chatml([{**m, "content": m["content"].rpartition("</think>")[2].lstrip("\n")} for m in messages[:-1]]
                      + list(messages[-1:]))
    thought = {"role": "assistant", "content": "<think>\none?\n</think>\n\n1"}
    assert found(thoughtless, [CHAT[1], thought, CHAT[3]]) == ["<user>one</>", "<assistant>1</>"]


def test_a_template_that_takes_whole_chats_alone():
    """So there is no telling where its marks begin and end."""
    def whole(messages):
        if len(messages) < 4:
            raise ValueError("there is more to say")
        return chatml(messages)
    assert found(whole, CHAT) == ["one", "1"]


def test_a_template_that_puts_the_system_prompt_last():
    """As Mistral's."""
    def last(messages):
        system = "".join(m["content"] + "\n" for m in messages if m["role"] == "system")
        *before, end = [m for m in messages if m["role"] != "system"]
        return chatml([*before, {**end, "content": system + end["content"]}])
    assert found(last, CHAT) == ["<user>one</>", "<assistant>1</>"]


def test_messages_that_cannot_be_located_are_in_no_span():
    def shouted(messages):
        return f"[{len(messages)}]" + chatml(messages).upper()
    assert found(shouted, [CHAT[1], {"role": "assistant", "content": "ONE"}, CHAT[3]]) == ["<ASSISTANT>ONE</>"]

    def twice(messages):  # but the prompt goes on as it begins
        return chatml([m for m in messages for _ in range(2)])
    assert found(twice, CHAT) == ["<user>one</><user>one</>", "<assistant>1</><assistant>1</>"]

    def numbered(messages):
        return f"[{len(messages)}]" + twice(messages)
    assert found(numbered, CHAT) == []


def test_a_message_without_words_is_a_span_of_its_marks():
    def called(messages):
        return chatml([{"content": "call()", **m} for m in messages])
    chat = [CHAT[1], {"role": "assistant", "tool_calls": [{}]}, {"role": "tool", "content": "3"}, CHAT[3]]
    assert found(called, chat) == ["<user>one</>", "<assistant>call()</>", "<tool>3</>"]


def test_parts_are_in_no_span_and_move_no_other():
    def parts(messages):
        return f"[{len(messages)}]" + chatml(messages)
    chat = [{"role": "user", "content": [{"type": "text", "text": "one"}]}, CHAT[2], CHAT[3]]
    assert found(parts, chat) == ["<assistant>1</>"]
