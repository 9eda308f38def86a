"""llama-server's own tests (tools/server/tests of the pinned llama.cpp) on local models, and a comparison of what two
servers made of them.

pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36          # unpacked, its vendor/llama.cpp is SOURCE
    pip install -r SOURCE/tools/server/tests/requirements.txt gguf pytest-timeout
python evals/tools/server_suite.py prepare SOURCE WORK                           # a copy of the tests, and models in
place of theirs
python evals/tools/server_suite.py run WORK LLAMA_SERVER ours.xml [PYTEST_ARG ...]     # under LLAMA_ARG_KV_POLICY and
the like, if set
python evals/tools/server_suite.py compare stock.xml ours.xml                    # counts, and each test that ended
differently

The tests name models of Hugging Face. `prepare` writes a cache as llama-server keeps it, with stand-ins under those
names: random weights, and SmolLM2 and Qwen2.5-Coder of pykvc's own cache. Tests that ask for the words or numbers of
tokens of a certain model fail on them, so `compare` compares their messages, too. Nothing is downloaded.
"""
import os
import re
import shutil
import socket
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import gguf

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT/"tests")]  # last: ./pykvc has no compiled half

from evals.tools import server_models as models  # noqa: E402

CACHE = Path(os.environ.get("PYKVC_CACHE") or Path.home()/".cache/pykvc")/"models"
COMMIT = "0"*40
CONFTEST = '''
ServerPreset.load_all = staticmethod(lambda: None)  # nothing is downloaded


def picture(url, get=requests.get, **how):
    if "huggingface.co" not in url:
        return get(url, **how)
    found = requests.Response()
    found.status_code, found._content = 200, b"P6 8 8 255 " + (url*9).encode()[-192:]  # a PPM
    return found


requests.get = picture
'''


def prepare(source: Path, work: Path) -> None:
    tests = work/"tools/server/tests"
    shutil.copytree(source/"tools/server/tests", tests)
    (work/"models").symlink_to((source/"models").resolve())  # chat templates
    (work/"tools/mtmd").symlink_to((source/"tools/mtmd").resolve())  # a picture
    with open(tests/"conftest.py", "a") as conftest:
        conftest.write(CONFTEST)

    def cached(repo: str, name: str) -> Path:
        folder = work/"cache"/f"models--ggml-org--{repo}"
        path = folder/"snapshots"/COMMIT/name
        for parent in (folder/"refs", path.parent):
            parent.mkdir(parents=True, exist_ok=True)
        (folder/"refs/main").write_text(COMMIT)
        return path

    llama, bert = source/"models/ggml-vocab-llama-spm.gguf", source/"models/ggml-vocab-bert-bge.gguf"
    models.text(cached("test-model-stories260K", "stories260K-F32.gguf"), llama)
    models.encoder(cached("models", "bert-bge-small/ggml-model-f16.gguf"), bert, gguf.PoolingType.CLS)
    models.encoder(cached("models", "jina-reranker-v1-tiny-en/ggml-model-f16.gguf"), bert, gguf.PoolingType.RANK)
    models.text(cached("tinygemma3-GGUF", "tinygemma3-Q8_0.gguf"), llama, "gemma3")
    models.images(cached("tinygemma3-GGUF", "mmproj-tinygemma3.gguf"))
    cached("test-model-stories260K-infill", "stories260K-infill-F32.gguf").symlink_to(CACHE/"qwen2.5-0.5b.gguf")
    cached("stories15M_MOE", "stories15M_MOE-F16.gguf").symlink_to(CACHE/"smollm2-135m.gguf")
    (tests/"tmp").mkdir(exist_ok=True)
    (tests/"tmp/stories15M-q4_0.gguf").symlink_to(CACHE/"smollm2-135m.gguf")
    models.adapter(tests/"tmp/moe_shakespeare15M.gguf", CACHE/"smollm2-135m.gguf")


def run(work: Path, server: Path, report: Path, args: list[str]) -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "LLAMA_SERVER_BIN_PATH": str(server.resolve()), "LLAMA_CACHE": str((work/"cache").resolve()),
           "LLAMA_ARG_OFFLINE": "1", "PORT": str(port)}
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider", "-m", "not slow",
                           "--timeout=120",
                           f"--junitxml={report.resolve()}", *args], cwd=work/"tools/server/tests", env=env).returncode


def outcomes(report: Path) -> dict[str, tuple[str, str]]:
    """Of each test: passed, failure, error or skipped, and the message without what differs from run to run."""
    varying = (r"0x[0-9a-f]+|port=\d+|:\d{4,5}\b|chatcmpl-\w+|resp_\w+|(?:created|completed)_at=[\d.]+"
               r"|ins\.\.\..*")
    found = {}
    for case in xml.parse(report).iter("testcase"):
        bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        message = "" if bad is None else re.sub(varying, "_", bad.get("message") or "")
        found[f"{case.get('classname')}::{case.get('name')}"] = ("passed" if bad is None else bad.tag, message)
    return found


def compare(first: Path, *others: Path) -> None:
    base = outcomes(first)
    for report in (first, *others):
        results = outcomes(report)
        print(report.name, {kind: sum(r[0] == kind for r in results.values())
                            for kind in ("passed", "failure", "error", "skipped")})
        for test in sorted({*base, *results}):
            was, now = base.get(test, ("absent", "")), results.get(test, ("absent", ""))
            if was != now:
                print(f"  {test}\n    {was[0]}: {was[1][:300]!r}\n    {now[0]}: {now[1][:300]!r}")


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    if command == "run":
        sys.exit(run(*map(Path, rest[:3]), rest[3:]))
    {"prepare": prepare, "compare": compare}[command](*map(Path, rest))
