"""What the command lines share: usage errors as one sentence, values in comma lists."""
import functools
import inspect
import os
import re
import sys
from typing import Any, Callable, Sequence

import typer


def run(app: typer.Typer) -> None:
    """Entry point. Usage errors, too, are a sentence and no box."""
    sys.path.append(os.getcwd())  # a policy written in Python is named module:Class, as uvicorn names an app
    try:
        status = app(standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):  # of click, or the copy that typer carries
            raise
        status = refuse(error.format_message())
    sys.exit(status if isinstance(status, int) else 0)


def sentences(command: Callable[..., None]) -> Callable[..., None]:
    """ValueError -> its sentence on stderr and exit status 2; Ctrl-C -> 130."""
    @functools.wraps(command)
    def checked(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except ValueError as error:
            raise typer.Exit(refuse(str(error))) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
    return checked


def takes(**groups: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the flags of functions, whose parameters they are; the command is passed what each of them
    returns, by these names."""
    def add(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command).parameters.values() if p.name not in groups]
        of_group = {name: list(inspect.signature(group).parameters.values()) for name, group in groups.items()}

        @functools.wraps(command)
        def call(**given: Any) -> None:
            made = {name: group(**{p.name: given.pop(p.name) for p in of_group[name]}) for name, group in groups.items()}
            command(**given, **made)
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in [*own, *sum(of_group.values(), [])]]
        setattr(call, "__signature__", inspect.Signature(parameters))  # noqa: B010
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        return call
    return add


def refuse(sentence: str) -> int:
    """Arguments are named as Python has them, kv_budget; a shell's user typed --kv-budget."""
    print(re.sub(r"\bkv_(policy|budget|decode_budget|cells|query)\b", as_flag, one_line(sentence)), file=sys.stderr)
    return 2


def one_line(sentence: object) -> str:
    """llama.cpp's reasons may have several."""
    return " ".join(filter(None, map(str.strip, str(sentence).splitlines())))


def as_flag(name: re.Match[str]) -> str:
    return "--" + name.group().replace("_", "-")


def values(given: Sequence[str] | None) -> list[str]:
    """A comma separates values, but not the parameters of one policy: snapkv:window=32,kernel=5,tova are two."""
    return [value.strip() for text in given or () for value in re.split(r",(?![^,:]*=)", text)]


def numbers(given: Sequence[str] | None) -> list[int | str]:
    """values(), whole numbers as ints; what is none is left for the check that names what is valid."""
    return [int(value) if re.fullmatch(r"[+-]?[0-9]+", value) else value for value in values(given)]
