"""Chats as the model's own template writes them: the same tokens from pykvc.LLM, llama-cpp-python's Llama, lm-evaluation-harness and llama-server.

llama-server renders Jinja with an engine of its own, so it is the reference of ours; some prompts are also written out below."""
import gc
import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest

import pykvc
from evals import prompts as eval_prompts
from evals.items import Item
from evals.served import Server
from pykvc import _core, chat
from pykvc.llama_cpp import Llama, theirs
from pykvc.lm_eval import PykvcLM
from tiny import write, write_chat

FOLDER = Path(__file__).parent/"templates"


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


TOOLS = [{"type": "function", "function": {
    "name": "weather", "description": "What's the <weather> & wind like in Zürich?",
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["Zürich", "Bern"]}, "days": {"type": "integer"}}, "required": ["city"]}}}]
CALL = {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}}
CALLED = [user("Weather?"), assistant("", tool_calls=[CALL]), {"role": "tool", "tool_call_id": "call12345", "content": "Sunny, 20 °C"}]
CHATS = {  # messages, and what goes with them
    "user": ([user("Name three rivers.")], {}),
    "system": ([system("Be brief."), user("Name three rivers.")], {}),
    "turns": ([user("One?"), assistant("1."), user("Two?")], {}),
    "system and turns": ([system("Be brief."), user(" Größe?\n\n"), assistant("1.\n"), user("Two? 🙂"), assistant("<b>2</b>"), user("Three?\n")], {}),
    "thoughts": ([user("One?"), assistant("<think>\nHm.\n</think>\n\n1."), user("Two?")], {}),
    "thinking": ([user("Two?")], {"enable_thinking": True}),
    "not thinking": ([user("One?"), assistant("1."), user("Two?")], {"enable_thinking": False}),
    "tools": ([user("Weather?")], {"tools": TOOLS}),
    "tool call": (CALLED, {"tools": TOOLS}),
    "tools and system": ([system("Be brief."), user("One?"), assistant("1."), user("Weather?")], {"tools": TOOLS}),
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

    def model(self, path: Path) -> Path:
        return write_chat(path, {"default": self.text} | ({"tool_use": self.tool_use} if self.tool_use else {}), self.bos, self.eos, self.add_bos, self.special)


LLAMA2 = ("{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set head = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
          "{% else %}{% set rest = messages %}{% set head = '' %}{% endif %}{% for message in rest %}{% if message['role'] == 'user' %}"
          "{{ bos_token + '[INST] ' + (head if loop.index0 == 0 else '') + message['content'].strip() + ' [/INST]' }}"
          "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}")
THEIRS = theirs.llama_chat_format
CHATML_MARKS = ("<|im_start|>", "<|im_end|>")
SYSTEMS = ("system", "system and turns", "tools and system")


def read(name: str) -> str:
    return (FOLDER/f"{name}.jinja").read_text(encoding="utf-8")


KNOWN = {
    "smollm2": Known(bos="<|im_start|>", eos="<|im_end|>"),  # the text is in the default model
    "chatml": Known(THEIRS.CHATML_CHAT_TEMPLATE, eos="<|im_end|>", special=CHATML_MARKS),
    "qwen2.5": Known(read("qwen2.5"), "<|endoftext|>", "<|im_end|>", special=CHATML_MARKS, tools=True),
    "qwen3": Known(read("qwen3"), "<|endoftext|>", "<|im_end|>", special=(*CHATML_MARKS, "<think>", "</think>"), tools=True),
    "llama3": Known(THEIRS.LLAMA3_INSTRUCT_CHAT_TEMPLATE, "<|begin_of_text|>", "<|eot_id|>", True, ("<|start_header_id|>", "<|end_header_id|>")),
    "mistral": Known(THEIRS.MISTRAL_INSTRUCT_CHAT_TEMPLATE, add_bos=True, refuses=SYSTEMS),
    "mistral-nemo": Known(read("mistral-nemo"), add_bos=True, special=("[INST]", "[/INST]"), tools=True),
    "gemma2": Known(read("gemma2"), "<bos>", "<eos>", True, ("<start_of_turn>", "<end_of_turn>"), refuses=SYSTEMS),
    "phi3.5": Known(read("phi3.5"), "<s>", "<|endoftext|>", True, ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")),  # writes no BOS
    "deepseek-r1": Known(read("deepseek-r1"), "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", True, ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")),
    "llama2": Known(LLAMA2, add_bos=True),
    "tool_use": Known(THEIRS.CHATML_CHAT_TEMPLATE, eos="<|im_end|>", special=CHATML_MARKS, tools=True, tool_use=read("qwen2.5")),
}


class Everyone:
    """One model, opened by all who render its template."""

    def __init__(self, known: Known, folder: Path) -> None:
        self.known, self.path = known, known.model(folder/"model.gguf")
        self.llm = pykvc.LLM(self.path, n_ctx=4096, n_threads=1)
        self.llama = Llama(str(self.path), n_ctx=4096, n_threads=1, verbose=False)
        self.harness = PykvcLM(str(self.path), n_ctx=4096, n_threads=1)
        self.server = Server(folder/"log", "-m", self.path, "-c", 4096).wait()

    def close(self) -> None:
        assert self.server.stop() == 0
        self.llm.close()
        self.llama.close()


@pytest.fixture(scope="module", params=KNOWN)
def everyone(request, model_path, tmp_path_factory):
    known = KNOWN[request.param]
    if not known.text:
        known.text = chat.templates(_core.Model(str(model_path), vocab_only=True))["default"]
    everyone = Everyone(known, tmp_path_factory.mktemp("chat"))
    yield everyone
    everyone.close()


def by_llama(llama: Llama, messages: list[dict], **how) -> list[int]:
    """The tokens that their create_chat_completion evaluates."""
    class Taken(Exception):
        pass

    def take(prompt, **_):
        raise Taken(prompt)
    variables = {name: how.pop(name) for name in ("enable_thinking",) if name in how}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Taken) as taken:
        patch.setattr(llama, "create_completion", take)
        if variables:  # which their method does not take, but their handlers do
            llama._chat_handlers[llama.chat_format](llama=llama, messages=messages, **how, **variables)
        llama.create_chat_completion(messages, **how)
    return taken.value.args[0]


def asked(messages: list[dict], tools: list[dict] | None = None, enable_thinking: bool | None = None) -> dict:
    """A request to llama-server: OpenAI's arguments of a call are a string."""
    def call(one: dict) -> dict:
        return {**one, "function": {**one["function"], "arguments": json.dumps(one["function"]["arguments"], ensure_ascii=False)}}
    body: dict = {"messages": [{**m, "tool_calls": [call(one) for one in m["tool_calls"]]} if "tool_calls" in m else m for m in messages]}
    body |= {"tools": tools} if tools else {}
    return body | ({} if enable_thinking is None else {"chat_template_kwargs": {"enable_thinking": enable_thinking}})


def by_server(server: Server, messages: list[dict], **how) -> list[int]:
    text = server.ok("/apply-template", asked(messages, **how))["prompt"]
    return server.ok("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]


# -- the same tokens ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", CHATS)
def test_everyone_sends_the_same_tokens(everyone, name):
    (messages, how), known, llm = CHATS[name], everyone.known, everyone.llm
    if "tools" in how and not known.tools:
        how = {}
    messages = messages if how or name != "tool call" else messages[:1]
    if name in known.refuses:
        for ask in (llm.apply_chat_template, lambda m: by_llama(everyone.llama, m), everyone.harness.apply_chat_template):
            with pytest.raises(ValueError, match="the chat template refuses these messages: "):
                ask(messages)
        return  # what llama-server does is in test_llama_server_differs_on_purpose
    ids = llm.tokenize(llm.apply_chat_template(messages, **how))
    assert len(ids) > 5 and by_server(everyone.server, messages, **how) == ids
    assert by_llama(everyone.llama, messages, **how) == ids
    if not how:
        assert everyone.harness.tok_encode(everyone.harness.apply_chat_template(messages)) == ids
    if known.add_bos and known.text != LLAMA2:  # which has one for each turn
        assert ids[0] == llm._session.model.bos and ids.count(ids[0]) == 1


def test_answers_are_to_the_same_prompt(everyone):
    messages, _ = CHATS["turns"]
    n = len(everyone.llm.tokenize(everyone.llm.apply_chat_template(messages)))
    assert everyone.llm.chat(messages, max_tokens=1).n_prompt == n
    assert everyone.llama.create_chat_completion(messages, max_tokens=1)["usage"]["prompt_tokens"] == n
    assert everyone.server.ok("/v1/chat/completions", {"messages": messages, "max_tokens": 1})["usage"]["prompt_tokens"] == n


def test_evals_send_the_same_tokens(everyone):
    """In two parts: what comes before the question, and the rest."""
    llm, item = everyone.llm, Item("one", "Who has 3?\n", None, context="  Ann has 3 apples. Bob has 5.\n\n")
    prompt = eval_prompts.render(item, llm._session.model, chat=True)
    whole = llm.apply_chat_template([user(item.whole + item.question)])
    assert prompt.head + prompt.tail == whole and "Who has" not in prompt.head and prompt.tail.startswith("Who has")
    assert llm.tokenize(prompt.head) + llm.tokenize(prompt.tail, add_special=False) == llm.tokenize(whole)
    found = [prompt.head[a:b] for a, b in prompt.spans]
    assert found[0].lstrip() == "Ann has 3 apples. " and found[1:] == ["Bob has 5.\n\n"] and prompt.head.endswith("".join(found))
    bare = eval_prompts.render(Item("two", " Why?", None), llm._session.model, chat=True)
    assert not bare.spans and bare.tail.lstrip().startswith("Why?") and bare.head + bare.tail == llm.apply_chat_template([user(" Why?")])


def test_a_chat_by_hand(tmp_path):
    qwen = pykvc.LLM(KNOWN["qwen2.5"].model(tmp_path/"model.gguf"), n_ctx=512)
    default = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    assert qwen.apply_chat_template([user("Hi")]) == default + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert qwen.apply_chat_template([user("Hi")], add_assistant=False) == default + "<|im_start|>user\nHi<|im_end|>\n"
    assert qwen.apply_chat_template([system("S"), user("Hi")], False) == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    schema = json.dumps(TOOLS[0], ensure_ascii=False)
    assert "Zürich" in schema and f"<tools>\n{schema}\n</tools>" in qwen.apply_chat_template([user("Hi")], tools=TOOLS)
    assert qwen.apply_chat_template([user("Hi")], tools=[]) == qwen.apply_chat_template([user("Hi")])


def test_the_default_model_has_its_system_prompt(model_path):
    with pykvc.LLM(model_path, n_ctx=256) as llm:
        assert llm.apply_chat_template([user("Hi")]).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n")


# -- BOS --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("written", [True, False])
def test_there_is_one_bos(tmp_path, add_bos, written):
    path = write_chat(tmp_path/"model.gguf", {"default": ("{{ bos_token }}" if written else "") + "{{ messages[0].content }}"}, add_bos=add_bos)
    with pykvc.LLM(path, n_ctx=512, n_threads=1) as llm:
        bos, ids = llm._session.model.bos, llm.tokenize(llm.apply_chat_template([user("Hi")]))
        assert ids == [bos]*(add_bos or written) + llm.tokenize("Hi", add_special=False)
        llm.chat([user("Hi")], max_tokens=1)
        assert llm._session.tokens == ids
    llama = Llama(str(path), n_ctx=512, n_threads=1, verbose=False)
    assert by_llama(llama, [user("Hi")]) == ids
    llama.close()


# -- templates ----------------------------------------------------------------------------------------------------------------

def rendered(template: str, messages=None, **how) -> str:
    return chat.render(template, [user("Hi")] if messages is None else messages, **how)


def test_jinja_is_that_of_transformers(monkeypatch):
    class Then(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 3, 1)
    monkeypatch.setattr(chat, "datetime", Then)
    assert rendered("{% if true %}\n  a\n{% endif %}\n   {% if true %}b{% endif %}") == "  a\nb"  # trim_blocks, lstrip_blocks
    assert rendered("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "02"
    assert rendered("{{ {'é': '<a&b>'} | tojson }}") == '{"é": "<a&b>"}' and rendered("{{ [1] | tojson(indent=2) }}") == "[\n  1\n]"
    assert rendered("{{ strftime_now('%d %B %Y') }}") == "01 March 2026"
    assert rendered("a{% generation %}{{ messages[0].content }}{% endgeneration %}b") == "aHib"
    assert rendered("{{ bos_token }}|{{ eos_token }}|{{ add_generation_prompt }}|{{ tools is none }}|{{ documents is none }}|{{ enable_thinking is defined }}") == "||True|True|True|False"
    assert rendered("{{ enable_thinking }} {{ effort }} {{ bos_token }}", enable_thinking=False, variables={"effort": "low", "bos_token": "<s>"}) == "False low <s>"
    assert rendered("{{ messages[1].content is defined }}", [user("a"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]) == "False"


@pytest.mark.parametrize("template, says", [
    ("{{ raise_exception('No, thanks') }}", "the chat template refuses these messages: No, thanks"), ("a\n{% if %}", r"not Jinja: .* \(line 2\)"),
    ("{{ a | nosuch }}", "not Jinja: No filter named 'nosuch'"), ("{{ messages[0].content + 1 }}", "cannot render these messages: TypeError"),
    ("{{ a.b.c }}", "cannot render these messages: UndefinedError"), ("{{ messages.append(1) }}", "cannot render these messages: SecurityError"),
    ("{{ ''.__class__.__mro__ }}", "SecurityError"), ("chatml", "a chat template is Jinja"), ("", "a chat template is Jinja"), (3, "a chat template is Jinja"),
])
def test_bad_templates(tmp_path, template, says):
    with pytest.raises(ValueError, match=says):
        rendered(template)
    with pykvc.LLM(write_chat(tmp_path/"model.gguf", {}), n_ctx=256, n_threads=1, chat_template=template) as llm, pytest.raises(ValueError, match=says):
        llm.chat([user("Hi")])


@pytest.mark.parametrize("messages, says", [
    ([], "not empty"), ("Hi", "messages is a list"), (user("Hi"), "messages is a list"), (["Hi"], "message 0 is no"), ([user("Hi"), {"content": "a"}], "message 1 is no"),
    ([{"role": 1, "content": "a"}], "message 0 is no"), ([{"role": "user"}], r"message 0 \(user\) has no content"), ([user(None)], "only one with tool_calls"),
    ([user(3)], "has no content that is a string"),
])
def test_bad_messages(messages, says):
    with pytest.raises(ValueError, match=says):
        rendered("{{ messages }}", messages)


@pytest.mark.parametrize("how, says", [
    ({"tools": "weather"}, "tools is a list"), ({"tools": [3]}, "tools is a list"), ({"tools": 3}, "tools is a list"), ({"enable_thinking": "no"}, "enable_thinking is True, False or None"),
    ({"messages_": 1, "add_generation_prompt": True}, "add_generation_prompt is no further variable"),
])
def test_bad_arguments(model_path, how, says):
    with pykvc.LLM(model_path, n_ctx=256) as llm:
        with pytest.raises(ValueError, match=says):
            llm.apply_chat_template([user("Hi")], **how)
        named = {name: how[name] for name in ("tools", "enable_thinking") if name in how}
        with pytest.raises(ValueError, match=says):
            llm.chat([user("Hi")], **named, chat_template_kwargs={name: value for name, value in how.items() if name not in named})


def test_variables_reach_the_template(tmp_path):
    path = write_chat(tmp_path/"model.gguf", {"default": "{{ mood }} {{ enable_thinking }} {{ tools | length }} {{ eos_token }}{{ messages[0].content }}"})
    with pykvc.LLM(path, n_ctx=256, n_threads=1) as llm:
        assert llm.apply_chat_template([user("Hi")], tools=TOOLS, enable_thinking=True, mood="dull") == "dull True 1 </s>Hi"
        answer = llm.chat([user("Hi")], tools=TOOLS, enable_thinking=True, chat_template_kwargs={"mood": "dull"}, max_tokens=1)
        assert answer.n_prompt == len(llm.tokenize("dull True 1 </s>Hi"))
        llm.chat([user("Hi")], tools=TOOLS, chat_template_kwargs={"mood": "dull", "enable_thinking": True}, max_tokens=1)
        assert llm.detokenize(llm._session.tokens) == "dull True 1 </s>Hi"


def test_a_template_of_ones_own(model_path):
    with pykvc.LLM(model_path, n_ctx=256, chat_template="{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}") as llm:
        assert llm.apply_chat_template([system("S"), user("Hi")]) == "[system] S\n[user] Hi\n"


def test_variants_of_a_template(tmp_path):
    named = {"default": "plain {{ messages[0].content }}", "tool_use": "tools {{ tools | length }}", "rag": "rag {{ documents }}"}
    path = write_chat(tmp_path/"model.gguf", named)
    with pykvc.LLM(path, n_ctx=256, n_threads=1) as llm:
        assert chat.templates(llm._session.model) == named
        assert llm.apply_chat_template([user("Hi")]) == "plain Hi" and llm.apply_chat_template([user("Hi")], tools=TOOLS) == "tools 1"
    llama = Llama(str(path), n_ctx=256, n_threads=1, verbose=False, chat_format="chat_template.rag")
    assert llama.detokenize(by_llama(llama, [user("Hi")])) == b"rag None"
    llama.close()
    with pykvc.LLM(write_chat(tmp_path/"none.gguf", {"rag": "rag"}), n_ctx=256, n_threads=1) as llm:
        with pytest.raises(ValueError, match=r"no chat template, but variants of one \(rag\): choose one with chat_template="):
            llm.chat([user("Hi")])


def test_a_model_without_a_template(tmp_path):
    path = write_chat(tmp_path/"model.gguf", {})
    for model in (path, write(tmp_path/"bare.gguf")):
        with pykvc.LLM(model, n_ctx=256, n_threads=1) as llm:
            for ask in (llm.chat, llm.apply_chat_template):
                with pytest.raises(ValueError, match=r"this model has no chat template: give one with chat_template=, or generate\(\)"):
                    ask([user("Hi")])
            assert chat.turn_end(llm._session.model) == "\n"
    with pytest.raises(ValueError, match="--plain asks without one"):
        eval_prompts.render(Item("one", "Why?", None), _core.Model(str(path), vocab_only=True), chat=True)
    llama = Llama(str(path), n_ctx=256, n_threads=1, verbose=False)
    assert llama.chat_format == "llama-2"  # theirs
    llama.close()


# -- llama-cpp-python ---------------------------------------------------------------------------------------------------------

def test_their_own_formats_and_handlers_stay(tmp_path):
    path = KNOWN["qwen2.5"].model(tmp_path/"model.gguf")
    llama = Llama(str(path), n_ctx=512, n_threads=1, verbose=False, chat_format="chatml")
    assert llama.detokenize(by_llama(llama, [user("Hi")]), special=True) == b"<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    llama.close()
    llama = Llama(str(path), n_ctx=512, n_threads=1, verbose=False, chat_handler=lambda **_: "mine")
    assert llama.create_chat_completion([user("Hi")]) == "mine" and llama.chat_format is None
    llama.close()


def test_a_llama_with_a_broken_template(tmp_path):
    path = write_chat(tmp_path/"model.gguf", {"default": "{% if %}"})
    with pytest.raises(ValueError, match=r"the chat template of .*model.gguf is not Jinja: .* \(line 1\)"):
        Llama(str(path), n_ctx=256, n_threads=1, verbose=False)


def test_a_closed_llama_and_one_that_is_gone(tmp_path):
    llama = Llama(str(KNOWN["chatml"].model(tmp_path/"model.gguf")), n_ctx=256, n_threads=1, verbose=False)
    handler = llama._chat_handlers["chat_template.default"]
    llama.close()
    with pytest.raises(ValueError, match="this Llama was closed"):
        llama.create_chat_completion([user("Hi")])
    del llama
    gc.collect()
    with pytest.raises(ReferenceError):
        handler(llama=None, messages=[user("Hi")])


# -- the harness ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["qwen2.5", "llama3"])
def test_the_harness_lets_an_answer_go_on(tmp_path, name):
    """gen_prefix of a task: the last message is the beginning of the answer. Llama 3's template strips it."""
    harness = PykvcLM(str(KNOWN[name].model(tmp_path/"model.gguf")), n_ctx=512, n_threads=1)
    messages = [user("Two?"), assistant("The answer is ")]
    text = harness.apply_chat_template(messages, add_generation_prompt=False)
    assert text == harness.apply_chat_template(messages[:1]) + ("The answer is " if name == "qwen2.5" else "The answer is")
    assert harness.chat_template(True) == KNOWN[name].text and harness.chat_template(False) is None


def test_an_answer_that_is_not_there_does_not_go_on():
    for content in ("", "gone"):
        with pytest.raises(ValueError, match="the answer cannot go on from it"):
            chat.continued("user: Hi", [assistant(content)])


# -- turn_end -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, expected", [
    ("qwen2.5", "<|im_end|>\n<|im_start|>assistant\n"), ("qwen3", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    ("llama3", "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"), ("mistral", " [/INST]"), ("gemma2", "<end_of_turn>\n<start_of_turn>model\n"),
    ("deepseek-r1", "<｜Assistant｜><think>\n"), ("phi3.5", "<|end|>\n<|assistant|>\n")])
def test_turn_end(tmp_path, name, expected):
    model = _core.Model(str(KNOWN[name].model(tmp_path/"model.gguf")), vocab_only=True)
    assert chat.turn_end(model) == chat.turn_end(KNOWN[name].text) == expected
    text = chat.prompt(model, [user("Who?")], enable_thinking=False)
    assert text.endswith("Who?" + expected)


def test_turn_end_of_other_templates(tmp_path):
    model = _core.Model(str(write_chat(tmp_path/"model.gguf", {"default": "{{ messages[0].content }}{{ eos_token }}A:"})), vocab_only=True)
    assert chat.turn_end(model) == "</s>A:" and chat.turn_end(model, "{{ messages[0].content }}\n###") == "\n###" and chat.turn_end(None) == "\n"
    for template in ("{{ messages[0].content | upper }}{{ messages[0].content }}{{ messages[0].content }}", "nothing {{ 1 }}"):
        with pytest.raises(ValueError, match="where they end cannot be found"):
            chat.turn_end(template)


# -- spans ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, chats", [
    ("qwen2.5", ["<|im_start|>user\nOne?<|im_end|>\n", "<|im_start|>assistant\n1.<|im_end|>\n"]), ("gemma2", ["<start_of_turn>user\nOne?<end_of_turn>\n", "<start_of_turn>model\n1.<end_of_turn>\n"]),
    ("llama2", ["[INST] One? [/INST]", " 1. </s>"]), ("mistral-nemo", ["[INST]One?[/INST]", "1.</s>"]), ("phi3.5", ["<|user|>\nOne?<|end|>\n", "<|assistant|>\n1.<|end|>\n"]),
    ("deepseek-r1", ["<｜User｜>One?", "<｜Assistant｜>1.<｜end▁of▁sentence｜>"]), ("qwen3", ["<|im_start|>user\nOne?<|im_end|>\n", "<|im_start|>assistant\n1.<|im_end|>\n"])])
@pytest.mark.parametrize("first", [[], [system("One.")]], ids=["alone", "after a system prompt"])
def test_messages_are_spans(tmp_path, name, chats, first):
    """A default system prompt and BOS are in none, nor is the answer's beginning."""
    messages = first + CHATS["turns"][0]
    with pykvc.LLM(KNOWN[name].model(tmp_path/"model.gguf"), n_ctx=1024, n_threads=1, kv_policy="shotkv:window=4", kv_budget="60%") as llm:
        if first and name == "gemma2":
            with pytest.raises(ValueError, match="System role not supported"):
                llm.chat(messages)
            return
        llm.chat(messages, max_tokens=1)
        found = [llm.detokenize(llm._session.tokens[begin:end]) for begin, end in llm._session.spans]
    assert found == ([chats[0].removeprefix("[INST] "), chats[1]] if first and name == "llama2" else chats)  # a system prompt is inside of a turn


def test_thoughts_that_are_dropped_move_no_span(tmp_path):
    with pykvc.LLM(KNOWN["qwen3"].model(tmp_path/"model.gguf"), n_ctx=1024, n_threads=1, kv_policy="shotkv:window=4", kv_budget="60%") as llm:
        llm.chat(CHATS["thoughts"][0], max_tokens=1)
        found = [llm.detokenize(llm._session.tokens[begin:end]) for begin, end in llm._session.spans]
        assert found == ["<|im_start|>user\nOne?<|im_end|>\n", "<|im_start|>assistant\n1.<|im_end|>\n"] and "Hm." not in llm.detokenize(llm._session.tokens)
        llm.chat([*CALLED, user("Thanks. And in Bern?")], tools=TOOLS, max_tokens=1)
        found = [llm.detokenize(llm._session.tokens[begin:end]) for begin, end in llm._session.spans]
        assert found[0] == "<|im_start|>user\nWeather?<|im_end|>\n" and found[1].startswith("<|im_start|>assistant\n<tool_call>") and "Sunny" in found[2] and len(found) == 3


# -- llama-server -------------------------------------------------------------------------------------------------------------------

DIFFERS = ("{%- for m in messages %}{{ '<' + m.role + '>' + m.content + '</>' }}{% endfor %}{{ 'tools' if tools is defined else 'no tools' }}, "
           "{{ 'date' if date_string is defined else 'no date' }}{% if add_generation_prompt %}<|assistant|>{% if enable_thinking %}<think>\n{% else %}<think>\n</think>{% endif %}{% endif %}")


def test_llama_server_differs_on_purpose(tmp_path):
    """docs/server.md has the list."""
    with pykvc.LLM(write_chat(tmp_path/"model.gguf", {"default": DIFFERS}), n_ctx=512, n_threads=1) as llm, Server(tmp_path/"log", "-m", tmp_path/"model.gguf", "-c", 512) as server:
        def both(messages, **how):
            return llm.apply_chat_template(messages, **how), server.ok("/apply-template", asked(messages, **how))["prompt"]
        # what nobody gave is none or undefined in ours; theirs thinks where a template can, knows the day, and has no tools at all
        assert both([user("Hi")]) == ("<user>Hi</>tools, no date<|assistant|><think>\n</think>", "<user>Hi</>no tools, date<|assistant|><think>\n")
        for thinking in (True, False):
            assert len({text.rpartition("<|assistant|>")[2] for text in both([user("Hi")], enable_thinking=thinking)}) == 1
        ours, served = both([user("Hi"), assistant("Hello")])  # goes on from an answer that has begun
        assert "<assistant>Hello</>" in ours and served.endswith("Hello") and "<assistant>" not in served
        ours, served = both([{"role": "developer", "content": "S"}, user("Hi")])
        assert ours.startswith("<developer>S</>") and served.startswith("<system>S</>")
    gemma = KNOWN["gemma2"].model(tmp_path/"gemma.gguf")
    with Server(tmp_path/"log", "-m", gemma, "-c", 512) as server:  # a system prompt that the template refuses is put before the user's words
        assert server.ok("/apply-template", {"messages": [system("S"), user("Hi")]})["prompt"] == "<start_of_turn>user\nS\nHi<end_of_turn>\n<start_of_turn>model\n"
    with Server(tmp_path/"log", "-m", write_chat(tmp_path/"none.gguf", {}), "-c", 512) as server:  # ChatML, where a model has none
        assert server.ok("/apply-template", {"messages": [user("Hi")]})["prompt"] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
