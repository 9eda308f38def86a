"""What LLM and generate() accept, checked once at the door. Every function raises ValueError naming what is valid."""
import ast
import difflib
import importlib
import math
import os
import re
import secrets
import sys
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Iterable, cast

from . import _core, rpc
from .policy import Policy

if TYPE_CHECKING:
    from .session import Session

N_CTX_MAX = 2**31 - 256  # llama.cpp rounds up to 256, and counts positions in 31 bits
CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


def whole(name: str, value: Any, low: int, high: int = 2**31 - 1) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= cast(int, value) <= high:
        raise ValueError(f"{name} is a whole number of [{low}, {high}], not {value!r}")
    return int(value)


def nearest(name: str, valid: Iterable[str]) -> str:
    """Behind a sentence that refuses a name: which one was meant, or all that there are."""
    valid = sorted(valid)
    found = [other for other in valid if other.startswith(name)] or difflib.get_close_matches(name, valid, 1)
    return f": did you mean {found[0]!r}?" if found else f": there are {', '.join(valid)}"


def checked_seed(value: Any) -> int:
    """-1: a random one, as in llama.cpp. 2**32 - 1, llama.cpp's own word for that, is as the one before it."""
    seed = whole("seed", value, -1, 2**32 - 1)
    return secrets.randbelow(2**32 - 1) if seed == -1 else min(seed, 2**32 - 2)


def number(name: str, value: Any, low: float, high: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= cast(float, value) <= high:
        raise ValueError(f"{name} is a number of [{low:g}, {high:g}], not {value!r}")
    return float(value)


def budget(name: str, value: int | float | str | None) -> str:
    """As the engine reads it, always the same for the same: "" none, "512" tokens, "0.25" retained ratio.

    kvpress' compression_ratio is 1 - the retained ratio."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (Integral, Real, str)):
        raise ValueError(f"{name} is a number of tokens, a retained ratio in (0, 1] or a string such as '25%', not {value!r}")
    if isinstance(value, str):
        text = value.strip()
    elif isinstance(value, Integral):
        text = str(int(value))
    elif 0 < value <= 1:  # 1.0 is the whole prompt, "1" would be one token
        text = "100%" if value == 1 else f"{value:.12g}"
    else:
        raise ValueError(f"{name} as a float is a retained ratio in (0, 1], not {value!r}; an int is a number of tokens")
    kind, amount = _core.parse_budget(text, name)
    return "" if kind == "none" else f"{int(amount)}" if kind == "tokens" else "100%" if amount == 1 else f"{amount:.12g}"


def budgets(kv_budget: Any, kv_decode_budget: Any, n: int, session: "Session") -> list[tuple[str, str] | None]:
    """(kv_budget, kv_decode_budget) of n prompts. Each is one value for all or a list of them, None the context's own;
    None: both are."""
    found = []
    for name, value in (("kv_budget", kv_budget), ("kv_decode_budget", kv_decode_budget)):
        values = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]*n
        if len(values) != n:
            raise ValueError(f"{name} is one value or a list of {n}, one for each prompt, not of {len(values)}")
        given = [budget(name, v) for v in values]
        if any(given) and not session.evicts:
            raise ValueError(f"{name}: the policy is full, which keeps everything; name one that evicts when the LLM is made")
        found.append([(v, v or session.setup[name]) for v in given])
    pairs = [(prompt, decode) if own or own_decode else None for (own, prompt), (own_decode, decode) in zip(*found)]
    for pair in set(filter(None, pairs)):
        session.ctx.check_budget(*pair)
    return pairs


def one_of(name: str, value: Any, other: str, again: Any) -> Any:
    """What was given under one of two names."""
    if value is not None and again is not None:
        raise ValueError(f"{name} and {other} are the same: give one of them")
    return again if value is None else value


def names() -> set[str]:
    """Of the built-in policies."""
    return {p["name"] for p in _core.policies()}


def cells(value: int | str | None) -> str:
    """As the engine reads it: "" as many as n_ctx, "2048" cells of a sequence, "512MiB" of all of them; or "auto"."""
    if value is None or value == "":
        return ""
    if isinstance(value, str):
        return value.strip()
    return str(whole("kv_cells", value, 1))


def policy(value: str | Policy | None, kv_budget: str, kv_decode_budget: str, kv_cells: str = "") -> str | Policy:
    """The canonical spec, or the instance. None: full, or with a budget the recommended one.

    A policy that no budget would ever let evict is refused."""
    if value is None and (kv_budget or kv_decode_budget or kv_cells):
        value = next(p["name"] for p in _core.policies() if p["recommended"])
        print(f"kv_policy: {value}, the recommended one for a budget without a policy", file=sys.stderr)
    elif value is None:
        value = "full"
    checked: str | Policy
    if isinstance(value, str):
        value = written_in_python(value) or value
    if isinstance(value, str):
        checked = _core.parse_spec(value)
        name = checked.partition(":")[0]
    elif isinstance(value, Policy):
        value._check()
        checked, name = value, value.name
        if name in names():
            raise ValueError(f"{type(value).__name__}.name is {name!r}, which is a built-in policy: choose another")
    else:
        raise ValueError(f"kv_policy is a spec such as 'snapkv:window=32' or an instance of pykvc.Policy, not {value!r}")
    if name != "full" and not kv_budget and not kv_decode_budget and not kv_cells:
        raise ValueError(f"kv_policy {name!r} evicts nothing without a budget: give kv_budget (512 tokens, or '25%' of "
                         "the prompt), kv_decode_budget or kv_cells")
    return checked


def in_python(spec: str) -> tuple[str, str, str] | None:
    """(module, class, arguments) of "module:Class:key=value,..."; None: it is none."""
    named = re.fullmatch(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)(?::(.*))?", spec.strip())
    return None if not named or named[1] in names() else (named[1], named[2], named[3] or "")


def written_in_python(spec: str) -> Policy | None:
    """"module:Class" or "module:Class:key=value,...": an instance, made with these arguments; None: it names none.

    ValueError: there is no such module or class, or it does not take them."""
    if not (named := in_python(spec)):
        return None
    module, name, given = named
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"kv_policy {spec!r}: {error}; a policy written in Python is module:Class, of a module that can be imported") from None
    if not (isinstance(cls, type) and issubclass(cls, Policy)):
        raise ValueError(f"kv_policy {spec!r}: {name} is no subclass of pykvc.Policy")
    try:
        pairs = [item.split("=", 1) for item in given.split(",") if item]
        own = {key.strip(): _literal(value.strip()) for key, value in pairs}
        return _with_attributes(cls(), own) if cls.__init__ is object.__init__ else cls(**own)
    except (TypeError, ValueError) as error:
        raise ValueError(f"kv_policy {spec!r}: {error}") from None


def _with_attributes(policy: Policy, own: dict[str, Any]) -> Policy:
    """A class without an __init__: its parameters are the attributes that it, or Policy, has."""
    valid = {key for key in dir(policy) if not key.startswith("_") and not callable(getattr(policy, key))} - {"name"}
    for key, value in own.items():
        if key not in valid:
            raise ValueError(f"{type(policy).__name__} has no attribute {key!r}{nearest(key, valid)}")
        setattr(policy, key, value)
    return policy


def _literal(text: str) -> Any:
    """3, 0.5, True; anything else is a string."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def needs(policy: str | Policy) -> dict[str, Any]:
    """What a policy is given, as _core.needs(): spans, sums, outputs, probe ('none' | 'mean' | 'max') ..."""
    if isinstance(policy, Policy):
        return {"spans": policy.spans, "sums": policy.sums, "outputs": policy.outputs, "probe": "none"}
    return _core.needs(policy)


def parameters(policy: str) -> dict[str, str]:
    """Those that a canonical spec names: all but a share that is the policy's own."""
    return dict(item.split("=") for item in policy.partition(":")[2].split(",") if "=" in item)


def parameter(policy: str, name: str) -> int:
    """A number of tokens of a canonical spec; 0 without such a parameter."""
    return int(parameters(policy).get(name, 0))


def flash_attn(value: bool | str) -> str:
    """llama.cpp's words, too: on, enabled, true, 1 ..."""
    words = {"on": ("on", "enabled", "true", "1"), "off": ("off", "disabled", "false", "0"), "auto": ("auto", "-1")}
    said = str(value).lower() if isinstance(value, (bool, str)) else ""
    for word, others in words.items():
        if said in others:
            return word
    raise ValueError(f"flash_attn is 'on' or True, 'off' or False, or 'auto', not {value!r}")


def cache_type(name: str, value: str) -> str:
    if value not in CACHE_TYPES:
        raise ValueError(f"{name} is one of {', '.join(CACHE_TYPES)}, not {value!r}")
    return value



def lora(value: Any) -> list[tuple[str, float]]:
    """[(path, scale)] of one path, or of a list of paths and of pairs of a path and a scale."""
    given = [] if value is None else [value] if isinstance(value, (str, os.PathLike)) else value
    found: list[tuple[str, float]] = []
    for item in given if isinstance(given, (list, tuple)) else [given]:
        path, scale = item if isinstance(item, (list, tuple)) and len(item) == 2 else (item, 1.0)
        if not isinstance(path, (str, os.PathLike)):
            raise ValueError(f"lora is the path of a GGUF, or a list of paths or of (path, scale), not {value!r}")
        if not os.path.isfile(path):
            raise ValueError(f"lora: there is no file {os.fspath(path)}")
        found.append((os.fspath(path), number("the scale of a LoRA", scale, -1e6, 1e6)))
    return found


def devices(n_gpu_layers: Any, main_gpu: Any, tensor_split: Any, rpc_servers: Any = None) -> dict[str, Any]:
    """Of weights.load(): where the layers lie. main_gpu -1: on all devices, as much as tensor_split says. RPC servers,
    if any, come before GPUs."""
    n_layers, servers = whole("n_gpu_layers", n_gpu_layers, -1), rpc.endpoints(rpc_servers)
    if servers and n_layers == 0:
        raise ValueError("rpc_servers hold layers of n_gpu_layers: give it, too; -1 is all")
    names = [name for name, _, kind in _core.devices() if kind in ("GPU", "IGPU")]
    if main_gpu is not None and tensor_split is not None:
        raise ValueError("give main_gpu, all on one device, or tensor_split, over several, not both")
    main = -1 if main_gpu is None else whole("main_gpu", main_gpu, 0)
    split = [] if tensor_split is None else [number("a part of tensor_split", part, 0) for part in tensor_split]
    for name, n in (("main_gpu", main + 1), ("tensor_split", len(split))):
        if n > len(names) and not servers:  # which may have several: _core.Model counts them
            there = f"{len(names)}: {', '.join(names)}" if names else "none; it runs on the CPU"
            raise ValueError(f"{name} wants {n} GPU{'s' if n > 1 else ''}, and this build sees {there}")
    if split and not any(split):
        raise ValueError("tensor_split has a part above 0 for at least one device")
    rpc.check(servers)
    return {"n_gpu_layers": n_layers, "main_gpu": main, "tensor_split": tuple(split), "rpc_servers": servers}
