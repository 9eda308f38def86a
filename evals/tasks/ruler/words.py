"""English words, from the package that RULER takes them from."""
import functools


@functools.cache
def english(*categories: str) -> list[str]:
    """All words of these categories (noun, adjective, verb), each once. ValueError: the package is missing."""
    try:
        from wonderwords import RandomWord
    except ImportError:
        raise ValueError("ruler takes its words from a package that is missing: `pip install wonderwords`") from None
    return sorted(set(RandomWord().filter(include_categories=categories)))
