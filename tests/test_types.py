"""The Python of README and of the guide, as type checkers read it."""
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
GIVEN = '''import pykvc
report = ""
prompts, questions, examples, documents = [""], [""], [""], [""]
'''  # what the blocks have from elsewhere


def written(tmp_path):
    """A file for each block."""
    text = "".join((ROOT/page).read_text(encoding="utf-8") for page in ("README.md", "docs/guide.md"))
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) > 3
    files = [tmp_path/f"block{i}.py" for i in range(len(blocks))]
    for file, block in zip(files, blocks):
        file.write_text(GIVEN + block + "reveal_type(pykvc.LLM().generate('a'))\n", encoding="utf-8")
    return files


def test_readme_is_typed(tmp_path):
    files = written(tmp_path)
    checker = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--ignore-missing-imports"]
    result = subprocess.run([*checker, "--cache-dir", tmp_path/"cache", *files], cwd=ROOT, capture_output=True, text=True,
                            timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count('Revealed type is "pykvc.generation.Generation"') == len(files)  # and not Any


def test_pyright_agrees(tmp_path):
    """basedpyright is pyright with its program in the wheel."""
    files = written(tmp_path)
    (tmp_path/"pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "strict", "extraPaths": [str(ROOT)], "pythonVersion": "3.10",
                                                           "reportPrivateUsage": False, "reportMissingTypeStubs": False, "reportDuplicateImport": False}))
    result = subprocess.run([sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable, "--project", tmp_path], cwd=tmp_path,
                            capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count('is "Generation"') == len(files)
