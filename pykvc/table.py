"""The policy table and figures as people read them."""
from typing import Any, Iterable, Sequence

WHEN = """Which to take:
  a document, asked later      keydiff, which a budget alone takes, or kvzip
  a document and the question  finch
  few-shot examples            shotkv
  a chat                       snapkv with --kv-cells
The random ones and streaming_llm do not look at the text: they are controls."""
DECODE = {"none": "kept", "whole": "evicted with the prompt", "generated": "evicted, prompt frozen"}


def mebibytes(n_bytes: int) -> str:
    return f"{n_bytes/2**20:.1f} MiB"


def arxiv(paper: str) -> str:
    return f"[{paper}](https://arxiv.org/abs/{paper})" if paper else ""


def grid(lines: Iterable[Sequence[str]], n_left: int) -> str:
    """A Markdown table: the first line is the header, columns from n_left on stand to the right."""
    header, *rest = lines
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"]*n_left + ["---:"]*(len(header) - n_left), *rest))


def markdown(policies: Sequence[dict[str, Any]]) -> str:
    """The table of docs/policies.md."""
    lines = [["policy", "what it keeps", "generated tokens", "parameters", "paper"]]
    for p in policies:
        parameters = ", ".join(f"{x['name']} {x['value']}" for x in p["params"])
        cells = (f"`{p['name']}`", p["title"], DECODE[p["decode"]], parameters, arxiv(p["paper"]))
        lines.append([cell.replace("|", "\\|") for cell in cells])
    return grid(lines, len(lines[0]))


def show(policies: Sequence[dict[str, Any]], parameters: bool) -> None:
    """Prints the table, or one policy with its parameters."""
    from rich.console import Console
    from rich.markup import escape
    from rich.padding import Padding
    from rich.table import Table
    console = Console()
    if not parameters:
        for p in policies:
            paper = f"; arXiv {p['paper']}" if p["paper"] else ""
            tokens = f"(generated tokens: {DECODE[p['decode']]}{paper})"
            console.print(f"[bold]{escape(p['name'])}[/bold] {tokens}", highlight=False)
            console.print(Padding(escape(p["title"]), (0, 0, 0, 4)), highlight=False)
        console.print(f"\n{WHEN}\n\n`pykvc policies NAME` shows the parameters of one.", markup=False, highlight=False)
        return
    for p in policies:
        console.print(f"[bold]{escape(p['name'])}[/bold]  {escape(p['title'])}")
        paper = f"; arXiv {p['paper']}" if p["paper"] else ""
        console.print(f"Generated tokens: {DECODE[p['decode']]}{paper}.", highlight=False)
        table = Table("parameter", "default", "valid", "meaning", box=None, header_style="bold", pad_edge=False)
        table.columns[0].no_wrap = True
        for x in p["params"]:
            table.add_row(x["name"], x["value"], escape(valid(x)), escape(x["doc"]))
        console.print(table if p["params"] else "It has no parameters.")


def valid(parameter: dict[str, Any]) -> str:
    """The words, or the range, a parameter takes."""
    if parameter["choices"]:
        return ", ".join(parameter["choices"])
    return f"{parameter['min']:.10g} to {parameter['max']:.10g}"
