"""Python functions from their docstrings, pass@1. Without examples what is evicted is the prompt that the function is
written from. With --shots, as in KVFundaBench, that is the question, and what is evicted are examples, whole functions.

Examples are of the second half of the rows, questions then of the first: --draw N draws other ones with seed N.

Paper: Chen et al. 2021, arXiv 2107.03374; data: openai/openai_humaneval (MIT). Greedy, one answer, run in a sandbox
(evals/sandbox.py) as openai/human-eval's execution.py runs it: the prompt, the answer and the tests, `exec`ed in an
empty namespace, so that nothing under `if __name__ == "__main__":` is run. human-eval only knows answers that go on
after the prompt. Here an answer may also be the whole function, in a code block or not, between whatever a chat model
says. What else is not as there: 10 seconds instead of 3; the tests call the function from a process of their own (see
sandbox.passes).
"""
import ast
import itertools
import re
import textwrap
import warnings
from typing import Iterator

from .. import sandbox
from ..data import apart, of_draw, rows
from ..items import Item, Options

SETTINGS = {"shots": 0, "draw": 0, "fresh": 0, "unsafe_code": False}
FIELDS = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
ASK = "Complete the Python function above. Answer with the whole function in one code block."
STUB = "    pass\n\n"  # ends the prompt's function
FENCE = re.compile(r"^[ \t]*(?:[-*]|\d+[.)])?[ \t]*```[ \t]*([\w+#.-]*)[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)",
                   re.MULTILINE | re.DOTALL)
PYTHON = ("", "python", "python3", "py", "py3")
CODE = re.compile(r"^(?:def|async def|class|import|from|@)(?!\w)", re.MULTILINE)  # where a module may begin
ENDS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n```")  # of a function body


def load(options: Options) -> list[Item]:
    if not options["unsafe_code"]:
        sandbox.passes("")  # can it be locked in?
    found = rows(options.data_dir, "humaneval/test", ("openai/openai_humaneval", None, "test"), FIELDS)
    asked, examples = apart(found, options["shots"], options["draw"])
    return [_item(row, examples, options) for row in of_draw(asked, options.n, options["fresh"], options["draw"])]


def _item(row: dict, examples: list[dict], options: Options) -> Item:
    gold = {name: row[name] for name in ("prompt", "test", "entry_point")}
    how = dict(gold=gold, max_tokens=512, tags={"unsafe_code": options["unsafe_code"]})
    if examples:
        how["id"] = f"{row['task_id']}/{len(examples)}-shots" + f"-draw{options['draw']}"*bool(options["draw"])
        shots = [example["prompt"] + example["canonical_solution"] for example in examples]
        if options.chat:
            return Item(lead="These Python functions are complete:\n\n",
                        shots=[f"```python\n{shot}```\n\n" for shot in shots],
                        question=f"```python\n{row['prompt']}```\n\n{ASK}", query=row["prompt"], **how)
        return Item(shots=[shot.rstrip("\n") + "\n\n\n" for shot in shots], question=row["prompt"], stop=ENDS, **how)
    how["id"] = row["task_id"]
    if options.chat:
        return Item(context=f"```python\n{row['prompt']}```\n\n", question=ASK,
                    query="Complete the Python function above.", **how)
    head, end, tail = row["prompt"].rstrip("\n").rpartition("\n")
    return Item(context=head + end, question=tail + "\n", stop=ENDS, **how)


def score(item: Item, answer: str) -> bool:
    gold, weak = item.gold, item.tags.get("unsafe_code", False)
    tests = sandbox.Tests(gold["prompt"] + STUB, gold["test"], gold["entry_point"])
    return bool(answer.strip()) and sandbox.passes(program(item, answer), tests, weak)


def program(item: Item, answer: str) -> str:
    """The prompt and the answer. A whole function replaces the prompt's, whose imports and helpers stay."""
    gold = item.gold
    blocks = [textwrap.dedent(text) for language, text in FENCE.findall(answer) if language.lower() in PYTHON]
    defined = re.compile(rf"^(?:async )?def {re.escape(gold['entry_point'])}\s*\(", re.MULTILINE)
    whole = next((text for text in itertools.chain(blocks, _modules(answer)) if defined.search(text)), None)
    if whole is not None:
        return gold["prompt"] + STUB + whole
    if blocks and not answer.lstrip("\n").startswith((" ", "\t")):
        return gold["prompt"] + textwrap.indent(blocks[0], "    ")
    body = "\n" + answer
    return gold["prompt"] + body[1:min([len(body), *(at for at in map(body.find, ENDS) if at >= 0)])]


def _modules(answer: str) -> Iterator[str]:
    """From each line on that may begin a module, the longest run of lines that is one: no prose before and after."""
    for begin in CODE.finditer(answer):
        lines = answer[begin.start():].splitlines(keepends=True)
        runs = ("".join(lines[:end]) for end in range(len(lines), 0, -1))
        yield next(filter(_parses, runs), "")


def _parses(text: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its escapes
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
