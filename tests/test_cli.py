"""The command line: what it prints, and that mistakes are one sentence and exit status 2."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import pykvc
from pykvc import options, table
from pykvc.cli import app
from pykvc.demo import compose

PAGE = Path(__file__).parent.parent / "docs/policies.md"
PROMPT = "The cat sat on the mat. The dog lay on the rug. " * 12


def invoke(*args, env=None):
    return CliRunner().invoke(app, [str(arg) for arg in args], env=env)


def pykvc_process(cwd, *args):  # not the repository root, where `import pykvc` would find the sources
    return subprocess.run([sys.executable, "-m", "pykvc.cli", *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=300)


def test_policies_lists_the_table():
    result = invoke("policies")
    assert result.exit_code == 0
    for policy in pykvc.policies():
        assert policy["name"] in result.stdout


def test_policies_json_is_the_table():
    assert json.loads(invoke("policies", "--json").stdout) == pykvc.policies()


def test_policies_name_shows_every_parameter():
    for policy in pykvc.policies():
        result = invoke("policies", policy["name"])
        assert result.exit_code == 0 and policy["name"] in result.stdout
        assert all(parameter["name"] in result.stdout for parameter in policy["params"])


def test_the_page_has_the_table():
    between = PAGE.read_text().split("<!-- policies -->")[1].split("<!-- /policies -->")[0].strip()
    assert between == table.markdown(pykvc.policies()), "run `pykvc policies --markdown` and put it into docs/policies.md"
    assert between == invoke("policies", "--markdown").stdout.strip()


def test_generate_json_is_one_object(model_path):
    result = invoke("generate", "-m", model_path, "-p", PROMPT, "-n", 6, "-c", 1024, "-ub", 128, "-ngl", 0, "-fa", "auto",
                    "-ctk", "f16", "-ctv", "f16", "-s", 3, "--kv-policy", "streaming_llm:sinks=2", "--kv-budget", 64, "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert list(answer) == ["text", "tokens", "model", "policy", "n_prompt", "n_predicted", "kv", "timings"]
    assert list(answer["kv"]) == ["cells", "kept", "bytes_allocated", "bytes_used", "bytes_full"]
    assert list(answer["timings"]) == ["prefill_ms", "probe_ms", "evict_ms", "decode_ms", "prefill_tps", "decode_tps"]
    assert answer["policy"].startswith("streaming_llm:sinks=2") and set(answer["kv"]["kept"]) == {64}
    assert answer["n_predicted"] == len(answer["tokens"]) and answer["kv"]["bytes_used"] < answer["kv"]["bytes_full"]


def test_generate_text_and_question_out(model_path, tmp_path):
    context = tmp_path / "context.txt"
    context.write_text(PROMPT)
    result = invoke("generate", "-m", model_path, "-f", context, "--question", "The cat sat on the", "-n", 4, "--segment", "sentence",
                    "--kv-policy", "shotkv", "--kv-budget", "50%", "--stop", "\\n")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() and "t/s" in result.stderr and "t/s" not in result.stdout


def test_environment(model_path):
    env = {"LLAMA_ARG_MODEL": str(model_path), "LLAMA_ARG_KV_POLICY": "streaming_llm", "LLAMA_ARG_KV_BUDGET": "48", "LLAMA_ARG_CTX_SIZE": "512"}
    result = invoke("generate", "-p", PROMPT, "-n", 2, "--json", env=env)
    assert result.exit_code == 0, result.stderr
    assert set(json.loads(result.stdout)["kv"]["kept"]) == {48}


@pytest.mark.parametrize("args, says", [
    (["generate"], "-p TEXT or -f FILE"),
    (["generate", "-p", "a", "-f", "b"], "one of them"),
    (["generate", "-f", "no/such/file"], "no/such/file"),
    (["generate", "-p", "a", "-m", "no/such/model.gguf"], "does not exist"),
    (["generate", "-p", "a", "-m", __file__], "GGUF"),
    (["generate", "-p", "a", "-m", "x", "-hf", "y/z"], "not both"),
    (["generate", "-p", "a", "--kv-policy", "snapvk"], "snapkv"),
    (["generate", "-p", "a", "--kv-policy", "snapkv:windows=3", "--kv-budget", "9"], "window"),
    (["generate", "-p", "a", "--kv-policy", "snapkv"], "--kv-budget (512 tokens"),
    (["generate", "-p", "a", "--kv-policy", "snapkv", "--kv-budget", "150%"], "--kv-budget"),
    (["generate", "-p", "a", "-ctk", "q3"], "q8_0"),
    (["generate", "-p", "a", "-fa", "maybe"], "'on' or True, 'off' or False, or 'auto'"),
    (["generate", "-p", "a", "-j", '{"type": "objekt"}'], "objekt"),
    (["generate", "-p", "a", "-j", __file__], "-jf "),
    (["generate", "-p", "a", "-j", "{}", "-jf", "b"], "not both"),
    (["generate", "-p", "a", "-jf", "no/such/file"], "no/such/file"),
    (["generate", "-p", "a", "--kv-policy", "finch", "--kv-budget", "99"], "give --kv-query"),
    (["generate", "-p", "a", "--grammar", "a", "--grammar-file", "b"], "not both"),
    (["generate", "-p", "a", "--grammar", "a", "-j", "{}"], "not both"),
    (["generate", "-p", "a", "-j", "{"], "json_schema"),
    (["generate", "-p", "a", "--grammar-file", "no/such/file"], "no/such/file"),
    (["generate", "-p", "a", "--lora", "no/such.gguf"], "no/such.gguf"),
    (["generate", "-p", "a", "-ts", "a,b"], "-ts"),
    (["generate", "-p", "a", "-mg", "63"], "GPU"),
    (["serve", "--kv-policy", "module:Class"], "written in Python"),
    (["policies", "snapvk"], "snapkv"),
    (["pull", "smollm"], "smollm2-135m"),
])
def test_mistakes_are_one_sentence(args, says):
    result = invoke(*args)
    assert result.exit_code == 2 and not result.stdout
    assert says in result.stderr and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_generate_follows_a_schema(model_path, tmp_path):
    schema = '{"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}'
    result = invoke("generate", "-m", model_path, "-p", "A city:", "-n", 40, "-j", schema, "--temp", 1, "--presence-penalty", 0.5)
    assert json.loads(result.stdout)["city"] in ("Rome", "Oslo")
    (tmp_path/"schema").write_text(schema)
    result = invoke("generate", "-m", model_path, "-p", "A city:", "-n", 40, "-jf", tmp_path/"schema")
    assert json.loads(result.stdout)["city"] in ("Rome", "Oslo")
    (tmp_path/"grammar").write_text('root ::= "yes" | "no"')
    result = invoke("generate", "-m", model_path, "-p", "Is it?", "-n", 40, "--grammar-file", tmp_path/"grammar")
    assert result.stdout.strip() in ("yes", "no")


@pytest.mark.parametrize("words, means", [(("on", "true", "True", "1", "enabled", True), "on"),
                                          (("off", "False", "0", False), "off"), (("auto", "-1"), "auto")])
def test_flash_attention_takes_the_words_of_llama_cpp(words, means):
    assert [options.flash_attn(word) for word in words] == [means]*len(words)


@pytest.mark.parametrize("args, says", [(["generate", "--bogus"], "--bogus"), (["generate", "-n", "x", "-p", "a"], "-n"), (["nothing"], "nothing")])
def test_usage_errors_are_one_sentence(tmp_path, args, says):
    result = pykvc_process(tmp_path, *args)
    assert result.returncode == 2 and says in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_version(tmp_path):
    result = pykvc_process(tmp_path, "--version")
    assert result.returncode == 0 and result.stdout == f"pykvc {pykvc.__version__}\n"


def test_pull_prints_the_path(model_path):
    assert invoke("pull", "smollm2-135m").stdout.strip() == str(model_path)
    assert os.path.getsize(model_path) == 98_362_432


def test_demo_prompt_is_the_same_everywhere():
    shots, question, right = compose()
    assert compose() == (shots, question, right)
    assert len(set(shots)) == len(shots) > 50
    assert not any("Italy" in shot for shot in shots) and "Rome" in right
