"""Chats as the model's own template writes them: the same tokens from all who render it.

These are pykvc.LLM, llama-cpp-python's Llama, lm-evaluation-harness and the evals, by pykvc/chat.py, and llama-server,
by an engine of its own, which is so the reference of ours. Some prompts are also written out below."""
import gc
import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest

import pykvc
from evals import prompts as eval_prompts
from evals.items import Item
from evals.tools.served import Server
from pykvc import _core, chat
from pykvc.llama_cpp import Llama, theirs
from pykvc.lm_eval import PykvcLM
from tiny import write, write_chat

FOLDER = Path(__file__).parent/"templates"
THEIRS = theirs.llama_chat_format


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


HI = [user("Hi")]
TURNS = [user("One?"), assistant("1."), user("Two?")]
SPACED = [user(" Größe?\n\n"), assistant("1.\n"), user("Two? 🙂"), assistant("<b>2</b>"), user("Three?\n")]
THOUGHTS = [user("One?"), assistant("<think>\nHm.\n</think>\n\n1."), user("Two?")]
SCHEMA = {"type": "object", "required": ["city"],
          "properties": {"city": {"type": "string", "enum": ["Zürich", "Bern"]}, "days": {"type": "integer"}}}
WEATHER = {"name": "weather", "description": "What's the <weather> & wind like in Zürich?", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": WEATHER}]
CALL = {"id": "call12345", "type": "function",
        "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}}
CALLED = [user("Weather?"), assistant("", tool_calls=[CALL]),
          {"role": "tool", "tool_call_id": "call12345", "content": "Sunny, 20 °C"}]
CHATS = {  # messages, and what goes with them
    "user": (HI, {}),
    "system": ([system("Be brief."), *HI], {}),
    "turns": (TURNS, {}),
    "system and turns": ([system("Be brief."), *SPACED], {}),
    "thoughts": (THOUGHTS, {}),
    "thinking": (HI, {"enable_thinking": True}),
    "not thinking": (TURNS, {"enable_thinking": False}),
    "tools": ([user("Weather?")], {"tools": TOOLS}),
    "tool call": (CALLED, {"tools": TOOLS}),
    "tools and system": ([system("Be brief."), *TURNS], {"tools": TOOLS}),
}


@dataclass
class Known:
    """A template as a model brings it. refuses: chats that it does not take."""
    text: str = ""
    bos: str = "<s>"
    eos: str = "</s>"
    add_bos: bool = False
    special: tuple[str, ...] = ()
    tools: bool = False
    refuses: tuple[str, ...] = ()
    tool_use: str = ""

    def model(self, folder: Path) -> Path:
        named = {"default": self.text} | ({"tool_use": self.tool_use} if self.tool_use else {})
        return write_chat(folder/"model.gguf", named, self.bos, self.eos, self.add_bos, self.special)


def read(name: str) -> str:
    return (FOLDER/f"{name}.jinja").read_text(encoding="utf-8")


LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}
{% set head = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{% else %}{% set rest = messages %}{% set head = '' %}{% endif %}
{% for message in rest %}{% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + (head if loop.index0 == 0 else '') + message['content'].strip() + ' [/INST]' -}}
{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token -}}{% endif %}{% endfor %}"""
IM = ("<|im_start|>", "<|im_end|>")
PHI = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
R1 = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
SYSTEMS = ("system", "system and turns", "tools and system")
KNOWN = {
    "smollm2": Known(bos="<|im_start|>", eos="<|im_end|>"),  # the text is in the default model
    "chatml": Known(THEIRS.CHATML_CHAT_TEMPLATE, eos="<|im_end|>", special=IM),
    "qwen2.5": Known(read("qwen2.5"), "<|endoftext|>", "<|im_end|>", special=IM, tools=True),
    "qwen3": Known(read("qwen3"), "<|endoftext|>", "<|im_end|>", special=(*IM, "<think>", "</think>"), tools=True),
    "llama3": Known(THEIRS.LLAMA3_INSTRUCT_CHAT_TEMPLATE, "<|begin_of_text|>", "<|eot_id|>", add_bos=True),
    "mistral": Known(THEIRS.MISTRAL_INSTRUCT_CHAT_TEMPLATE, add_bos=True, refuses=SYSTEMS),
    "mistral-nemo": Known(read("mistral-nemo"), add_bos=True, special=("[INST]", "[/INST]"), tools=True),
    "gemma2": Known(read("gemma2"), "<bos>", "<eos>", True, ("<start_of_turn>", "<end_of_turn>"), refuses=SYSTEMS),
    "phi3.5": Known(read("phi3.5"), "<s>", "<|endoftext|>", add_bos=True, special=PHI),  # writes no BOS
    "deepseek-r1": Known(read("deepseek-r1"), "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", True, R1),
    "llama2": Known(LLAMA2, add_bos=True),
    "tool_use": Known(THEIRS.CHATML_CHAT_TEMPLATE, eos="<|im_end|>", special=IM, tools=True, tool_use=read("qwen2.5")),
}


def opened(path: Path, **how) -> pykvc.LLM:
    return pykvc.LLM(path, **{"n_ctx": 2048, "n_threads": 1, **how})


def opened_llama(path: Path, **how) -> Llama:
    return Llama(str(path), n_ctx=2048, n_threads=1, verbose=False, **how)


def vocabulary(path: Path) -> _core.Model:
    return _core.Model(str(path), vocab_only=True)


class Everyone:
    """One model, opened by all who render its template."""

    def __init__(self, known: Known, folder: Path) -> None:
        self.known, self.path = known, known.model(folder)
        self.llm, self.llama = opened(self.path), opened_llama(self.path)
        self.harness = PykvcLM(str(self.path), n_ctx=2048, n_threads=1)
        self.server = Server(folder/"log", "-m", self.path, "-c", 2048).wait()

    def close(self) -> None:
        assert self.server.stop() == 0
        self.llm.close()
        self.llama.close()


@pytest.fixture(scope="module", params=KNOWN)
def everyone(request, model_path, tmp_path_factory):
    known = KNOWN[request.param]
    known.text = known.text or chat.templates(vocabulary(model_path))["default"]
    everyone = Everyone(known, tmp_path_factory.mktemp("chat"))
    yield everyone
    everyone.close()


class Taken(Exception):
    """The tokens that were to be evaluated."""


def by_llama(llama: Llama, messages: list[dict], enable_thinking: bool | None = None, **how) -> list[int]:
    """The tokens that create_chat_completion evaluates."""
    def take(prompt, **_):
        raise Taken(prompt)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Taken) as taken:
        patch.setattr(llama, "create_completion", take)
        if enable_thinking is not None:  # an argument of the handlers alone
            handler = llama._chat_handlers[llama.chat_format]
            handler(llama=llama, messages=messages, enable_thinking=enable_thinking, **how)
        llama.create_chat_completion(messages, **how)
    return taken.value.args[0]


def asked(messages: list[dict], tools: list[dict] | None = None, enable_thinking: bool | None = None) -> dict:
    """A request to llama-server, where the arguments of a call are a string, as OpenAI has them."""
    def called(call: dict) -> dict:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": arguments}}
    sent = [{**m, "tool_calls": [called(call) for call in m["tool_calls"]]} if "tool_calls" in m else m
            for m in messages]
    kwargs = {} if enable_thinking is None else {"chat_template_kwargs": {"enable_thinking": enable_thinking}}
    return {"messages": sent, **({"tools": tools} if tools else {}), **kwargs}


def text_by_server(server: Server, messages: list[dict], **how) -> str:
    return server.ok("/apply-template", asked(messages, **how))["prompt"]


def by_server(server: Server, messages: list[dict], **how) -> list[int]:
    text = text_by_server(server, messages, **how)
    return server.ok("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]


# -- the same tokens ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", CHATS)
def test_everyone_sends_the_same_tokens(everyone, name):
    (messages, how), known, llm, harness = CHATS[name], everyone.known, everyone.llm, everyone.harness
    if "tools" in how and not known.tools:
        messages, how = messages[:1] if name == "tool call" else messages, {}
    if name in known.refuses:  # what llama-server does: test_llama_server_differs_on_purpose
        for ask in (llm.apply_chat_template, lambda m: by_llama(everyone.llama, m), harness.apply_chat_template):
            with pytest.raises(ValueError, match="the chat template refuses these messages: "):
                ask(messages)
        return
    ids = llm.tokenize(llm.apply_chat_template(messages, **how))
    assert len(ids) > 3 and by_server(everyone.server, messages, **how) == ids
    assert by_llama(everyone.llama, messages, **how) == ids
    if not how:
        assert harness.tok_encode(harness.apply_chat_template(messages)) == ids
    if known.add_bos and known.text != LLAMA2:  # which has one for each turn
        assert ids[0] == llm._session.model.bos and ids.count(ids[0]) == 1


def test_answers_are_to_the_same_prompt(everyone):
    n = len(everyone.llm.tokenize(everyone.llm.apply_chat_template(TURNS)))
    assert everyone.llm.chat(TURNS, max_tokens=1).n_prompt == n
    assert everyone.llama.create_chat_completion(TURNS, max_tokens=1)["usage"]["prompt_tokens"] == n
    reply = everyone.server.ok("/v1/chat/completions", {"messages": TURNS, "max_tokens": 1})
    assert reply["usage"]["prompt_tokens"] == n


def test_evals_send_the_same_tokens(everyone):
    """In two parts: what comes before the question, and the rest."""
    llm, item = everyone.llm, Item("one", "Who has 3?\n", None, context="  Ann has 3 apples. Bob has 5.\n\n")
    prompt = eval_prompts.render(item, llm._session.model, chat=True)
    whole = llm.apply_chat_template([user(item.whole + item.question)])
    assert prompt.head + prompt.tail == whole and prompt.tail.startswith("Who has")
    assert llm.tokenize(prompt.head) + llm.tokenize(prompt.tail, add_special=False) == llm.tokenize(whole)
    first, second = [prompt.head[a:b] for a, b in prompt.spans]
    assert (first.lstrip(), second) == ("Ann has 3 apples. ", "Bob has 5.\n\n") and prompt.head.endswith(first + second)
    bare = eval_prompts.render(Item("two", " Why?", None), llm._session.model, chat=True)
    assert not bare.spans and bare.tail.lstrip().startswith("Why?")
    assert bare.head + bare.tail == llm.apply_chat_template([user(" Why?")])


def test_a_chat_by_hand(tmp_path):
    with opened(KNOWN["qwen2.5"].model(tmp_path)) as llm:
        default = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        asked_hi = "<|im_start|>user\nHi<|im_end|>\n"
        assert llm.apply_chat_template(HI) == default + asked_hi + "<|im_start|>assistant\n"
        assert llm.apply_chat_template(HI, add_assistant=False) == default + asked_hi
        assert llm.apply_chat_template([system("S"), *HI], False) == "<|im_start|>system\nS<|im_end|>\n" + asked_hi
        schema = json.dumps(TOOLS[0], ensure_ascii=False)
        assert "Zürich" in schema and f"<tools>\n{schema}\n</tools>" in llm.apply_chat_template(HI, tools=TOOLS)
        assert llm.apply_chat_template(HI, tools=[]) == llm.apply_chat_template(HI)


def test_the_default_model_has_its_system_prompt(model_path):
    default = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    with opened(model_path) as llm:
        assert llm.apply_chat_template(HI) == default + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("written", [True, False])
def test_there_is_one_bos(tmp_path, add_bos, written):
    template = ("{{ bos_token }}" if written else "") + "{{ messages[0].content }}"
    path = write_chat(tmp_path/"model.gguf", {"default": template}, add_bos=add_bos)
    with opened(path) as llm:
        ids = llm.tokenize(llm.apply_chat_template(HI))
        assert ids == [llm._session.model.bos]*(add_bos or written) + llm.tokenize("Hi", add_special=False)
        llm.chat(HI, max_tokens=1)
        assert llm._session.tokens == ids
    llama = opened_llama(path)
    assert by_llama(llama, HI) == ids
    llama.close()


# -- templates ---------------------------------------------------------------------------------------------------------

def rendered(template: str, messages: list[dict] = HI, **how) -> str:
    return chat.render(template, messages, **how)


def test_jinja_is_that_of_transformers(monkeypatch):
    class Then(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 3, 1)
    monkeypatch.setattr(chat, "datetime", Then)
    assert rendered("{{ strftime_now('%d %B %Y') }}") == "01 March 2026"
    assert rendered("{% if 1 %}\n  a\n{% endif %}\n   {% if 1 %}b{% endif %}") == "  a\nb"  # trim_blocks, lstrip_blocks
    body = "{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}{{ i }}"
    assert rendered("{% for i in range(9) %}" + body + "{% endfor %}") == "02"
    assert rendered("{{ {'é': '<a&b>'} | tojson }}") == '{"é": "<a&b>"}'
    assert rendered("{{ [1] | tojson(indent=2) }}") == "[\n  1\n]"
    assert rendered("a{% generation %}{{ messages[0].content }}{% endgeneration %}b") == "aHib"


def test_what_a_template_sees():
    assert rendered("[{{ bos_token }}{{ eos_token }}] {{ tools is none }} {{ documents is none }}") == "[] True True"
    assert rendered("{{ add_generation_prompt }} {{ enable_thinking is defined }}") == "True False"
    assert rendered("{{ add_generation_prompt }} {{ enable_thinking }}", add_generation_prompt=False,
                    enable_thinking=False) == "False False"
    assert rendered("{{ effort }} {{ bos_token }}", variables={"effort": "low", "bos_token": "<s>"}) == "low <s>"
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}  # OpenAI's replies have it so
    assert rendered("{{ messages[1].content is defined }}", [*HI, call]) == "False"
    assert rendered("{% for m in messages %}{{ m.role + m.content }} {% endfor %}", [*HI, call]) == "userHi assistant "


PARTS = [user([{"type": "text", "text": "One"}, {"type": "text", "text": "two?"}])]


def test_parts_are_one_text_where_a_template_takes_no_lists(model_path):
    """As in llama-server."""
    for template in ("{{ messages[0].content }}", "{{ messages[0]['content'] + '' }}"):
        assert rendered(template, PARTS) == "One\ntwo?"
    assert rendered("{% for part in messages[0].content %}[{{ part.text }}]{% endfor %}", PARTS) == "[One][two?]"
    with pytest.raises(ValueError, match="message 0 has a part that is not .* takes text alone: {'type': 'image_url'}"):
        rendered("{{ messages[0].content }}", [user([{"type": "image_url"}])])
    with opened(model_path, n_ctx=256, kv_policy="shotkv:window=4", kv_budget="90%") as llm:
        turns = [*PARTS, assistant("Three."), user("Four?")]
        llm.chat(turns, max_tokens=1)
        texts = [llm.detokenize(llm._session.tokens[a:b]) for a, b in llm._session.spans]
        assert texts[0].endswith("user\nOne\ntwo?<|im_end|>\n") and len(texts) == 2
        assert llm.chat([*turns, assistant("5."), user("Why?")], max_tokens=1).n_prompt < 40


@pytest.mark.parametrize("template, says", [
    ("{{ raise_exception('No, thanks') }}", "^the chat template refuses these messages: No, thanks$"),
    ("a\n{% if %}", r"^the chat template is not Jinja: .* \(line 2\)$"),
    ("{{ a | nosuch }}", "not Jinja: No filter named 'nosuch'"),
    ("{{ messages[0].content + 1 }}", "^the chat template cannot render these messages: TypeError"),
    ("{{ a.b.c }}", "UndefinedError"), ("{{ messages.append(1) }}", "SecurityError"),
    ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ("chatml", "a chat template is Jinja"), ("", "a chat template is Jinja"), (3, "a chat template is Jinja"),
])
def test_bad_templates(tmp_path, template, says):
    with pytest.raises(ValueError, match=says):
        rendered(template)
    with opened(write_chat(tmp_path/"model.gguf", {}), chat_template=template) as llm:
        with pytest.raises(ValueError, match=says):
            llm.chat(HI)


@pytest.mark.parametrize("messages, says", [
    ([], "not empty"), ("Hi", "messages is a list"), (user("Hi"), "messages is a list"), (["Hi"], "message 0 is no"),
    ([*HI, {"content": "a"}], "message 1 is no"), ([{"role": 1, "content": "a"}], "message 0 is no"),
    ([{"role": "user"}], r"message 0 \(user\) has no content"), ([user(None)], "only a message with tool_calls"),
    ([user(3)], "has no content that is a string"),
])
def test_bad_messages(messages, says):
    with pytest.raises(ValueError, match=says):
        rendered("{{ messages }}", messages)


@pytest.mark.parametrize("how, variables, says", [
    ({"tools": "weather"}, {}, "tools is a list"), ({"tools": [3]}, {}, "tools is a list"),
    ({"tools": 3}, {}, "tools is a list"), ({"enable_thinking": "no"}, {}, "enable_thinking is True, False or None"),
    ({}, {"add_generation_prompt": True}, "add_generation_prompt is no further variable"),
])
def test_bad_arguments(model_path, how, variables, says):
    with opened(model_path, n_ctx=256) as llm:
        with pytest.raises(ValueError, match=says):
            llm.apply_chat_template(HI, **how, **variables)
        with pytest.raises(ValueError, match=says):
            llm.chat(HI, **how, chat_template_kwargs=variables)


def test_variables_reach_the_template(tmp_path):
    template = "{{ mood }} {{ enable_thinking }} {{ tools | length }} {{ eos_token }}{{ messages[0].content }}"
    with opened(write_chat(tmp_path/"model.gguf", {"default": template})) as llm:
        expected = "dull True 1 </s>Hi"
        assert llm.apply_chat_template(HI, tools=TOOLS, enable_thinking=True, mood="dull") == expected
        for how in (dict(enable_thinking=True, chat_template_kwargs={"mood": "dull"}),
                    dict(chat_template_kwargs={"mood": "dull", "enable_thinking": True})):
            llm.chat(HI, tools=TOOLS, **how, max_tokens=1)
            assert llm.detokenize(llm._session.tokens) == expected


def test_a_template_of_ones_own(model_path):
    own = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    with opened(model_path, n_ctx=256, chat_template=own) as llm:
        assert llm.apply_chat_template([system("S"), *HI]) == "[system] S\n[user] Hi\n"


def test_variants_of_a_template(tmp_path):
    named = {"default": "plain {{ messages[0].content }}", "tool_use": "{{ tools | length }} tools", "rag": "{{ 1 }}"}
    path = write_chat(tmp_path/"model.gguf", named)
    with opened(path) as llm:
        assert chat.templates(llm._session.model) == named
        assert llm.apply_chat_template(HI) == "plain Hi" and llm.apply_chat_template(HI, tools=TOOLS) == "1 tools"
    llama = opened_llama(path, chat_format="chat_template.rag")
    assert llama.detokenize(by_llama(llama, HI)) == b"1"
    llama.close()
    with opened(write_chat(tmp_path/"none.gguf", {"rag": "rag{{ 1 }}"})) as llm:
        with pytest.raises(ValueError, match=r"no chat template, but variants of one \(rag\): choose one with"):
            llm.chat(HI)


def test_a_model_without_a_template(tmp_path):
    path = write_chat(tmp_path/"model.gguf", {})
    for model in (path, write(tmp_path/"bare.gguf")):  # the second one has no tokenizer either
        with opened(model) as llm:
            for ask in (llm.chat, llm.apply_chat_template):
                with pytest.raises(ValueError, match=r"no chat template: give one with chat_template=, or gen"):
                    ask(HI)
            assert chat.turn_end(llm._session.model) == "\n"
    with pytest.raises(ValueError, match="--plain asks without one"):
        eval_prompts.render(Item("one", "Why?", None), vocabulary(path), chat=True)
    llama = opened_llama(path)
    assert llama.chat_format == "llama-2"  # theirs
    llama.close()


# -- llama-cpp-python --------------------------------------------------------------------------------------------------

def test_their_own_formats_and_handlers_stay(tmp_path):
    path = KNOWN["qwen2.5"].model(tmp_path)
    llama = opened_llama(path, chat_format="chatml")
    theirs_writes = b"<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert llama.detokenize(by_llama(llama, HI), special=True) == theirs_writes
    llama.close()
    llama = opened_llama(path, chat_handler=lambda **_: "mine")
    assert llama.create_chat_completion(HI) == "mine" and llama.chat_format is None
    llama.close()


def test_a_llama_with_a_broken_template(tmp_path):
    path = write_chat(tmp_path/"model.gguf", {"default": "{% if %}"})
    with pytest.raises(ValueError, match=r"the chat template of .*model.gguf is not Jinja: .* \(line 1\)"):
        opened_llama(path)


def test_a_closed_llama_and_one_that_is_gone(tmp_path):
    llama = opened_llama(KNOWN["chatml"].model(tmp_path))
    handler = llama._chat_handlers["chat_template.default"]
    llama.close()
    with pytest.raises(ValueError, match="this Llama was closed"):
        llama.create_chat_completion(HI)
    del llama
    gc.collect()
    with pytest.raises(ReferenceError):
        handler(llama=None, messages=HI)


# -- the harness -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, written", [("qwen2.5", "The answer is "), ("llama3", "The answer is")])
def test_the_harness_lets_an_answer_go_on(tmp_path, name, written):
    """gen_prefix of a task: the last message is the beginning of the answer. Llama 3's template strips it."""
    harness = PykvcLM(str(KNOWN[name].model(tmp_path)), n_ctx=512, n_threads=1)
    text = harness.apply_chat_template([*HI, assistant("The answer is ")], add_generation_prompt=False)
    assert text == harness.apply_chat_template(HI) + written
    assert harness.chat_template(True) == KNOWN[name].text and harness.chat_template(False) is None


def test_an_answer_that_is_not_there_does_not_go_on():
    for content in ("", "gone"):
        with pytest.raises(ValueError, match="the answer cannot go on from it"):
            chat.continued("user: Hi", [assistant(content)])


# -- turn_end ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, expected", [
    ("qwen2.5", "<|im_end|>\n<|im_start|>assistant\n"),
    ("qwen3", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    ("llama3", "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"), ("mistral", " [/INST]"),
    ("gemma2", "<end_of_turn>\n<start_of_turn>model\n"), ("deepseek-r1", "<｜Assistant｜><think>\n"),
    ("phi3.5", "<|end|>\n<|assistant|>\n")])
def test_turn_end(tmp_path, name, expected):
    model = vocabulary(KNOWN[name].model(tmp_path))
    assert chat.turn_end(model) == chat.turn_end(KNOWN[name].text) == expected
    assert chat.prompt(model, [user("Who?")], enable_thinking=False).endswith("Who?" + expected)


def test_turn_end_of_other_templates(tmp_path):
    own = "{{ messages[0].content }}{{ eos_token }}A:"
    model = vocabulary(write_chat(tmp_path/"model.gguf", {"default": own}))
    assert chat.turn_end(model) == "</s>A:" and chat.turn_end(own) == "A:" and chat.turn_end(None) == "\n"
    assert chat.turn_end(model, "{{ messages[0].content }}\n###") == "\n###"
    for template in ("{{ messages[0].content }}{{ messages[0].content }}", "nothing {{ 1 }}"):
        with pytest.raises(ValueError, match="nobody can tell where they end"):
            chat.turn_end(template)
    with pytest.raises(ValueError, match="refuses these messages: system first"):
        chat.turn_end("{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}")


# -- spans: pykvc/messages.py on real templates; test_messages.py has made-up ones -------------------------------------

def spans_of(llm: pykvc.LLM, messages: list[dict], **how) -> list[str]:
    llm.chat(messages, **how, max_tokens=1)
    return [llm.detokenize(llm._session.tokens[begin:end]) for begin, end in llm._session.spans]


SHOTKV = dict(kv_policy="shotkv:window=4", kv_budget="60%")
ASKED, ANSWERED = "<|im_start|>user\nOne?<|im_end|>\n", "<|im_start|>assistant\n1.<|im_end|>\n"


@pytest.mark.parametrize("name, spans", [
    ("qwen2.5", [ASKED, ANSWERED]), ("qwen3", [ASKED, ANSWERED]), ("llama2", ["[INST] One? [/INST]", " 1. </s>"]),
    ("gemma2", ["<start_of_turn>user\nOne?<end_of_turn>\n", "<start_of_turn>model\n1.<end_of_turn>\n"]),
    ("mistral-nemo", ["[INST]One?[/INST]", "1.</s>"]),
    ("phi3.5", ["<|user|>\nOne?<|end|>\n", "<|assistant|>\n1.<|end|>\n"]),
    ("deepseek-r1", ["<｜User｜>One?", "<｜Assistant｜>1.<｜end▁of▁sentence｜>"])])
def test_messages_are_spans(tmp_path, name, spans):
    """A system prompt and BOS are in none, nor is the beginning of the answer."""
    with opened(KNOWN[name].model(tmp_path), **SHOTKV) as llm:
        assert spans_of(llm, TURNS) == spans
        if name == "gemma2":
            with pytest.raises(ValueError, match="System role not supported"):
                llm.chat([system("One."), *TURNS])
        else:  # Llama 2 has the system prompt inside of a turn, behind its mark
            spans = ["One? [/INST]", " 1. </s>"] if name == "llama2" else spans
            assert spans_of(llm, [system("One."), *TURNS]) == spans


def test_thoughts_that_are_dropped_and_tool_calls(tmp_path):
    with opened(KNOWN["qwen3"].model(tmp_path), **SHOTKV) as llm:
        assert spans_of(llm, THOUGHTS) == [ASKED, ANSWERED]
        assert "Hm." not in llm.detokenize(llm._session.tokens)
        weather, call, result = spans_of(llm, [*CALLED, user("And in Bern?")], tools=TOOLS)
        assert weather == "<|im_start|>user\nWeather?<|im_end|>\n" and "Sunny" in result
        assert call.startswith("<|im_start|>assistant\n<tool_call>") and call.endswith("</tool_call><|im_end|>\n")


# -- llama-server ------------------------------------------------------------------------------------------------------

DIFFERS = """{%- for m in messages %}{{ '<' + m.role + '>' + m.content + '</>' }}{% endfor -%}
{{ 'tools' if tools is defined else 'no tools' }}, {{ 'date' if date_string is defined else 'no date' -}}
{% if add_generation_prompt %}<|assistant|>{% if enable_thinking %}<think>
{% else %}<think>
</think>{% endif %}{% endif %}"""


@pytest.mark.server
def test_llama_server_differs_on_purpose(tmp_path):
    """docs/server.md has the list."""
    path = write_chat(tmp_path/"model.gguf", {"default": DIFFERS})
    with opened(path) as llm, Server(tmp_path/"log", "-m", path, "-c", 512) as server:
        def both(messages, **how):
            return llm.apply_chat_template(messages, **how), text_by_server(server, messages, **how)
        # what nobody gave is none or undefined in ours; llama-server thinks where a template can, and knows the day
        assert both(HI) == ("<user>Hi</>tools, no date<|assistant|><think>\n</think>",
                            "<user>Hi</>no tools, date<|assistant|><think>\n")
        for thinking, end in ((True, "<think>\n"), (False, "<think>\n</think>")):
            assert all(text.endswith("<|assistant|>" + end) for text in both(HI, enable_thinking=thinking))
        ours, served = both([*HI, assistant("Hello")])  # goes on from an answer that has begun
        assert "<assistant>Hello</>" in ours and served.endswith("Hello") and "<assistant>" not in served
        ours, served = both([{"role": "developer", "content": "S"}, *HI])
        assert ours.startswith("<developer>S</>") and served.startswith("<system>S</>")


@pytest.mark.server
def test_llama_server_where_ours_refuses(tmp_path):
    with Server(tmp_path/"log", "-m", KNOWN["gemma2"].model(tmp_path), "-c", 512) as server:
        merged = "<start_of_turn>user\nS\nHi<end_of_turn>\n<start_of_turn>model\n"
        assert text_by_server(server, [system("S"), *HI]) == merged
    with Server(tmp_path/"log", "-m", write_chat(tmp_path/"none.gguf", {}), "-c", 512) as server:
        assert text_by_server(server, HI) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
