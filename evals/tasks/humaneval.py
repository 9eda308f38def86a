"""Python functions from their docstrings, pass@1; what is evicted is the prompt that the function is written from.

Paper: Chen et al. 2021, arXiv 2107.03374; data: openai/openai_humaneval (MIT). Greedy, one answer, run with its tests in a sandbox
(evals/sandbox.py). An answer is the whole function, in a code block or not, or, asked plainly, what follows the prompt.
"""
import re

from .. import sandbox
from ..data import rows
from ..items import Item, Options

SETTINGS = {"unsafe_code": False}
FIELDS = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
ENDS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n```")  # of a function body


def load(options: Options) -> list[Item]:
    if not options["unsafe_code"]:
        sandbox.passes("")  # can it be locked in?
    found = rows(options.data_dir, "humaneval/test", ("openai/openai_humaneval", None, "test"), FIELDS)
    return [_item(row, options) for row in found[:options.n]]


def _item(row: dict, options: Options) -> Item:
    gold = {name: row[name] for name in ("prompt", "test", "entry_point")}
    how = dict(id=row["task_id"], gold=gold, max_tokens=512, tags={"unsafe_code": options["unsafe_code"]})
    if options.chat:
        return Item(context=f"```python\n{row['prompt']}```\n\n", question="Complete the Python function above. Answer with the whole function "
                    "in one code block.", query="Complete the Python function above.", **how)
    head, end, tail = row["prompt"].rstrip("\n").rpartition("\n")
    return Item(context=head + end, question=tail + "\n", stop=ENDS, **how)


def score(item: Item, answer: str) -> bool:
    return bool(answer.strip()) and sandbox.passes(program(item, answer), weak=item.tags.get("unsafe_code", False))


def program(item: Item, answer: str) -> str:
    """The prompt, the answer, the tests. A whole function replaces the prompt's, whose imports and helpers stay."""
    gold = item.gold
    blocks = re.findall(r"```(?:[Pp]ython)?[ \t]*\n(.*?)(?:\n```|\Z)", answer, re.DOTALL)
    whole = next((text for text in [*blocks, answer] if re.search(rf"^def {re.escape(gold['entry_point'])}\(", text, re.MULTILINE)), None)
    if whole is None:
        body = "\n" + (blocks[0] if blocks and not answer.lstrip("\n").startswith((" ", "\t")) else answer)
        text = gold["prompt"] + body[1:min([len(body), *(at for at in map(body.find, ENDS) if at >= 0)])]
    else:
        text = gold["prompt"] + "    pass\n\n" + whole
    return f"{text}\n\n{gold['test']}\n\ncheck({gold['entry_point']})\n"
