"""`pykvc serve` on SmolLM2-135M: what llama-server's API says of eviction, and that one client does not disturb
another."""
import gzip
import http.client
import json
import os
import random
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import pykvc
from pykvc import prompts, serve
from pykvc.prose import prose
from evals.tools.served import Server
from test_spans import TEXTS

pytestmark = pytest.mark.server

SHOTS = [f"Q: What is {a} plus {b}?\nA: {a} plus {b} is {a + b}.\n\n" for a in range(2, 8) for b in range(2, 4)]
PROMPT = "".join(SHOTS) + "Q: What is 3 plus 6?\nA:"
STORY = "The lighthouse keeper wrote down every ship that passed. Fog came in from the west! Did anyone answer the horn? " * 6
POLICY, BUDGET = "shotkv", "25%"


@pytest.fixture(scope="module")
def server(model_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    (folder/"slots").mkdir()
    server = Server(folder/"log", "-m", model_path, "-c", 4096, "-np", 2, "--kv-policy", POLICY, "--kv-budget", BUDGET, "--metrics", "--slots",
                    "--slot-save-path", folder/"slots", "--cache-reuse", 64, "--context-shift", "--spec-type", "ngram-simple").wait()
    server.slots_folder = folder/"slots"
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def bounded(model_path, tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("bounded")/"log", "-m", model_path, "-c", 4096, "-ub", 256, "-b", 256,
                    env={"LLAMA_ARG_KV_POLICY": "snapkv", "LLAMA_ARG_KV_CELLS": "768"}).wait()
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def llm(model_path):
    with pykvc.LLM(model_path, n_ctx=2048, n_threads=2, kv_policy=POLICY, kv_budget=BUDGET) as llm:
        yield llm


def ask(prompt, n=12, **more):
    return {"prompt": prompt, "n_predict": n, "temperature": 0, "return_tokens": True, **more}


def quarter(n: int) -> int:
    return int(n/4 + 0.5)


def erase(server, slot=0):
    server.ok(f"/slots/{slot}?action=erase", {})


# -- replies --------------------------------------------------------------------------------------------------------

def test_completion(server, llm):
    reply = server.ok("/completion", ask(PROMPT, cache_prompt=False))
    kv, n = reply["kv"], len(llm.tokenize(PROMPT))
    assert (kv["policy"], kv["budget"], kv["decode_budget"]) == (POLICY, BUDGET, None)
    assert kv["n_evictions"] == 1 and kv["evict_ms"] > 0
    assert kv["n_tokens"] == n + reply["tokens_predicted"] - 1  # the last one was not evaluated
    assert kv["n_kept"] == kv["n_tokens"] - kv["n_evicted"] == quarter(n) + reply["tokens_predicted"] - 1
    assert 0 < kv["bytes"] < kv["bytes_full"] and kv["bytes"]*kv["n_tokens"] == kv["bytes_full"]*kv["n_kept"]


@pytest.mark.parametrize("route, body", [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4}),
    ("/v1/messages", {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4}), ("/v1/responses", {"input": PROMPT, "max_output_tokens": 4})])
def test_every_chat_route_takes_the_fields(server, route, body):
    kv = server.ok(route, {**body, "temperature": 0, "kv_policy": "keydiff", "kv_budget": 64})["kv"]
    assert (kv["policy"], kv["budget"], kv["n_evictions"]) == ("keydiff", "64", 1)
    assert server.ok(route, {**body, "temperature": 0})["kv"]["policy"] == POLICY
    connection, events = server.stream(route, {**body, "kv_budget": 80})
    assert [event["kv"]["budget"] for event in events if "kv" in event] == ["80"]


@pytest.mark.parametrize("prompt, how", [
    (PROMPT, {}), (STORY, {}), (PROMPT, {"segment": "\n\n"}), (PROMPT, {"spans": [(0, 40), (40, 90), (100, 180)]}),
    (PROMPT, {"policy": "snapkv:window=32", "budget": 96}), (STORY, {"policy": "keydiff", "budget": 0.5}),
    (PROMPT, {"budget": "30%", "decode_budget": 16}),
])
def test_same_tokens_as_llm(server, llm, model_path, prompt, how):
    policy, budget, decode = how.get("policy", POLICY), how.get("budget", BUDGET), how.get("decode_budget")
    spans = {key: how[key] for key in ("spans", "segment") if key in how}
    if how == spans:
        want = llm.generate(prompt, max_tokens=40, **spans)
    else:
        with pykvc.LLM(model_path, n_ctx=2048, n_threads=2, kv_policy=policy, kv_budget=budget, kv_decode_budget=decode) as own:
            want = own.generate(prompt, max_tokens=40)
    fields = {"kv_" + key: value for key, value in how.items() if key in ("policy", "budget", "decode_budget")}
    if spans:
        fields["kv_spans"] = how.get("segment") or how["spans"]
    got = server.ok("/completion", ask(prompt, 40, cache_prompt=False, **fields))
    assert got["tokens"][:want.n_predicted] == want.tokens and want.n_predicted >= 4
    assert got["kv"]["n_evictions"] >= 1 and got["kv"]["policy"] == policy


def test_streams_say_the_same(server):
    whole = server.ok("/completion", ask(PROMPT, cache_prompt=False))
    _, events = server.stream("/completion", ask(PROMPT, cache_prompt=False))
    *parts, last = events
    assert "".join(part["content"] for part in parts) == whole["content"]
    assert {**last["kv"], "evict_ms": 0} == {**whole["kv"], "evict_ms": 0} and last["timings"]
    oai = server.ok("/v1/completions", {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "cache_prompt": False})
    assert oai["choices"][0]["text"] == whole["content"] and oai["kv"]["n_kept"] == whole["kv"]["n_kept"]


CHAT = [{"role": "system", "content": "You are a terse assistant."}] + [
    {"role": role, "content": text} for shot in SHOTS[:8] for role, text in zip(("user", "assistant"), shot.strip().split("\n"))
] + [{"role": "user", "content": "Q: What is 3 plus 6?"}]


def test_chat_messages_are_spans(server, llm):
    want = llm.chat(CHAT, max_tokens=24, reset=True)
    body = {"messages": CHAT, "max_tokens": 24, "temperature": 0, "cache_prompt": False}
    reply = server.ok("/v1/chat/completions", body)
    assert reply["choices"][0]["message"]["content"] == want.text and reply["usage"]["prompt_tokens"] == want.n_prompt
    assert reply["kv"]["n_kept"] < want.n_prompt/2
    _, events = server.stream("/v1/chat/completions", body)
    *parts, last = events
    assert "".join(part["choices"][0]["delta"].get("content") or "" for part in parts) == want.text
    assert last["kv"]["n_kept"] == reply["kv"]["n_kept"] and last["timings"]
    by_sentence = server.ok("/v1/chat/completions", {**body, "kv_spans": "sentence"})
    assert by_sentence["kv"]["n_evictions"] == 1


@pytest.mark.parametrize("name", TEXTS)
def test_sentences_are_those_of_python(server, llm, name):
    """A slot file holds the spans, too."""
    ids, spans = prompts.encode(llm._session.model, True, "".join(SHOTS[:3]) + 2*TEXTS[name], None, None, "tokens", "sentence", first=True)

    def saved(kv_spans):
        erase(server)
        assert server.ok("/completion", ask(ids, 4, id_slot=0, kv_budget="60%", kv_spans=kv_spans))["kv"]["n_evictions"] == 1
        server.ok("/slots/0?action=save", {"filename": "spans.bin"})
        data = (server.slots_folder/"spans.bin").read_bytes()
        return data[:-24 - struct.unpack("<Q", data[-16:-8])[0]]  # without the request's own words
    found = saved("sentence")
    assert found == saved(spans) and found != saved([(spans[0][0], spans[-1][1])])
    (server.slots_folder/"spans.bin").unlink()


def test_several_answers_of_one_prompt(server):
    reply = server.ok("/v1/completions", {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "n": 2})
    texts = [choice["text"] for choice in reply["choices"]]
    assert len(texts) == 2 and texts[0] == texts[1]


def test_grammar(server):
    reply = server.ok("/completion", ask(PROMPT, 8, grammar='root ::= " yes" | " no"'))
    assert reply["content"] in (" yes", " no") and reply["kv"]["n_evictions"] <= 1


# -- what else tells of it --------------------------------------------------------------------------------------------

def test_props_slots_metrics(server):
    server.ok("/completion", ask(PROMPT, id_slot=1, cache_prompt=False))
    props = server.ok("/props")
    assert props["kv"] == {"policy": POLICY, "budget": BUDGET, "decode_budget": None, "cells": 2048}
    slot = next(slot for slot in server.ok("/slots") if slot["id"] == 1)
    assert slot["kv"]["policy"] == POLICY and 0 < slot["kv"]["n_kept"] < slot["kv"]["n_tokens"]
    lines = [line.split() for line in server.get("/metrics")[1].splitlines() if not line.startswith("#")]
    metrics = {name.removeprefix("llamacpp:"): float(value) for name, value in lines}
    assert metrics["kv_cells"] == 4096 and 0 < metrics["kv_cells_used"] <= 4096
    assert 0 < metrics["kv_bytes_used"] < metrics["kv_bytes_full"] < metrics["kv_bytes"]
    assert metrics["kv_tokens_evicted_total"] > 100 and metrics["kv_evictions_total"] >= 1 and metrics["kv_eviction_seconds_total"] > 0


def test_what_is_off_is_in_the_log(server):
    log = server.log.read_text(errors="replace")
    for word in ("cache shifting is not supported", "cache_reuse is not supported", "speculative decoding is off", "context checkpoints"):
        assert word in log


@pytest.mark.parametrize("path, body", [("/embeddings", {"input": "a"}), ("/v1/embeddings", {"input": "a"}), ("/rerank", {"query": "a", "documents": ["b"]})])
def test_embeddings_are_refused(server, path, body):
    status, reply = server.post(path, body)
    assert status == 501 and "--kv-policy" in reply["error"]["message"]


def test_metrics_of_a_sleeping_server(model_path, tmp_path):
    server = Server(tmp_path/"log", "-m", model_path, "-c", 1024, "--kv-policy", POLICY, "--kv-budget", BUDGET, "--metrics",
                    "--sleep-idle-seconds", 1).wait()
    server.ok("/completion", ask(PROMPT, 2))
    server.get("/metrics")  # rates are of the time since the last look
    awake = server.get("/metrics")[1]
    while not server.ok("/props")["is_sleeping"]:
        time.sleep(0.1)
    assert server.get("/metrics")[1] == awake and "llamacpp:kv_evictions_total 1" in awake
    assert server.stop() == 0


# -- mistakes -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fields, says", [
    ({"kv_policy": "snapvk"}, "snapkv"), ({"kv_policy": 3}, "name of a policy"), ({"kv_policy": "snapkv:window=64"}, "keeps 32"),
    ({"kv_policy": "h2o", "kv_budget": 64}, "summed over all queries"), ({"kv_policy": "adakv"}, "heads different"),
    ({"kv_policy": "finch", "kv_budget": 64}, "queries"), ({"kv_policy": "full", "kv_budget": 64}, "full"),
    ({"kv_budget": 0}, "kv_budget"), ({"kv_budget": -5}, "kv_budget"), ({"kv_budget": "150%"}, "kv_budget"), ({"kv_budget": 1.5}, "(0, 1]"),
    ({"kv_policy": "snapkv\0"}, "name of a policy"), ({"kv_budget": "\0"}, "retained ratio"), ({"kv_budget": "64\0x"}, "retained ratio"),
    ({"kv_budget": [1]}, "25%"), ({"kv_budget": 8}, "at least"), ({"kv_budget": "much"}, "kv_budget"),
    ({"kv_policy": "snapkv:window=32", "kv_decode_budget": 64}, "does not evict generated tokens"),
    ({"kv_spans": [[0, 5], [3, 8]]}, "overlaps"), ({"kv_spans": [[0, 100000]]}, "leaves the prompt"), ({"kv_spans": [[5, 5]]}, "empty"),
    ({"kv_spans": [[0, "a"]]}, "no range"), ({"kv_spans": "shots"}, "sep:"), ({"kv_spans": "message"}, "no chat"), ({"kv_spans": 7}, "sentence"),
    ({"kv_spans": "re:^Q"}, "separator"),
])
@pytest.mark.parametrize("path", ["/completion", "/v1/completions"])
def test_invalid_fields_are_400(server, fields, says, path):
    status, reply = server.post(path, {**ask(PROMPT), **fields})
    assert status == 400 and says in reply["error"]["message"]


def test_a_budget_that_the_prompt_does_not_allow(server):
    """Only the eviction finds out."""
    status, reply = server.post("/completion", ask(PROMPT, kv_budget=100, kv_spans=[[0, 40]]))
    assert status == 400 and "outside every span" in reply["error"]["message"]


def test_invalid_chat_fields_are_400(server):
    status, reply = server.post("/v1/chat/completions", {"messages": CHAT, "kv_policy": "snapvk"})
    assert status == 400 and "snapkv" in reply["error"]["message"]


# -- the prompt cache ---------------------------------------------------------------------------------------------------

def test_an_extension_goes_on(server, llm):
    ids, more = llm.tokenize(PROMPT), llm.tokenize(STORY)[:100]
    first = llm.generate(tokens=ids, max_tokens=16)
    want = llm.generate(tokens=more, reset=False, compress=True, max_tokens=24)
    erase(server)
    got = server.ok("/completion", ask(ids, 16, id_slot=0))
    assert got["tokens"] == first.tokens
    got = server.ok("/completion", ask(ids + first.tokens + more, 24, id_slot=0))
    assert got["timings"]["cache_n"] == len(ids) + 15 and got["timings"]["prompt_n"] == len(more) + 1
    assert got["kv"]["n_evictions"] == 1 and got["kv"]["n_tokens"] == len(ids) + 16 + len(more) + 23
    assert got["kv"]["n_kept"] == quarter(len(ids) + 16 + len(more)) + 23 == want.kv["cells"]


def test_a_branch_gives_what_a_cold_slot_gives(server):
    branch = "".join(SHOTS[:6]) + STORY
    cold = server.ok("/completion", ask(branch, 24, id_slot=0, cache_prompt=False))
    erase(server)  # an idle slot would go into the host cache, and come back
    server.ok("/completion", ask(PROMPT, 24, id_slot=0))
    warm = server.ok("/completion", ask(branch, 24, id_slot=0))
    assert warm["timings"]["cache_n"] == 0
    assert warm["tokens"] == cold["tokens"] and warm["kv"]["n_kept"] == cold["kv"]["n_kept"]


@pytest.mark.parametrize("policy", ["shotkv", "snapkv:window=32"])
def test_what_was_not_evicted_is_heard_in_full(server, policy):
    """An answer takes the rows of the last queries: where nothing was evicted the prompt goes on from before those."""
    how = {"kv_policy": policy, "kv_budget": "25%"}
    erase(server)
    cold = server.ok("/completion", ask(PROMPT, 24, id_slot=0, cache_prompt=False, **how))
    erase(server)
    server.ok("/completion", ask(PROMPT, 60, id_slot=0, cache_prompt=False, kv_policy="full", ignore_eos=True))
    warm = server.ok("/completion", ask(PROMPT, 24, id_slot=0, **how))
    n = cold["tokens_evaluated"]
    assert warm["timings"]["cache_n"] == n - 32
    assert warm["tokens"] == cold["tokens"] and warm["kv"]["n_kept"] == cold["kv"]["n_kept"]


def test_what_lies_in_no_span_stays(server, llm):
    chat = [{"role": "user", "content": PROMPT}]
    for path, body in (("/completion", ask(PROMPT, 4, kv_spans=[])), ("/v1/chat/completions", {"messages": chat, "max_tokens": 4}),
                       ("/v1/chat/completions", {"messages": chat, "max_tokens": 4, "kv_budget": 80})):
        kv = server.ok(path, {**body, "temperature": 0, "cache_prompt": False})["kv"]
        assert (kv["n_evicted"], kv["n_evictions"]) == (0, 0) and kv["n_kept"] == kv["n_tokens"]
    kv = server.ok("/completion", ask(PROMPT, 4, cache_prompt=False))["kv"]
    assert kv["n_evictions"] == 1
    assert llm.chat(chat, max_tokens=2, reset=True).kv["evictions"] == 0
    assert llm.generate(PROMPT, spans=(), max_tokens=2).kv["evictions"] == 0 < llm.generate(PROMPT, max_tokens=2).kv["evictions"]


def test_full_by_another_writing_is_full(server):
    reply = server.ok("/completion", ask(PROMPT, 2, kv_policy=" full ", cache_prompt=False))
    assert reply["kv"]["policy"] == "full" and reply["kv"]["n_evicted"] == 0


@pytest.mark.parametrize("slot", [2, 9, -1, 1000000])
def test_a_slot_that_is_none(server, slot):
    status, reply = server.post(f"/slots/{slot}?action=compress", {})
    assert status == 400 and f"slots are 0 to 1, not {slot}" in reply["error"]["message"]


def test_figures_are_of_now(server):
    def used() -> dict:
        lines = [line.split() for line in server.get("/metrics")[1].splitlines() if line.startswith("llamacpp:kv_")]
        return dict(lines)
    server.ok("/completion", ask(PROMPT, 8, n_cmpl=2, cache_prompt=False, temperature=1))
    before = used()
    assert all("e" not in value for name, value in before.items() if "seconds" not in name)
    assert int(before["llamacpp:kv_cells_used"]) > 0
    for slot in (0, 1):
        erase(server, slot)
    assert used()["llamacpp:kv_cells_used"] == "0" and used()["llamacpp:kv_bytes_used"] == "0"
    assert [(slot["kv"]["n_tokens"], slot["kv"]["n_kept"]) for slot in server.ok("/slots")] == [(0, 0)]*2
    server.ok("/completion", ask(PROMPT, 2, id_slot=0, kv_policy="keydiff", kv_budget=77, cache_prompt=False))
    empty = server.post("/completion", ask("", 2, id_slot=0, kv_policy="tova", kv_budget=50))
    assert empty[0] == 400 or (empty[1]["kv"]["policy"], empty[1]["kv"]["budget"], empty[1]["kv"]["n_evicted"]) == ("tova", "50", 0)


def test_another_rule_is_another_cache(server):
    cold = server.ok("/completion", ask(PROMPT + " 9", 24, id_slot=0, cache_prompt=False, kv_policy="keydiff", kv_budget=64))
    erase(server)
    server.ok("/completion", ask(PROMPT, 4, id_slot=0))
    warm = server.ok("/completion", ask(PROMPT + " 9", 24, id_slot=0, kv_policy="keydiff", kv_budget=64))
    assert warm["timings"]["cache_n"] == 0 and warm["tokens"] == cold["tokens"]


def test_the_host_cache_brings_back_what_was_kept(server, llm):
    """A prompt that was pushed out of its slot comes back evicted as it was, and goes on."""
    ids = llm.tokenize("Two more sums. " + PROMPT)
    for slot in 0, 1:
        erase(server, slot)
    first = server.ok("/completion", ask(ids, 16, id_slot=0))
    direct = server.ok("/completion", ask(ids + first["tokens"] + ids[:40], 16, id_slot=0))
    erase(server)
    assert server.ok("/completion", ask(ids, 16, id_slot=0))["tokens"] == first["tokens"]
    for other in range(3):
        server.ok("/completion", ask(f"{other} {STORY}", 2, id_slot=other % 2))
    back = server.ok("/completion", ask(ids + first["tokens"] + ids[:40], 16, id_slot=0))
    assert back["timings"]["cache_n"] == len(ids) + 15 and back["tokens"] == direct["tokens"]
    assert back["kv"]["n_kept"] == direct["kv"]["n_kept"]


# -- slot files ---------------------------------------------------------------------------------------------------------

def test_slot_files(server, llm):
    ids, more = llm.tokenize(PROMPT), llm.tokenize(STORY)[:60]
    erase(server)
    first = server.ok("/completion", ask(ids, 16, id_slot=0))
    longer = ask(ids + first["tokens"] + more, 16, id_slot=0)
    saved = server.ok("/slots/0?action=save", {"filename": "a.bin"})
    path = server.slots_folder/"a.bin"
    assert path.stat().st_size == saved["n_written"] and [p.name for p in server.slots_folder.iterdir()] == ["a.bin"]
    direct = server.ok("/completion", longer)
    erase(server)
    restored = server.ok("/slots/0?action=restore", {"filename": "a.bin"})
    assert restored["n_restored"] == len(ids) + 15 and restored["n_read"] == saved["n_written"]
    back = server.ok("/completion", longer)
    assert back["timings"]["cache_n"] == len(ids) + 15 and back["tokens"] == direct["tokens"]


def test_a_restored_slot_is_the_one_that_was_saved(server):
    """It knows how it was evicted: a branch inside the evicted part and another policy begin anew."""
    branch, other = ask("".join(SHOTS[:6]) + STORY, 24, id_slot=0), ask(PROMPT + " 9", 24, id_slot=0, kv_policy="keydiff", kv_budget=64)
    cold = []
    for request in branch, other:
        cold.append(server.ok("/completion", {**request, "cache_prompt": False}))
        erase(server)  # or the host cache would bring it back
    server.ok("/completion", ask(PROMPT, 4, id_slot=0))
    server.ok("/slots/0?action=save", {"filename": "r.bin"})
    held = server.ok("/slots")[0]["kv"]
    for request, want in zip((branch, other), cold):
        erase(server)
        empty = server.ok("/slots")[0]["kv"]
        assert (empty["policy"], empty["budget"], empty["n_tokens"], empty["n_kept"], empty["bytes"]) == (POLICY, BUDGET, 0, 0, 0)
        server.ok("/slots/0?action=restore", {"filename": "r.bin"})
        assert server.ok("/slots")[0]["kv"] == held
        warm = server.ok("/completion", request)
        assert warm["timings"]["cache_n"] == 0 and warm["tokens"] == want["tokens"]


@pytest.mark.parametrize("was, now, says", [(b"KVCSLOT2", b"KVCSLOT1", "another version"), (b'"weights":"', b'"weights":"1', "other weights")])
def test_a_slot_file_of_another_version_or_model(server, was, now, says):
    erase(server)
    server.ok("/completion", ask("A short one.", 2, id_slot=0))
    server.ok("/slots/0?action=save", {"filename": "v.bin"})
    data, n_about = (server.slots_folder/"v.bin").read_bytes(), 0
    if was in data[:-24]:
        at = data.rindex(was)
        n_about, data = len(now) - len(was), data[:at] + now + data[at + len(was):]
        data = data[:-24] + trailer(data[:-24], struct.unpack("<Q", data[-16:-8])[0] + n_about)
    else:
        data = data[:-24] + data[-24:].replace(was, now)
    (server.slots_folder/"v.bin").write_bytes(data)
    status, reply = server.post("/slots/0?action=restore", {"filename": "v.bin"})
    assert status == 400 and says in reply["error"]["message"]
    fresh = "Nobody asked this: " + PROMPT  # the host cache may hold PROMPT
    assert server.ok("/completion", ask(fresh, 2, id_slot=0))["timings"]["cache_n"] == 0


def test_broken_slot_files_touch_nobody(server):
    erase(server)
    server.ok("/completion", ask(PROMPT, 4, id_slot=0))
    server.ok("/slots/0?action=save", {"filename": "b.bin"})
    good = (server.slots_folder/"b.bin").read_bytes()
    flipped = bytearray(good)
    flipped[len(good)//2] ^= 1
    longer = bytearray(good)
    longer[8] ^= 1  # the count of tokens
    with ThreadPoolExecutor() as pool:
        busy = pool.submit(server.post, "/completion", ask(STORY, 60, id_slot=1, cache_prompt=False))
        for name, data in dict(cut=good[:len(good)//3], flipped=flipped, longer=longer, empty=b"", noise=bytes(range(256))*40).items():
            (server.slots_folder/name).write_bytes(data)
            status, reply = server.post("/slots/0?action=restore", {"filename": name})
            assert status == 400 and "file" in reply["error"]["message"], name
        status, reply = busy.result()
    alone = server.ok("/completion", ask(STORY, 60, id_slot=1, cache_prompt=False))
    assert status == 200 and reply["tokens"] == alone["tokens"]
    assert server.ok("/slots/0?action=restore", {"filename": "b.bin"})["n_restored"] > 0


def test_a_slot_file_that_cannot_be_written(server):
    (server.slots_folder/"folder").mkdir()
    status, reply = server.post("/slots/0?action=save", {"filename": "folder"})
    assert status == 500 and not list(server.slots_folder.glob("*.part"))


def trailer(data: bytes, n_about: int) -> bytes:
    """Of a slot file: the bytes of JSON before it, and FNV-1a."""
    value = 14695981039346656037
    for byte in data:
        value = (value ^ byte)*1099511628211 % 2**64
    return b"KVCSLOT2" + struct.pack("<QQ", n_about, value)


def test_mutated_slot_files(server):
    """Whatever is changed is noticed; and where somebody made the checksum fit, it is refused or restored, and nothing
    breaks."""
    rng = random.Random(5)
    erase(server)
    server.ok("/completion", ask("A short one.", 2, id_slot=0))
    server.ok("/slots/0?action=save", {"filename": "c.bin"})
    good = (server.slots_folder/"c.bin").read_bytes()
    n_about = struct.unpack("<Q", good[-16:-8])[0]
    assert good[-24:] == trailer(good[:-24], n_about)
    for i in range(50):
        data, at = bytearray(good), rng.randrange(len(good))
        n = rng.choice([1, 4, 1000])
        data = [data[:at], data[:at] + data[at + n:], data[:at] + bytes(n) + data[at:], data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]][i % 4]
        (server.slots_folder/"m.bin").write_bytes(data)
        status, reply = server.post("/slots/0?action=restore", {"filename": "m.bin"})
        assert status == 400 and "restore" in reply["error"]["message"]
    for _ in range(8):
        data = bytearray(good[:-24])
        at = rng.choice([rng.randrange(200), len(data) - 1 - rng.randrange(3000)])
        data[at:at + 4] = rng.randbytes(4)
        (server.slots_folder/"m.bin").write_bytes(data + trailer(data, n_about))
        assert server.post("/slots/0?action=restore", {"filename": "m.bin"})[0] in (200, 400)
        erase(server)
    assert server.ok("/completion", ask(PROMPT, 2, id_slot=0))["content"]


def test_mutated_requests(server):
    rng = random.Random(6)
    junk = {"kv_policy": ["", "x", "snapkv:window", "snapkv:window=-1", "snapkv:window=1e9", "shotkv:fit=9", ":", ",", "snapkv;keydiff", 1, [], {}, True],
            "kv_budget": [0, -1, 1, 2**40, 1e300, 0.0, -0.5, 1.0001, "", "%", "0%", "101%", "1e999", "nan", "12 tokens", [], {}, True, "0x20"],
            "kv_decode_budget": [0, -3, 2.5, "x", "200%", [], {}, False],
            "kv_spans": [0, 1.5, True, {}, "", "sep:", "re:.", "word", [1, 2], [[1]], [[1, 2, 3]], [[2, 1]], [[-1, 4]], [[0, 2**40]], [[0, 4], [2, 6]], [["0", 4]]]}
    for i in range(200):
        if i % 4 == 3:
            body = json.dumps(ask(PROMPT)).encode()
            body = rng.choice([body[:rng.randrange(len(body) - 1)], rng.randbytes(40), body.replace(b"{", b"[", 1), b""])
            status, reply = server.post(rng.choice(["/completion", "/v1/completions", "/v1/chat/completions"]), body)
            assert status >= 400 and reply["error"]["message"], body  # llama-server's own answer to what is no JSON is 500
        else:
            name = rng.choice(list(junk))
            field, messages = {name: rng.choice(junk[name])}, [{"role": "user", "content": PROMPT}]
            route, body = rng.choice([("/completion", ask(PROMPT, 1)), ("/v1/completions", ask(PROMPT, 1)), ("/v1/messages", {"messages": messages, "max_tokens": 1}),
                                      ("/v1/chat/completions", {"messages": messages, "max_tokens": 1})])
            status, reply = server.post(route, {**body, **field})
            assert status == 400 and reply["error"]["message"], (route, field)
    assert server.ok("/completion", ask(PROMPT, 2))["content"]


# -- other clients -------------------------------------------------------------------------------------------------------

def test_a_client_that_goes_away(server):
    connection, events = server.stream("/completion", ask(STORY, 1500, ignore_eos=True))
    for _ in range(3):
        next(events)
    connection.close()
    events.close()
    assert server.ok("/completion", ask(PROMPT, cache_prompt=False))["content"]
    for _ in range(100):
        if not any(slot["is_processing"] for slot in server.ok("/slots")):
            break
        time.sleep(0.1)
    assert not any(slot["is_processing"] for slot in server.ok("/slots"))


def test_clients_at_once(server):
    prompts = [f"{i}. {PROMPT}" for i in range(3)] + [f"{i}. {STORY}" for i in range(3)]
    bad = [ask(PROMPT, kv_budget="no"), {"prompt": 3.5}, b"{", {"prompt": [10**9]}]
    with ThreadPoolExecutor(10) as pool:
        good = [pool.submit(server.post, "/completion", ask(prompt, ignore_eos=True)) for prompt in prompts]
        rest = [pool.submit(server.post, "/completion", body) for body in bad]
        assert all(job.result()[0] >= 400 for job in rest)
        for job in good:
            status, reply = job.result()
            assert status == 200 and reply["tokens_predicted"] == 12 and reply["kv"]["n_kept"] < reply["kv"]["n_tokens"]


# -- fewer cells than tokens ----------------------------------------------------------------------------------------------

def test_a_prompt_longer_than_its_cells(bounded, model_path):
    prompt = STORY*8
    with pykvc.LLM(model_path, n_ctx=4096, n_threads=2, n_batch=256, n_ubatch=256, kv_policy="snapkv", kv_cells=768) as llm:
        want = llm.generate(prompt, max_tokens=32)
    got = bounded.ok("/completion", ask(prompt, 32))
    assert got["tokens"][:want.n_predicted] == want.tokens
    assert got["kv"]["n_kept"] <= 768 < want.n_prompt <= got["kv"]["n_tokens"] and got["kv"]["n_evictions"] > 1
    assert bounded.ok("/props")["kv"] == {"policy": "snapkv", "budget": None, "decode_budget": None, "cells": 768}


def test_what_cells_allow(bounded):
    assert bounded.ok("/completion", ask(PROMPT, 8, kv_policy="full"))["kv"]["n_evictions"] == 0
    for fields, says in (({"kv_policy": "full", "n_predict": 700}, "768 cells"), ({"kv_policy": "full", "n_predict": -1}, "768 cells"),
                         ({"kv_policy": "full", "n_predict": 2**31 - 1}, "768 cells"),
                         ({"kv_budget": 600}, "at most 512"), ({"kv_policy": "streaming_llm:sinks=600", "kv_budget": "25%"}, "at most 512")):
        status, reply = bounded.post("/completion", {**ask(PROMPT), **fields})
        assert status == 400 and says in reply["error"]["message"]


# -- the program ----------------------------------------------------------------------------------------------------------

def test_without_a_policy_and_sigterm(model_path, tmp_path):
    server = Server(tmp_path/"log", "-m", model_path, "-c", 2048, "-np", 1).wait()
    reply = server.ok("/completion", ask(PROMPT))
    assert "kv" not in reply and "kv" not in server.ok("/props") and "kv" not in server.ok("/slots")[0]
    status, reply = server.post("/completion", ask(PROMPT, kv_budget=64))
    assert status == 400 and "--kv-policy" in reply["error"]["message"]
    _, events = server.stream("/completion", ask(STORY, 1500, ignore_eos=True))
    next(events)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(server.post, "/completion", ask(PROMPT))
        while not server.ok("/slots")[0]["is_processing"]:
            time.sleep(0.1)
        time.sleep(0.5)
        assert server.stop() == 0
        assert waiting.result()[0] == 503
    *_, last = events  # a token in flight may be the last, before the error can be said
    assert not last.get("stop") and last.get("error", {"code": 503})["code"] == 503


@pytest.mark.parametrize("cells", [None, 384])
@pytest.mark.parametrize("policy", ["keydiff", "keydiff:share=all"])
def test_four_slots_whose_layers_differ(model_path, tmp_path, policy, cells):
    """Each sequence has rows of its own, with kv_cells from a pool of its own, and answers as if alone. One prompt comes
    after the other, so that products have the same shapes; then four other answers are generated at once."""
    prompts = [prose(60)[50*i:2400 + 150*i] for i in range(4)]
    bounds = ["--kv-cells", cells] if cells else []
    server = Server(tmp_path/"log", "-m", model_path, "-c", 4*2048, "-np", 4, "-ub", 128, "-b", 128, "-t", 1, "--kv-policy", policy, "--kv-budget", 200,
                    *bounds).wait()
    with server, pykvc.LLM(model_path, n_ctx=2048, n_threads=1, n_batch=128, n_ubatch=128, kv_policy=policy, kv_budget=200, kv_cells=cells) as llm:
        assert "share=" in llm.policy and "share=head" not in llm.policy
        for slot, prompt in enumerate(prompts):
            alone, reply = llm.generate(prompt, max_tokens=8), server.ok("/completion", ask(prompt, 8, id_slot=slot))
            assert reply["tokens"] == alone.tokens and reply["kv"]["n_evictions"] == alone.kv["evictions"] > (1 if cells else 0)
            assert reply["kv"]["bytes"] == alone.kv["bytes_used"]
        with ThreadPoolExecutor(4) as pool:
            replies = list(pool.map(lambda slot: server.ok("/completion", ask(prompts[slot] + " And then?", 40, id_slot=slot, ignore_eos=True)), range(4)))
        for slot, reply in zip(server.ok("/slots"), replies):
            assert len(reply["tokens"]) == 40 and reply["kv"]["n_evictions"] > 0
            assert reply["kv"]["bytes"] == slot["kv"]["bytes"] <= (cells or 250)*alone.kv["bytes_full"]/alone.n_prompt


def test_sigterm_with_a_policy(model_path, tmp_path):
    server = Server(tmp_path/"log", "-m", model_path, "-c", 4096, "-np", 2, "--kv-policy", "h2o:interval=8", "--kv-budget", 64, "--kv-decode-budget", 32).wait()
    assert [slot["kv"]["policy"] for slot in server.ok("/slots")] == ["h2o:interval=8"]*2  # before the first request
    streams = [server.stream("/completion", ask(STORY, 1500, ignore_eos=True)) for _ in range(2)]
    for _, events in streams:
        for _ in range(12):
            next(events)
    assert server.stop() == 0


def test_the_web_page_or_how_to_get_it(server):
    """make webui builds it; CI has both builds (.github/workflows/ci.yml)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", "/", headers={"Accept-Encoding": "gzip"})
    response = connection.getresponse()
    body, says = response.read(), "`make webui`"
    if os.environ.get("PYKVC_WEBUI"):
        assert response.status == 200 and "<html" in gzip.decompress(body).decode()
        assert server.get("/tools") == (200, []) and "error" in server.ok("/tools", {"tool": "read_file"})
    elif response.status != 200:  # not a developer's build that has it
        assert response.status == 501 and says in body.decode() and server.log.read_text().count(says) == 1
        assert server.get("/tools")[0] == 403


def test_a_page_from_elsewhere(model_path, tmp_path):
    (tmp_path/"index.html").write_text("<p>a page")
    with Server(tmp_path/"log", "-m", model_path, "-c", 512, "--path", tmp_path) as server:
        assert server.get("/") == (200, "<p>a page") and server.get("/tools") == (200, [])
        assert "webui" not in server.log.read_text()


def test_flags_are_in_the_help():
    import subprocess
    text = subprocess.run([serve.program(), "--help"], text=True, capture_output=True).stdout
    for flag in ("--kv-policy", "--kv-budget", "--kv-decode-budget", "--kv-cells"):
        assert flag in text and "LLAMA_ARG_" + flag[2:].upper().replace("-", "_") in text


@pytest.mark.parametrize("args, says", [
    (["--kv-policy", "snapvk"], "snapkv"), (["--kv-policy", "snapkv", "--kv-budget", "150%"], "kv_budget"), (["--kv-policy", "full", "--kv-budget", "25%"], "full"),
    (["--kv-policy", "snapkv", "--kv-budget", "8"], "at least"), (["--kv-policy", "kvzip", "--kv-budget", "50%"], "keydiff"),
    (["--kv-policy", "snapkv", "--embeddings"], "--embeddings"), (["--kv-policy", "snapkv", "--kv-unified", "-np", "2"], "--kv-unified"),
    (["-m"], "-m needs a value"), (["-m", "no/such/model.gguf"], "does not exist"), (["-m", "x", "-hf", "y/z"], "one -m or -hf"),
])
def test_mistakes_are_one_sentence(model_path, tmp_path, args, says):
    server = Server(tmp_path/"log", *([] if "-m" in args else ["-m", model_path]), *args)
    assert server.process.wait(timeout=60) == 2
    assert says in server.log.read_text() and len(server.log.read_text().strip().splitlines()) == 1


def test_a_budget_without_a_policy_takes_the_recommended_one(model_path, tmp_path):
    with Server(tmp_path/"log", "-m", model_path, "-c", "512", "--kv-budget", "50%") as server:
        assert server.ok("/props")["kv"] == {"policy": "keydiff", "budget": "50%", "decode_budget": None, "cells": 512}


def test_where_the_model_comes_from(model_path, monkeypatch):
    server = str(serve.program())
    assert serve.command(["-c", "512"]) == [server, "-m", str(model_path), "-c", "512"]
    assert serve.command(["--kv-budget", "25%", "-m", "default", "-np", "2"]) == [server, "-m", str(model_path), "--kv-budget", "25%", "-np", "2"]
    assert serve.command(["--models-dir", "x"]) == [server, "--models-dir", "x"] and serve.command(["-h"]) == [server, "-h"]
    monkeypatch.setenv("LLAMA_ARG_MODEL", "smollm2")
    assert serve.command([]) == [server, "-m", str(model_path)]


def test_without_the_program(monkeypatch, tmp_path):
    monkeypatch.setattr(serve._core, "__file__", str(tmp_path/"_core.so"))
    with pytest.raises(ValueError, match="PYKVC_SERVER=ON"):
        serve.command([])


