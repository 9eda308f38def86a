"""`pykvc serve`: what was evaluated is not evaluated again, on every kind of cache we evict from; and what a slot's
file holds."""
import base64
import http.client
import json
import os
import time

import numpy as np
import pytest

import families
import pykvc
import tiny
from evals.tools.served import Server

pytestmark = pytest.mark.server

# And how many layers; qwen35 is a hybrid, with positions of several components, deepseek2 has latent rows.
ARCHS = {"llama": 3, "gemma3": 7, "gpt-oss": 4, "qwen35": 8, "deepseek2": 3}
WINDOWS = ("gemma3", "gpt-oss")
N_SPLIT = 4  # tokens of a hybrid's prompt that llama-server evaluates apart, with a checkpoint before them
POLICIES = ["keydiff", "knorm", "random:seed=3", "snapkv:window=16", "streaming_llm"]
OWN = "snapkv:window=16"  # the server's: its requests may ask for all of these
N_CTX = 2048
RNG = np.random.default_rng(0)
DOCUMENT, *QUESTIONS = [[int(t) for t in RNG.integers(40, 120, n)] for n in (200, 9, 1, 30)]
TURNS = [[int(t) for t in RNG.integers(40, 120, n)] for n in (120, 3, 40, 1, 90, 17)]


@pytest.fixture(scope="module", params=ARCHS)
def arch(request):
    return request.param


@pytest.fixture(scope="module")
def folder(arch, tmp_path_factory):
    folder = tmp_path_factory.mktemp(arch)
    (folder/"slots").mkdir()
    tiny.write_chat(folder/"model.gguf", {}, arch=arch, n_layer=ARCHS[arch], mute_eos=True)
    return folder


def start(folder, *more):
    return Server(folder/"log", "-m", folder/"model.gguf", "-c", 2*N_CTX, "-np", 2, "-t", 1, "--kv-policy", OWN, "--kv-budget", "40%", "--slots", "--metrics",
                  "--slot-save-path", folder/"slots", *more).wait()


@pytest.fixture(scope="module")
def server(folder):
    with start(folder) as server:
        yield server
        assert server.stop() == 0


def llm(folder, policy, budget="40%"):
    return pykvc.LLM(folder/"model.gguf", n_ctx=N_CTX, n_threads=1, kv_policy=policy, kv_budget=budget)


def ask(server, prompt, n=6, slot=0, **more):
    return server.ok("/completion", {"prompt": prompt, "n_predict": n, "temperature": 0, "return_tokens": True, "id_slot": slot, **more})


def generate(own, arch, turn, n=6):
    """In the pieces that the server takes."""
    if arch == "qwen35" and len(turn) > N_SPLIT:
        own.prefill(tokens=turn[:-N_SPLIT])
        turn = turn[-N_SPLIT:]
    return own.generate(tokens=turn, reset=False, compress=True, max_tokens=n)


def erase(server, slot=0):
    server.ok(f"/slots/{slot}?action=erase", {})


def file(server, action, name, slot=0):
    return server.ok(f"/slots/{slot}?action={action}", {"filename": name})


def bits(answer):
    """What two answers have in common if their caches do."""
    return answer["tokens"], answer["kv"]["n_tokens"], answer["kv"]["n_kept"], answer["kv"]["n_evicted"]


# -- a chat that goes on --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("policy", POLICIES)
def test_every_turn_goes_on_from_all_before(folder, arch, server, policy):
    """And says what pykvc.LLM says, whose cache nobody else uses."""
    erase(server)
    tokens, n_evaluated = [], 0
    with llm(folder, policy) as own:
        for turn in TURNS:
            tokens = tokens + turn
            got = ask(server, tokens, kv_policy=policy)
            assert got["timings"]["cache_n"] == n_evaluated and got["timings"]["prompt_n"] == len(tokens) - n_evaluated
            assert got["kv"]["n_evictions"] == 1
            want = generate(own, arch, turn)
            assert got["tokens"] == want.tokens and got["kv"]["n_kept"] == want.kv["cells"]
            tokens, n_evaluated = tokens + got["tokens"], len(tokens) + 5


@pytest.mark.parametrize("policy", POLICIES)
def test_no_way_back_below_the_floor(folder, arch, server, policy):
    """Of the same prompt the last token is evaluated once more, where no head has lost it: keydiff may have, snapkv keeps its window.
    A hybrid goes on from its checkpoint, as often as one likes."""
    last = len(DOCUMENT) - (N_SPLIT if arch == "qwen35" else 1)
    with llm(folder, policy) as own:
        generate(own, arch, DOCUMENT, 0)
        held = set.intersection(*(set(head) for layer in own.kept() for head in layer))
        reuse = set(range(last, len(DOCUMENT))) <= held
        assert reuse == (own._session.ctx.pos_floor() < len(DOCUMENT)) or arch == "qwen35"
    assert reuse or policy in ("keydiff", "knorm", "random:seed=3")
    cold = ask(server, DOCUMENT, cache_prompt=False, kv_policy=policy)
    again = [ask(server, DOCUMENT, kv_policy=policy) for _ in range(2)]
    assert [a["timings"]["cache_n"] for a in again] == [last if reuse else 0]*2
    assert bits(again[0]) == bits(again[1]) and (reuse or bits(again[0]) == bits(cold))
    branch = DOCUMENT[:150] + QUESTIONS[2]
    cold = ask(server, branch, slot=1, cache_prompt=False, kv_policy=policy)
    assert ask(server, branch, kv_policy=policy)["timings"]["cache_n"] == 0
    assert bits(ask(server, branch, cache_prompt=False, kv_policy=policy)) == bits(cold)


def test_back_to_the_end_of_the_context(server):
    """An answer can be taken back: all that was evicted lies before it, and a recurrent state is remembered."""
    first = ask(server, DOCUMENT, cache_prompt=False, kv_policy="keydiff")
    got = [ask(server, DOCUMENT + question, kv_policy="keydiff") for question in QUESTIONS[:1]]
    assert first["kv"]["n_evictions"] == 1 and got[0]["timings"]["cache_n"] == len(DOCUMENT)


def test_the_host_cache_on_every_kind_of_cache(server):
    """A prompt that another one pushed out of its slot comes back and goes on."""
    for slot in 0, 1:
        erase(server, slot)
    first = ask(server, DOCUMENT, kv_policy="keydiff")
    on = DOCUMENT + first["tokens"] + QUESTIONS[0]
    for slot in 0, 1, 0:
        ask(server, TURNS[4][slot:], slot=slot, kv_policy="keydiff")
    back = ask(server, on, kv_policy="keydiff")
    assert back["timings"]["cache_n"] == len(DOCUMENT) + 5


def test_the_host_cache_takes_an_answer_back(arch, server):
    """A recurrent state of the document's end is in what comes back; the windows there have gone by."""
    own = DOCUMENT[::-1]  # which no other test has left there
    first = ask(server, own, 12, cache_prompt=False, kv_policy="keydiff")
    for slot in 0, 1, 0:
        ask(server, TURNS[4][slot + 1:], slot=slot, kv_policy="keydiff")
    got = ask(server, own + first["tokens"][:3] + QUESTIONS[0], kv_policy="keydiff")
    assert got["timings"]["cache_n"] == (0 if arch in WINDOWS else len(DOCUMENT) + (0 if arch == "qwen35" else 3))


# -- prompts are evicted, however short the answer ----------------------------------------------------------------------------

@pytest.mark.parametrize("policy", ["keydiff", OWN])
@pytest.mark.parametrize("n", [0, 1, 2])
def test_short_answers_evict_as_llm_does(folder, arch, server, policy, n):
    got = ask(server, DOCUMENT, n, cache_prompt=False, kv_policy=policy)
    with llm(folder, policy) as own:
        want = generate(own, arch, DOCUMENT, n)
        assert got["tokens"][:n] == want.tokens and got["kv"]["n_evictions"] == want.kv["evictions"] == 1
        assert got["kv"]["n_kept"] == want.kv["cells"] and got["kv"]["n_tokens"] == own.n_tokens
    if n < 2:
        assert got["kv"]["n_evicted"] == 120  # of the mean layer: 80 of 200 stay
    slot = next(slot for slot in server.ok("/slots") if slot["id"] == 0)
    assert slot["kv"]["n_kept"] == got["kv"]["n_kept"]
    assert file(server, "save", "short")["n_written"] < 0.85*full_file(server)


def full_file(server):
    ask(server, DOCUMENT, 1, cache_prompt=False, kv_policy="full")
    return file(server, "save", "full")["n_written"]


def test_short_answers_beside_others(server):
    """What ends with its first token is evicted once all slots have sampled; streams, grammars and several answers do
    the same."""
    alone = [ask(server, DOCUMENT, 40, cache_prompt=False), ask(server, TURNS[0], 1, cache_prompt=False)]
    connection, events = server.stream("/completion", {"prompt": DOCUMENT, "n_predict": 40, "temperature": 0, "id_slot": 0, "cache_prompt": False})
    next(events)
    beside = ask(server, TURNS[0], 1, slot=1, cache_prompt=False)
    *rest, last = events
    connection.close()
    assert bits(beside) == bits(alone[1])
    assert last["kv"]["n_kept"] == alone[0]["kv"]["n_kept"]

    _, events = server.stream("/completion", {"prompt": DOCUMENT, "n_predict": 1, "cache_prompt": False})
    assert list(events)[-1]["kv"]["n_evictions"] == 1
    two = server.ok("/v1/completions", {"prompt": DOCUMENT, "max_tokens": 1, "n": 2, "temperature": 0, "cache_prompt": False})
    assert len(two["choices"]) == 2 and two["kv"]["n_evictions"] == 1
    assert all(slot["kv"]["n_kept"] < 100 for slot in server.ok("/slots"))


def test_a_budget_that_a_short_answer_finds_out(server):
    """Only the eviction sees that shots do not fit, and the reply is its."""
    body = {"prompt": DOCUMENT, "n_predict": 1, "kv_policy": "shotkv:window=16", "kv_budget": 50, "kv_spans": [[0, 40]], "cache_prompt": False}
    status, reply = server.post("/completion", body)
    assert status == 400 and "outside every span" in reply["error"]["message"]
    assert ask(server, DOCUMENT, 2)["content"] is not None


# -- a document, asked again and again ------------------------------------------------------------------------------------

def test_a_document_is_saved_once_and_asked_by_another_server(folder, arch, server):
    """Each question is evaluated alone: after n_predict 0, after an answer of two tokens, after an eviction on demand.
    A hybrid's file has two recurrent states then, that of the document's end beside that of its own."""
    ways = {"0": {"n": 0}, "2": {"n": 2}, "demand": {"n": 0, "kv_policy": "full"}}
    for policy in POLICIES:
        for way, how in ways.items():
            ask(server, DOCUMENT, cache_prompt=False, **{"kv_policy": policy, **how})
            if way == "demand":
                reply = server.ok("/slots/0?action=compress", {"kv_policy": policy})
                assert reply["id_slot"] == 0 and (reply["kv"]["n_evictions"], reply["kv"]["n_evicted"]) == (1, 120)
            file(server, "save", policy.partition(":")[0] + way)
    with start(folder) as other:
        for policy in POLICIES:
            with llm(folder, policy) as own:
                generate(own, arch, DOCUMENT, 0)
                own.save(folder/"state")
                for question in QUESTIONS:
                    own.load(folder/"state")
                    want = generate(own, arch, question)
                    for way in ways:
                        file(other, "restore", policy.partition(":")[0] + way)
                        got = ask(other, DOCUMENT + question, kv_policy=policy)
                        assert (got["timings"]["cache_n"], got["timings"]["prompt_n"]) == (len(DOCUMENT), len(question)), (policy, way)
                        assert got["tokens"] == want.tokens and got["kv"]["n_kept"] == want.kv["cells"], (policy, way)


def test_a_window_that_a_file_lacks(folder, arch, server):
    """A file holds the sliding windows of its end. Farther back there is no way, but where there are none: a recurrent state of the
    document's end is in it."""
    first = ask(server, DOCUMENT, 12, cache_prompt=False, kv_policy="keydiff")
    file(server, "save", "late")
    cold = ask(server, DOCUMENT + QUESTIONS[0], cache_prompt=False, kv_policy="keydiff")
    file(server, "restore", "late")
    got = ask(server, DOCUMENT + QUESTIONS[0], kv_policy="keydiff")
    assert got["timings"]["cache_n"] == (0 if arch in WINDOWS else len(DOCUMENT))
    assert arch not in WINDOWS or bits(got) == bits(cold)
    file(server, "restore", "late")
    on = ask(server, DOCUMENT + first["tokens"] + QUESTIONS[0], kv_policy="keydiff")
    assert on["timings"]["cache_n"] == len(DOCUMENT) + 11


def test_compress_on_demand(server):
    """As an answer would: what follows goes on from it if it asks for the same, and is evaluated anew if not."""
    ask(server, DOCUMENT, 0, cache_prompt=False)
    fields = {"kv_policy": "keydiff", "kv_budget": 40}
    kv = server.ok("/slots/0?action=compress", fields)["kv"]
    assert (kv["policy"], kv["budget"], kv["n_tokens"], kv["n_evicted"], kv["n_evictions"]) == ("keydiff", "40", 200, 40, 1)
    assert server.ok("/slots")[0]["kv"]["n_kept"] == kv["n_kept"] < 60
    assert server.ok("/slots/0?action=compress", fields)["kv"]["n_evictions"] == 0  # it is met
    assert ask(server, DOCUMENT + QUESTIONS[0], **fields)["timings"]["cache_n"] == len(DOCUMENT)
    assert ask(server, DOCUMENT + QUESTIONS[1])["timings"]["cache_n"] == 0
    metric = "llamacpp:kv_cells_used "
    used = [float(line[len(metric):]) for line in server.get("/metrics")[1].splitlines() if line.startswith(metric)]
    assert server.post("/slots/0?action=compress", b"")[0] == 200 and used[0] > 0


@pytest.mark.parametrize("body, says", [
    ({"kv_policy": "full"}, "keydiff"), ({"kv_policy": "snapvk"}, "snapkv"), ({"kv_budget": 0}, "kv_budget"), ({"kv_budget": 4}, "at least"),
    ({"kv_spans": "message"}, "no chat"), ({"budget": 3}, "kv_budget"), ([], "JSON object"), (b"{", "JSON object"), ({"kv_policy": 1}, "name of a policy"),
])
def test_mistakes_in_compress_are_400(server, body, says):
    ask(server, DOCUMENT, 0, cache_prompt=False)
    before = server.ok("/slots")[0]["kv"]
    status, reply = server.post("/slots/0?action=compress", body)
    assert status == 400 and says in reply["error"]["message"]
    assert server.ok("/slots")[0]["kv"]["n_kept"] == before["n_kept"]


def test_compress_needs_something_in_the_slot(server):
    erase(server)
    status, reply = server.post("/slots/0?action=compress", {})
    assert status == 400 and "n_predict 0" in reply["error"]["message"]
    status, reply = server.post("/slots/0?action=squash", {})
    assert status == 400 and "compress" in reply["error"]["message"]


def test_files_that_are_none_leave_the_slot(folder, server):
    """The conversation of a misspelt name goes on."""
    first = ask(server, DOCUMENT, cache_prompt=False)
    file(server, "save", "whole")
    data = (folder/"slots"/"whole").read_bytes()
    (folder/"slots"/"cut").write_bytes(data[:1000])
    (folder/"slots"/"changed").write_bytes(data[:500] + b"?" + data[501:])
    (folder/"slots"/"empty").write_bytes(b"")
    (folder/"slots"/"folder").mkdir(exist_ok=True)
    if not (folder/"slots"/"pipe").exists():
        os.mkfifo(folder/"slots"/"pipe")
        (folder/"slots"/"dangling").symlink_to("nowhere")
    for name in "missing", "dangling", "folder", "pipe", "cut", "changed", "empty":
        status, reply = server.post("/slots/0?action=restore", {"filename": name})
        assert status == 400 and "file" in reply["error"]["message"], name
    got = ask(server, DOCUMENT + first["tokens"] + QUESTIONS[0])
    assert got["timings"]["cache_n"] == len(DOCUMENT) + 5


# -- one server each --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    (folder/"slots").mkdir()
    tiny.write_chat(folder/"model.gguf", {}, n_layer=3, mute_eos=True)
    return folder


def test_sums_have_no_way_back(llama):
    """h2o adds up what every query gave, and goes on from its end alone."""
    with start(llama, "--kv-policy", "h2o") as server:
        first = ask(server, DOCUMENT)
        on = DOCUMENT + first["tokens"] + QUESTIONS[0]
        assert ask(server, on)["timings"]["cache_n"] == len(DOCUMENT) + 5
        assert bits(ask(server, DOCUMENT)) == bits(first)
        ask(server, DOCUMENT, 0, cache_prompt=False)
        assert ask(server, DOCUMENT + QUESTIONS[0])["timings"]["cache_n"] == len(DOCUMENT)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    (folder/"slots").mkdir()
    tiny.write_chat(folder/"model.gguf", {}, arch="qwen35", n_layer=4, mute_eos=True)
    with start(folder, "-ub", 64, "-b", 128, "--ctx-checkpoints", 3) as server:
        yield server


@pytest.mark.parametrize("policy", ["full", OWN, "keydiff"])
def test_a_hybrid_goes_on_from_the_nearest_state(hybrid, policy):
    """llama-server's checkpoints of recurrent states, 4 tokens before a prompt's end and n_ubatch before that. They are gone where the
    tokens behind them were evicted; and what was evicted for one prompt is no start for another."""
    n = len(DOCUMENT)
    cold = ask(hybrid, DOCUMENT, cache_prompt=False, kv_policy=policy)
    same = ask(hybrid, DOCUMENT, kv_policy=policy)
    assert same["timings"]["cache_n"] == (0 if policy == "keydiff" else n - N_SPLIT)
    assert policy == OWN or bits(same) == bits(cold)
    for at, state in (n - 2, n - N_SPLIT), (n - 30, n - N_SPLIT - 64), (n - 80, 0):
        ask(hybrid, DOCUMENT, cache_prompt=False, kv_policy=policy)
        branch = DOCUMENT[:at] + QUESTIONS[2]
        got = ask(hybrid, branch, kv_policy=policy)
        assert got["timings"]["cache_n"] == (state if policy == "full" else 0), at
        assert bits(got) == bits(ask(hybrid, branch, cache_prompt=False, kv_policy=policy)), at


def test_without_a_policy_nothing_is_compressed(llama):
    with Server(llama/"log", "-m", llama/"model.gguf", "-c", N_CTX, "-np", 1) as server:
        status, reply = server.post("/slots/0?action=compress", {})
        assert status == 400 and "--kv-policy" in reply["error"]["message"]
        assert server.post("/slots/0?action=squash", {})[0] == 501


def test_who_leaves_frees_the_slot_whatever_others_get(llama):
    """Not only once its answer is over: others' replies do not put off the question whether it is still there."""
    n = 20000
    with Server(llama/"log", "-m", llama/"model.gguf", "-c", n + 1000, "-t", 1, "--slots", "--override-kv", f"llama.context_length=int:{2*n}",
                "--kv-policy", OWN, "--kv-budget", "40%") as server:
        def slot():  # this, too, is a reply to another
            return server.ok("/slots")[0]
        waiting = http_post(server, {"prompt": DOCUMENT, "n_predict": n})
        while not slot()["is_processing"]:
            pass
        waiting.close()
        while (now := slot())["is_processing"] and now["next_token"][0]["n_decoded"] < n/2:
            time.sleep(0.05)
        assert not now["is_processing"]


def http_post(server, body):
    """The connection of a request whose reply nobody reads."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("POST", "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"})
    return connection


# -- images -----------------------------------------------------------------------------------------------------------------

IMAGE = base64.b64encode(b"P6 56 56 255\n" + bytes(range(256))*36 + bytes(56*56*3 - 256*36)).decode()  # a netpbm picture


def test_an_image_is_400_where_its_positions_are_no_count_of_tokens(tmp_path):
    """Neither its slot nor the one that answers meanwhile notices. Without a policy it is looked at."""
    model = tiny.write_chat(tmp_path/"model.gguf", {}, arch="qwen2vl", n_layer=2, mute_eos=True)
    how = ("-m", model, "--mmproj", families.write_eye(tmp_path/"eye.gguf"), "--no-warmup", "-c", 2*N_CTX, "-np", 2, "-t", 1)

    def seen(server, **more):
        prompt = {"prompt_string": f"a {server.ok('/props')['media_marker']} b", "multimodal_data": [IMAGE]}
        return {"prompt": prompt, "n_predict": 4, "id_slot": 0, "temperature": 0, **more}
    with Server(tmp_path/"log", *how).wait() as server:
        assert server.ok("/completion", seen(server))["timings"]["prompt_n"] > 4
    with Server(tmp_path/"log", *how, "--kv-policy", OWN, "--kv-budget", "40%", "--slots").wait() as server:
        alone = ask(server, TURNS[0], 40, slot=1, cache_prompt=False)
        first = ask(server, DOCUMENT)
        connection, events = server.stream("/completion", {"prompt": TURNS[0], "n_predict": 40, "temperature": 0, "id_slot": 1, "cache_prompt": False})
        next(events)
        for policy in ({}, {"kv_policy": "full"}):
            status, reply = server.post("/completion", seen(server, **policy))
            assert status == 400 and "images" in reply["error"]["message"], reply
        *_, last = events
        connection.close()
        assert last["kv"]["n_kept"] == alone["kv"]["n_kept"] and last["tokens_predicted"] == 40
        on = ask(server, DOCUMENT + first["tokens"] + QUESTIONS[0])
        assert on["timings"]["cache_n"] == len(DOCUMENT) + 5
