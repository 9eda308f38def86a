"""What LLM and generate() accept, checked once at the door. Every function raises ValueError naming what is valid."""
import math
import sys
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, cast

from . import _core
from .policy import Policy

if TYPE_CHECKING:
    from .session import Session

N_CTX_MAX = 2**31 - 256  # llama.cpp rounds up to 256, and counts positions in 31 bits
CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


def whole(name: str, value: Any, low: int, high: int = 2**31 - 1) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= cast(int, value) <= high:
        raise ValueError(f"{name} is a whole number of [{low}, {high}], not {value!r}")
    return int(value)


def checked_seed(value: Any) -> int:
    """2**32 - 1 is llama.cpp's word for a random one: it is as the one before it."""
    return min(whole("seed", value, 0, 2**32 - 1), 2**32 - 2)


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
    """(kv_budget, kv_decode_budget) of n prompts. Each is one value for all or a list of them, None the context's own; None: both are."""
    found = []
    for name, value in (("kv_budget", kv_budget), ("kv_decode_budget", kv_decode_budget)):
        values = [value]*n if value is None or isinstance(value, (int, float, str)) else list(value)
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


def cells(value: int | str | None) -> str:
    """As the engine reads it: "" as many as n_ctx, "2048" cells of a sequence, "512MiB" of all of them."""
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
        checked = _core.parse_spec(value)
        name = checked.partition(":")[0]
    elif isinstance(value, Policy):
        value._check()
        checked, name = value, value.name
        if name in {p["name"] for p in _core.policies()}:
            raise ValueError(f"{type(value).__name__}.name is {name!r}, which is a built-in policy: choose another")
    else:
        raise ValueError(f"kv_policy is a spec such as 'snapkv:window=32' or an instance of pykvc.Policy, not {value!r}")
    if name != "full" and not kv_budget and not kv_decode_budget and not kv_cells:
        raise ValueError(f"kv_policy {name!r} evicts nothing without a budget: give kv_budget (tokens, or a retained ratio "
                         "in (0, 1]), kv_decode_budget or kv_cells")
    return checked


def needs(policy: str | Policy) -> dict[str, Any]:
    """What a policy is given, of those that Python has to provide: spans, sums, probe ('none' | 'mean' | 'max')."""
    if isinstance(policy, Policy):
        return {"spans": policy.spans, "sums": policy.sums, "probe": "none"}
    return next(p["needs"] for p in _core.policies() if p["name"] == policy.partition(":")[0])


def parameters(policy: str) -> dict[str, str]:
    """Those that a canonical spec names: all but a share that is the policy's own."""
    return dict(item.split("=") for item in policy.partition(":")[2].split(",") if "=" in item)


def unshared(policy: str) -> str:
    """A canonical spec without what it says of its budget's share: the same for policies that share an evaluated context."""
    name, own = policy.partition(":")[0], parameters(policy)
    kept = ",".join(f"{key}={value}" for key, value in own.items() if key not in ("share", "count"))
    return f"{name}:{kept}" if kept else name


def parameter(policy: str, name: str) -> int:
    """A number of tokens of a canonical spec; 0 without such a parameter."""
    return int(parameters(policy).get(name, 0))


def flash_attn(value: bool | str) -> str:
    words = {True: "on", False: "off", "on": "on", "off": "off", "auto": "auto"}
    if not isinstance(value, (bool, str)) or value not in words:
        raise ValueError(f"flash_attn is True, False or 'auto', not {value!r}")
    return words[value]


def cache_type(name: str, value: str) -> str:
    if value not in CACHE_TYPES:
        raise ValueError(f"{name} is one of {', '.join(CACHE_TYPES)}, not {value!r}")
    return value


def sampler(model: "_core.Model", temperature: float, top_k: int, top_p: float, min_p: float, repeat_penalty: float, seed: int) -> "_core.Sampler":
    """llama.cpp's chain; temperature 0 takes the most likely token."""
    return _core.Sampler(model, temperature=number("temperature", temperature, 0, 1e6), top_k=whole("top_k", top_k, 0),
                         top_p=number("top_p", top_p, 1e-6, 1), min_p=number("min_p", min_p, 0, 1),
                         repeat_penalty=number("repeat_penalty", repeat_penalty, 1e-6, 1e6), seed=checked_seed(seed))
