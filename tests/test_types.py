"""The Python of README and of the guide, as a type checker reads it."""
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
GIVEN = '''import pykvc
report: str
prompts: list[str]
questions: list[str]
examples: list[str]
documents: list[str]
'''  # what the blocks have from elsewhere


def test_readme_is_typed(tmp_path):
    text = "".join((ROOT/page).read_text(encoding="utf-8") for page in ("README.md", "docs/guide.md"))
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) > 3
    files = [tmp_path/f"block{i}.py" for i in range(len(blocks))]
    for file, block in zip(files, blocks):
        file.write_text(GIVEN + block + "reveal_type(pykvc.LLM().generate('a'))\n", encoding="utf-8")
    checker = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--ignore-missing-imports"]
    result = subprocess.run([*checker, "--cache-dir", tmp_path/"cache", *files], cwd=ROOT, capture_output=True, text=True,
                            timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count('Revealed type is "pykvc.generation.Generation"') == len(blocks)  # and not Any
