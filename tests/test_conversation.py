"""Chats that go on from the cache: the same tokens as evaluated afresh, and only the new ones are evaluated."""
import threading

import pytest

import pykvc
from pykvc.conversation import without_oldest_turn
from tiny import write_chat

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{{- m.content.rpartition('</think>')[2] + '<|im_end|>\n' }}{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
SYSTEM = "You answer in a few words."
ASKED = ["Name two rivers of Europe.", "Which of them is longer?", "And in which sea does it end?"]
STREAMING = dict(kv_policy="streaming_llm:sinks=4", kv_budget=24)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def opened(path, **how) -> pykvc.LLM:
    return pykvc.LLM(path, **{"n_ctx": 512, "n_threads": 1, **how})


@pytest.fixture(scope="module")
def fresh(model_path):
    with opened(model_path) as llm:
        yield llm


@pytest.fixture(scope="module")
def spelling(tmp_path_factory):
    """A model whose tokens are bytes, and "th"."""
    path = tmp_path_factory.mktemp("spelling")/"model.gguf"
    return write_chat(path, {"default": CHATML}, eos="<|im_end|>", special=("<|im_start|>",))


def counted(llm: pykvc.LLM, monkeypatch) -> list[int]:
    """The tokens of each call that evaluates."""
    calls, session = [], llm._session
    decode = session.decode
    monkeypatch.setattr(session, "decode", lambda ids, **how: (calls.append(len(ids)), decode(ids, **how)))
    return calls


def told(llm: pykvc.LLM, messages: list[dict], answer: str) -> None:
    """As if the model had answered so, a token for each letter."""
    llm.chat(messages, max_tokens=0)
    llm.evaluate([token for letter in answer for token in llm.tokenize(letter, False)], generated=True)


# -- Conversation ------------------------------------------------------------------------------------------------------

def test_turns_are_those_of_a_fresh_chat(model_path, fresh, monkeypatch):
    with opened(model_path) as llm:
        calls, conversation = counted(llm, monkeypatch), llm.conversation(SYSTEM)
        for i, text in enumerate(ASKED):
            before = list(conversation.messages)
            held, calls[:] = list(llm._session.tokens), []
            answer = conversation.ask(text, max_tokens=12)
            want = fresh.chat([*before, user(text)], reset=True, max_tokens=12)
            assert answer.tokens == want.tokens and llm._session.tokens == fresh._session.tokens
            assert answer.kv["reused"] + answer.n_prompt == want.n_prompt and answer.kv["anew"] == ""
            assert sum(calls) == llm.n_tokens - len(held[:answer.kv["reused"]])  # nothing twice
            if i:  # all that is held, and the last token of the answer, which was sampled and not evaluated
                assert answer.kv["reused"] >= len(held) and answer.n_prompt < 32
            assert conversation.messages == [*before, user(text), assistant(answer.text)]
        assert conversation.messages[0] == {"role": "system", "content": SYSTEM} and answer.kv["dropped"] == 0


def test_a_stream_says_the_same(model_path, fresh):
    with opened(model_path) as llm:
        conversation = llm.conversation()
        pieces = conversation.ask(ASKED[0], stream=True, max_tokens=8)
        assert conversation.messages == []
        assert "".join(pieces) == pieces.result.text == fresh.chat([user(ASKED[0])], reset=True, max_tokens=8).text
        assert conversation.messages == [user(ASKED[0]), assistant(pieces.result.text)]


def test_an_answer_that_is_broken_off(model_path, fresh):
    with opened(model_path) as llm:
        conversation = llm.conversation()
        for end in (lambda pieces: pieces.close(), lambda pieces: conversation.end()):
            conversation.clear()
            pieces = conversation.ask(ASKED[0], stream=True)
            said = next(pieces) + next(pieces)
            end(pieces)
            assert conversation.messages == [user(ASKED[0]), assistant(said)]
            with pytest.raises(ValueError, match="the stream has not ended"):
                pieces.result
        answer = conversation.ask(ASKED[1], max_tokens=8)
        assert answer.kv["reused"] > 20
        assert answer.tokens == fresh.chat(conversation.messages[:-1], reset=True, max_tokens=8).tokens
        conversation.ask("Unheard.", stream=True)  # never begun
        assert len(conversation.messages) == 4


@pytest.mark.parametrize("text", ["", "  \n", None, 3])
def test_an_empty_message(model_path, text):
    with opened(model_path) as llm:
        conversation = llm.conversation()
        with pytest.raises(ValueError, match="^a message is a string that is not empty, not"):
            conversation.ask(text)


def test_the_oldest_turns_are_dropped_at_n_ctx(model_path, fresh):
    """Half of the room is free afterwards, so that it does not happen again at once."""
    with opened(model_path, n_ctx=256) as llm:
        conversation, dropped = llm.conversation(SYSTEM), []
        for i in range(9):
            text = f"Count from {i} to {i + 3}, please, and say no more than that. " * 2
            answer = conversation.ask(text, max_tokens=8)
            dropped.append(answer.kv["dropped"])
            assert answer.stop_reason != "context" and llm.n_tokens + 1 <= 256
            if answer.kv["dropped"]:
                assert answer.kv["reused"] < 30  # the system message
                assert answer.tokens == fresh.chat(conversation.messages[:-1], reset=True, max_tokens=8).tokens
            elif i:
                assert answer.kv["reused"] > 30
        assert 1 <= sum(map(bool, dropped)) <= 4 and sum(dropped) + len(conversation.messages[1:])/2 == 9
        assert [m["role"] for m in conversation.messages[:2]] == ["system", "user"]
        before = list(conversation.messages)
        with pytest.raises(ValueError, match="^the message has [0-9]+ tokens, .* but n_ctx is 256 and"):
            conversation.ask("one two three four " * 100)
        assert conversation.messages == before
        assert conversation.ask("And now?", max_tokens=8).n_predicted > 0


def test_the_oldest_turn():
    system, turn = {"role": "system", "content": "S"}, [user("1"), assistant("a"), {"role": "tool", "content": "t"}]
    assert without_oldest_turn([system, *turn, user("2")]) == [system, user("2")]
    assert without_oldest_turn([assistant("hello"), *turn, user("2"), user("3")]) == [user("2"), user("3")]
    assert without_oldest_turn([system, user("1")]) is None


def test_what_a_conversation_begins_with(model_path, tmp_path):
    with opened(model_path) as llm:
        before = [user("One?"), assistant("1.")]
        conversation = llm.conversation("S", before, enable_thinking=False, chat_template_kwargs={"mood": "dull"})
        conversation.ask("Two?", max_tokens=2)
        assert llm.detokenize(llm._session.tokens).startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nOne?")
        for bad, says in ((dict(system=3), "system is a string"), (dict(messages=["a"]), "message 0 is no"),
                          (dict(mood="dull"), "a conversation has no mood: it takes tools")):
            with pytest.raises(ValueError, match=says):
                llm.conversation(**bad)
    with opened(write_chat(tmp_path/"none.gguf", {})) as llm:
        with pytest.raises(ValueError, match="this model has no chat template"):
            llm.conversation()


def test_two_conversations_take_turns(model_path, fresh):
    with opened(model_path) as llm:
        one, two = llm.conversation(SYSTEM), llm.conversation("You are a pirate.")
        for text in ASKED[:2]:
            for conversation in (one, two):
                answer = conversation.ask(text, max_tokens=6)
                assert answer.tokens == fresh.chat(conversation.messages[:-1], reset=True, max_tokens=6).tokens


# -- LLM.chat ----------------------------------------------------------------------------------------------------------

def test_a_chat_goes_on_at_a_budget_of_100_percent(model_path, fresh):
    """A policy that evicts nothing: the same tokens as a fresh evaluation."""
    with opened(model_path, kv_policy="snapkv", kv_budget="100%") as llm:
        messages = [user(ASKED[0])]
        for text in (*ASKED[1:], None):
            answer, want = (one.chat(messages, max_tokens=10) for one in (llm, fresh))
            assert answer.tokens == want.tokens and llm._session.tokens == fresh._session.tokens
            messages += [assistant(answer.text), user(text)]


def test_other_histories(model_path, fresh):
    """The same messages again, edited ones, fewer ones: what both begin with is not evaluated again."""
    history = [user(ASKED[0]), assistant("Rhine, Rhone."), user(ASKED[1])]
    edited = [*history[:2], user("Which one is in France?")]
    with opened(model_path) as llm:
        for messages in (history, history, edited, history[:1], [user("Hello.")], history):
            answer = llm.chat(messages, max_tokens=6)
            want = fresh.chat(messages, reset=True, max_tokens=6)
            assert answer.tokens == want.tokens and llm._session.tokens == fresh._session.tokens
            assert answer.kv["reused"] + answer.n_prompt == want.n_prompt and answer.n_prompt >= 1
            assert answer.kv["reused"] > 10 or messages is history
        assert llm.chat(history, reset=True, max_tokens=1).n_prompt == want.n_prompt


def test_answers_that_come_back_other_than_they_were_generated(spelling):
    """In other tokens, or without its thoughts: what was evaluated is what a fresh evaluation would."""
    for said, comes_back in (("that", "that"), ("<think>no</think>yes", "<think>no</think>yes"), ("yes  ", "yes")):
        with opened(spelling) as llm, opened(spelling) as fresh:
            told(llm, [user("Hi")], said)
            n = len(llm.tokenize(llm.apply_chat_template([user("Hi")])))
            messages = [user("Hi"), assistant(comes_back), user("So?")]
            answer = llm.chat(messages, max_tokens=2)
            fresh.chat(messages, max_tokens=2)
            assert llm._session.tokens == fresh._session.tokens and answer.kv["reused"] >= n


# -- policies ----------------------------------------------------------------------------------------------------------

def test_each_turn_is_evicted(model_path):
    with opened(model_path, **STREAMING) as llm:
        conversation = llm.conversation(SYSTEM)
        for text in ASKED:
            answer = conversation.ask(text, max_tokens=6)
            assert answer.kv["kept"] == [24]*30 and answer.kv["evictions"] == 1 and answer.kv["anew"] == ""
            assert answer.kv["cells"] <= 24 + 6


def test_a_conversation_outlives_its_cells(model_path):
    with opened(model_path, n_ctx=2048, n_ubatch=64, kv_policy="keydiff", kv_cells=256) as llm:
        conversation, n_evaluated = llm.conversation(SYSTEM), 0
        for i in range(8):
            answer = conversation.ask(f"Tell me a thing about the number {i}. " * 4, max_tokens=32)
            n_evaluated += answer.n_prompt
            assert not answer.kv["dropped"] and sum(answer.kv["kept"])/30 <= 256 and answer.kv["anew"] == ""
        assert llm.n_tokens > 512 and n_evaluated < llm.n_tokens + 8


def test_an_evicted_cache_cannot_go_back(spelling):
    with opened(spelling, **STREAMING) as llm:
        history = [user("Is it so?" * 9), assistant("Perhaps."), user("Why?")]
        llm.chat(history, max_tokens=2)
        again = llm.chat(history, max_tokens=2)  # as the first time, and not on the evicted cache
        assert again.kv["reused"] == 0 and "do not continue those that the cache was evicted for" in again.kv["anew"]
        assert llm._session.tokens[:again.n_prompt] == llm.tokenize(llm.apply_chat_template(history))
        answer = llm.chat([user("It is so." * 9), *history[1:], assistant("yes"), user("No.")], max_tokens=2)
        assert answer.kv["reused"] == 0 and answer.kv["anew"]
        llm.chat(history, max_tokens=2)
        told(llm, history, "that" * 20)
        llm.compress()
        answer = llm.chat([*history, assistant("other" * 20), user("So?")], max_tokens=2)
        assert answer.kv["reused"] == 0 and "history differs from what was evaluated at token" in answer.kv["anew"]


def test_an_evicted_answer_keeps_its_own_tokens(spelling):
    """"th" is one token in a fresh evaluation; the cache has two, and cannot be cut there."""
    with opened(spelling, **STREAMING) as llm:
        history, said = [user("Is it so?" * 9)], "that" * 20
        told(llm, history, said)
        llm.compress()
        held = list(llm._session.tokens)
        answer = llm.chat([*history, assistant(said), user("So?")], max_tokens=2)
        assert answer.kv["reused"] == len(held) and answer.kv["anew"] == "" and llm._session.tokens[:len(held)] == held
        rest = "<|im_end|>\n<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n"
        assert llm._session.tokens[len(held):][:answer.n_prompt] == llm.tokenize(rest, add_special=False)


def test_messages_stay_spans(model_path):
    with opened(model_path, kv_policy="shotkv:window=4", kv_budget="60%") as llm:
        conversation = llm.conversation(SYSTEM)
        for n, text in enumerate(ASKED):
            conversation.ask(text, max_tokens=8)
            texts = [llm.detokenize(llm._session.tokens[a:b]) for a, b in llm._session.spans]
            wanted = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in conversation.messages[1:2*n + 1]]
            assert texts == wanted


def test_a_policy_that_asks_is_given_the_message(model_path):
    with opened(model_path, kv_policy="finch:window=32", kv_budget=40) as llm:
        conversation = llm.conversation(SYSTEM)
        for text in ASKED:
            answer = conversation.ask(text, max_tokens=4)
            assert max(answer.kv["kept"]) <= 40 and llm._session.query == llm.tokenize(text, add_special=False)
        assert set(answer.kv["kept"]) == {40} and answer.kv["evictions"] == 1
        conversation.ask("one two three. " * 9 + "Größe 🙂?", max_tokens=1)  # the end of a long one, half of window
        assert 8 < len(llm._session.query) <= 16 and llm.detokenize(llm._session.query).endswith("Größe 🙂?")


@pytest.mark.parametrize("how", [dict(kv_policy="shotkv:window=4", kv_budget=60),
                                 dict(kv_policy="snapkv:window=4", kv_budget=40)])
def test_a_message_that_cannot_be_evicted_changes_nothing(model_path, how, monkeypatch):
    """That is known only once its first token is there."""
    with opened(model_path, **how) as llm:
        conversation = llm.conversation(SYSTEM)
        conversation.ask(ASKED[0], max_tokens=6)
        before, n = list(conversation.messages), llm.n_tokens
        if how["kv_policy"].startswith("snapkv"):
            monkeypatch.setattr(llm._session, "compress", lambda: 1/0)
        pieces = conversation.ask("one two three four " * 20, stream=True)
        assert next(pieces)
        with pytest.raises((ValueError, ZeroDivisionError), match="does not hold|division"):
            next(pieces)
        monkeypatch.undo()
        assert conversation.messages == before and llm.n_tokens == n
        assert conversation.ask(ASKED[1], max_tokens=2).kv["reused"] == n + 1  # with the last token, not yet evaluated
        assert [m["content"] for m in conversation.messages[-2:-1]] == [ASKED[1]]


def test_a_first_message_that_cannot_be_evicted(model_path, monkeypatch):
    with opened(model_path, **STREAMING) as llm:
        conversation = llm.conversation(SYSTEM)
        monkeypatch.setattr(llm._session, "compress", lambda: 1/0)
        with pytest.raises(ZeroDivisionError):
            conversation.ask(ASKED[0])
        assert llm.n_tokens == 0 and len(conversation.messages) == 1


def test_budgets_of_a_turn(model_path):
    """One of a single answer does not stay."""
    with opened(model_path, **STREAMING) as llm:
        conversation = llm.conversation(SYSTEM)
        kept = [conversation.ask(text, max_tokens=2, **how).kv["kept"][0]
                for text, how in zip(ASKED, ({}, {"kv_budget": 12}, {}))]
        assert kept == [24, 12, 24]


def test_a_question_that_is_broken_off_while_it_is_read(model_path, monkeypatch):
    """The conversation is as before it, and goes on from there."""
    with opened(model_path, n_batch=64, **STREAMING) as llm:
        conversation = llm.conversation(SYSTEM)
        conversation.ask(ASKED[0], max_tokens=6)
        before, n = list(conversation.messages), llm.n_tokens

        def interrupt(done: int, total: int) -> None:
            if done >= 64:
                raise KeyboardInterrupt
        llm._session.progress = interrupt
        with pytest.raises(KeyboardInterrupt):
            conversation.ask("one two three four " * 40)
        llm._session.progress = None
        assert conversation.messages == before and llm.n_tokens > n
        answer = conversation.ask(ASKED[1], max_tokens=6)
        assert answer.kv["reused"] > n and answer.kv["anew"] == ""


def test_threads_share_a_conversation(model_path):
    with opened(model_path) as llm:
        talk, answers = llm.conversation(), []
        threads = [threading.Thread(target=lambda i=i: answers.append(talk.ask(f"Count to {i}.", max_tokens=6).text)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [m["content"] for m in talk.messages if m["role"] == "assistant"] == answers and len(answers) == 4
        assert len(talk.messages) == 8
        with pytest.raises(ValueError, match="echo"):
            talk.ask("One?", echo=True)


def test_a_chat_is_heard_in_full_after_a_long_answer(model_path):
    """An answer takes the rows of the last queries; where nothing was evicted the prompt is evaluated from before those."""
    chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Tell me of the rivers of Europe. "*8}]
    with opened(model_path, kv_policy="snapkv", kv_budget=400) as llm:
        want = llm.chat(chat, max_tokens=4, kv_budget=64, reset=True)
        llm.chat(chat, max_tokens=60, reset=True)
        got = llm.chat(chat, max_tokens=4, kv_budget=64)
        assert got.kv["reused"] == want.n_prompt - 32 and got.tokens == want.tokens
