"""
Small faults put into the code, one at a time: which of them do the tests not notice?

    python benchmarks/mutants.py gpu_server/federation --tests tests/test_federation.py tests/test_itinerary.py
    python benchmarks/mutants.py gpu_server/federation --tests tests/test_federation.py --sample 100 --seed 0

No file is changed, and none should be meanwhile. Each mutant is compiled in a process of its own, forked from one that has
loaded all libraries. There pytest runs the files of tests in the order given, and stops at the first failure. A mutant that
computes three times as long as the code as it is counts as noticed, too. Annotations, decorators, texts and lines of the log
are not changed.

``--equivalent`` names a file of mutants that nobody can tell from the code as it is: a line for each, as it is printed here but
without its line number, and behind " # " the reason. They do not count.
"""

import argparse
import ast
import io
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType

import pytest

from terminal import Progress

OTHER_OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Break: ast.Continue, ast.Continue: ast.Break,
}  # fmt: skip
OTHER_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list"}
UNCHANGED = {"annotation", "returns", "decorator_list", "bases"}
"""Fields of the syntax tree."""
TIMES_AS_LONG = 3
LARGEST_MEMORY = 2**32
"""Bytes that a process may ask for."""
REPOSITORY = Path(__file__).parent.parent.resolve()


@dataclass(frozen=True)
class Mutant:
    """One change of one file: ``other`` stands in ``parent`` where something else stood."""

    path: Path
    line: int
    change: str
    """In which function, and from what to what."""
    tree: ast.Module
    parent: ast.AST
    field: str
    index: int
    other: ast.AST

    def __str__(self) -> str:
        return f"{self.path}:{self.line} {self.change}"

    @property
    def key(self) -> str:
        return f"{self.path} {self.change}"

    def take_effect(self) -> None:
        """Whoever imports the file in this process from now on gets the mutant."""
        _put(self.parent, self.field, self.index, self.other)
        file = str(self.path.resolve())
        code = compile(ast.fix_missing_locations(self.tree), file, "exec")
        code_of = SourceFileLoader.get_code

        def get_code(loader: SourceFileLoader, name: str) -> CodeType | None:
            return code if loader.path == file else code_of(loader, name)

        SourceFileLoader.get_code = get_code  # type: ignore[method-assign]


def others(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in a node's place."""
    match node:
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield ast.Constant(node.value + 1)
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.BinOp(op=ast.Add()):  # of numbers, or of lists
            yield from (node.left, node.right)
        case ast.Name(id=name, ctx=ast.Load()) if name in OTHER_NAMES:
            yield ast.Name(OTHER_NAMES[name], ast.Load())
        case ast.IfExp() if not _is_negated_below(node.test):
            yield ast.IfExp(node.test, node.orelse, node.body)
        case ast.comprehension(ifs=[_, *_]):
            yield ast.comprehension(node.target, node.iter, [], node.is_async)
        case ast.If() if not _is_negated_below(node.test):
            yield ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
        case ast.Return(value=ast.expr()) if ast.unparse(node.value) != "None":
            yield ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Call()) if not ast.unparse(node).startswith("logger."):
            yield ast.Pass()
        case ast.Raise() | ast.Delete() | ast.AugAssign():
            yield ast.Pass()
        case ast.Assign(targets=[target]) if not all(isinstance(part, ast.Name) for part in getattr(target, "elts", [target])):
            yield ast.Pass()  # without a local name every test fails
        case _ if type(node) in OTHER_OPERATORS:
            yield OTHER_OPERATORS[type(node)]()


def _is_negated_below(test: ast.expr) -> bool:
    """Whether another mutant, of the condition itself, swaps its branches."""
    is_negation = isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
    negated = ast.Eq | ast.NotEq | ast.Is | ast.IsNot | ast.In | ast.NotIn
    return is_negation or (isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], negated))


def mutants_of(path: Path) -> Iterator[Mutant]:
    """All of one file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))

    def below(parent: ast.AST, function: str, line: int) -> Iterator[Mutant]:
        for field, value in ast.iter_fields(parent):
            for index, child in enumerate(value if isinstance(value, list) else [value]):
                if field in UNCHANGED or not isinstance(child, ast.AST) or isinstance(child, ast.Assert):
                    continue
                here = getattr(child, "lineno", line)
                for other in others(child):
                    # An operator is shown with its operands, a number with what it is for.
                    in_parent = isinstance(child, ast.Constant) or not hasattr(child, "lineno")
                    before = _shown(parent if in_parent else child)
                    _put(parent, field, index, other)
                    change = f"{function or 'module'}: {before} -> {_shown(parent if in_parent else other)}"
                    _put(parent, field, index, child)
                    yield Mutant(path, here, change, tree, parent, field, index, other)
                name = function
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    name = f"{function}.{child.name}".lstrip(".")
                yield from below(child, name, here)

    return below(tree, "", 0)


def _put(parent: ast.AST, field: str, index: int, node: ast.AST) -> None:
    value = getattr(parent, field)
    if isinstance(value, list):
        value[index] = node
    else:
        setattr(parent, field, node)


def _shown(node: ast.AST) -> str:
    return ast.unparse(ast.fix_missing_locations(node)).strip().split("\n")[0]


def run_tests(tests: list[str], *, mutant: Mutant | None = None, seconds: float = 0.0) -> int:
    """Begin a run of the tests in a process of its own, and give its number. It ends with status 0 where they pass."""
    number = os.fork()
    if number:
        return number
    status = 1
    try:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # of computing; SIGPROF ends the process
        resource.setrlimit(resource.RLIMIT_DATA, (LARGEST_MEMORY, LARGEST_MEMORY))
        _be_silent()
        if mutant is not None:
            mutant.take_effect()
        for name in [name for name, module in sys.modules.items() if _is_ours(module)]:
            del sys.modules[name]
        status = pytest.main(["-x", "-p", "no:cacheprovider", *tests])
    finally:
        os._exit(status)


def survivors(mutants: list[Mutant], tests: list[str], *, jobs: int, seconds: float) -> list[Mutant]:
    """Those with which the tests pass."""
    found: list[Mutant] = []
    running: dict[int, Mutant] = {}
    with Progress(len(mutants), unit="mutant") as progress:
        for mutant in [*mutants, *[None] * jobs]:
            if len(running) == jobs or (running and mutant is None):
                number, status = os.wait()
                ended = running.pop(number)
                if status == 0:
                    found.append(ended)
                progress.advance(f"{len(found)} survive")
            if mutant is not None:
                running[run_tests(tests, mutant=mutant, seconds=seconds)] = mutant
    return sorted(found, key=mutants.index)


def _be_silent() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)


def _is_ours(module: object) -> bool:
    file = Path(getattr(module, "__file__", None) or "/")
    return (
        file.is_relative_to(REPOSITORY) and "site-packages" not in file.parts and getattr(module, "__name__", "") != "__main__"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files, or folders of files, to be changed")
    parser.add_argument("--tests", nargs="+", required=True, metavar="FILE", help="the quickest first")
    parser.add_argument("--sample", type=int, metavar="N", help="so many mutants, drawn at random; all of them by default")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes at a time")
    parser.add_argument("--equivalent", type=Path, metavar="FILE", help="mutants that are no faults")
    options = parser.parse_args()
    files = [file for path in options.paths for file in (sorted(path.glob("*.py")) if path.is_dir() else [path])]
    mutants = [mutant for file in files for mutant in mutants_of(file)]
    if options.sample is not None:
        mutants = random.Random(options.seed).sample(mutants, min(options.sample, len(mutants)))
    lines = options.equivalent.read_text(encoding="utf-8").splitlines() if options.equivalent is not None else []
    equivalent = {line.partition(" # ")[0] for line in lines}

    began = time.monotonic()
    with redirect_stdout(io.StringIO()) as said:
        status = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *options.tests])  # loads what they import
    if status != 0:
        sys.exit(said.getvalue())
    _, status, used = os.wait4(run_tests(options.tests), 0)
    if status != 0:
        sys.exit("the tests fail as the code is, without any mutant")
    seconds = used.ru_utime + used.ru_stime
    found = survivors(mutants, options.tests, jobs=options.jobs, seconds=TIMES_AS_LONG * seconds)
    faults = [mutant for mutant in found if mutant.key not in equivalent]
    for mutant in faults:
        print(mutant)
    for key in sorted(equivalent - {mutant.key for mutant in found}) if options.sample is None else ():
        print(f"listed as equivalent, and no survivor: {key}")
    counted = len(mutants) - (len(found) - len(faults))
    share = f"{counted - len(faults)} of {counted} are noticed ({100 * (1 - len(faults) / counted):.1f} %)"
    print(f"{len(mutants)} mutants of {len(files)} files: {share}, {len(found) - len(faults)} are equivalent")
    print(f"{time.monotonic() - began:.0f} s; the tests without a mutant: {seconds:.1f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
