"""Matches a stranger's regular expressions with the names of a model's modules, and gives up after a few seconds."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

from .errors import ExportError

__all__ = ["AT_END", "BEFORE_NUMBER", "INSIDE", "WHOLE", "Expression", "match_all"]

# The forms in which PEFT matches what an adapter's settings name.
WHOLE = r"(?:{})\Z"
AT_END = r"(.*\.)?({})$"
INSIDE = r"(^|.*\.){}($|\..*)"
BEFORE_NUMBER = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."

Expression = tuple[str, str]
"""One of these forms, and the pattern that the settings have for its {}."""
PLAIN = re.compile(r"[\w.^$-]*")
"""Patterns without repetitions and alternatives can match in one way only, so matching takes no time."""
LIMIT_SECONDS = 5
MATCHER = """
import json, re, sys
expressions, names = json.load(sys.stdin)
for expression in expressions:
    try:
        print(json.dumps([name for name in names if re.match(expression, name)]))
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        print(json.dumps(str(error)))
"""


def match_all(expressions: Iterable[Expression], names: Sequence[str]) -> dict[Expression, set[str]]:
    """
    The names that each expression matches from their beginning on, as `re.match` does.

    Raises:
        ExportError: one of them is not a regular expression, or would take longer than `LIMIT_SECONDS`.
    """
    distinct = list(dict.fromkeys(expressions))
    risky = [expression for expression in distinct if PLAIN.fullmatch(expression[1]) is None]
    found = _match_elsewhere(risky, names) if risky else {}
    for form, pattern in distinct:
        if (form, pattern) not in found:
            found[form, pattern] = {name for name in names if re.match(form.replace("{}", pattern), name)}
    return found


def _match_elsewhere(expressions: Sequence[Expression], names: Sequence[str]) -> dict[Expression, set[str]]:
    """In another process, which can be killed: nothing else stops Python's regular expressions, which may never end."""
    question = json.dumps([[form.replace("{}", pattern) for form, pattern in expressions], names])
    command = [sys.executable, "-I", "-S", "-c", MATCHER]
    try:
        answer = subprocess.run(command, input=question, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        patterns = ", ".join(repr(pattern[:60]) for _, pattern in expressions)
        raise ExportError(f"matching takes longer than {LIMIT_SECONDS} s; simplify the pattern {patterns}") from None
    answers = [json.loads(line) for line in answer.stdout.splitlines()]
    if len(answers) != len(expressions):  # the system has killed it, for want of memory
        raise ExportError(f"{expressions[len(answers)][1][:60]!r} cannot be matched as a regular expression")
    for (_, pattern), matched in zip(expressions, answers, strict=True):
        if isinstance(matched, str):
            raise ExportError(f"{pattern[:60]!r} is not a regular expression: {matched}")
    return {expression: set(matched) for expression, matched in zip(expressions, answers, strict=True)}
