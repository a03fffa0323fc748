"""Mathematical answers, compared by math-verify: 1/2, 0.5 and \\frac{1}{2} are one answer."""

from __future__ import annotations

from trueup.errors import ConfigError


def same_value(answer: str, completion: str) -> bool:
    """Whether the completion's final expression equals the answer.

    math-verify limits its own time by signals, which only a main thread may use: call this in a scoring process. Raises
    ConfigError when math-verify is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        raise ConfigError("math-verify is not installed: pip install 'trueup[tasks]'") from None
    return bool(verify(parse(answer), parse(completion)))
