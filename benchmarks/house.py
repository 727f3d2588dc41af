"""
What can be measured of the shape of code: of this project, and of code that others are known for.

    python benchmarks/house.py                     # the packages of this project
    pip install --no-deps --target /path/to/anchors h11 httpx websockets
    python benchmarks/house.py /path/to/anchors/h11 /path/to/anchors/httpx /path/to/anchors/websockets

The figures are a mirror, not limits. Lines of code hold more than a comment or a docstring. A function or a class is as long as
it is in its file, docstrings included. A class has the fields that it declares or that its methods assign to ``self``, and
the methods that stand in it. A circle is a set of modules each of which needs another of them when it is imported; what
is imported within functions, or for types alone, makes none.

The columns: lines of code; lines of a function, median / 90th percentile / longest; comments in 100 lines of code; circles; the
three largest classes, with fields / methods / lines.
"""

import argparse
import ast
import io
import statistics
import tokenize
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
LARGEST = 3
"""Classes that are named."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, order=True)
class Class:
    """Figures of one class."""

    lines: int
    name: str
    fields: int
    methods: int

    def __str__(self) -> str:
        return f"{self.name} {self.fields} / {self.methods} / {self.lines}"


class Module:
    """One file, read."""

    def __init__(self, file: Path, name: str) -> None:
        text = file.read_text(encoding="utf-8")
        self.name, self.is_package = name, file.stem == "__init__"
        self.tree = ast.parse(text)
        self.comments, lines = 0, set()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                self.comments += 1
            elif token.type not in LAYOUT:
                lines.update(range(token.start[0], token.end[0] + 1))
        docstrings = [node for node in ast.walk(self.tree) if isinstance(node, ast.Expr) and _is_docstring(node)]
        self.code = len(lines.difference(*(range(node.lineno, node.lineno + _lines(node)) for node in docstrings)))
        self.functions = [_lines(node) for node in ast.walk(self.tree) if isinstance(node, Function)]
        self.classes = [
            Class(_lines(node), node.name, len(set(_fields(node))), sum(isinstance(item, Function) for item in node.body))
            for node in ast.walk(self.tree)
            if isinstance(node, ast.ClassDef)
        ]

    def imports(self, known: Collection[str]) -> Iterator[str]:
        """Those of the known modules that this one needs when it is imported."""
        for node in _run_on_import(self.tree.body):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names if alias.name in known)
            if isinstance(node, ast.ImportFrom):
                where = self._absolute(node)
                named = {f"{where}.{alias.name}" for alias in node.names}
                yield from named & {*known}
                if named - {*known} and where in known:  # something that is defined there
                    yield where

    def _absolute(self, node: ast.ImportFrom) -> str:
        parts = self.name.split(".")
        above = parts[: len(parts) + self.is_package - node.level] if node.level else []
        return ".".join([*above, *filter(None, [node.module])])


def _lines(node: ast.stmt) -> int:
    return (node.end_lineno or 0) - node.lineno + 1


def _is_docstring(node: ast.Expr) -> bool:
    """Of a module, class, function or field."""
    return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _fields(node: ast.ClassDef) -> Iterator[str]:
    yield from (item.target.id for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name))
    for item in ast.walk(node):
        if isinstance(item, ast.Attribute) and isinstance(item.ctx, ast.Store) and ast.unparse(item.value) == "self":
            yield item.attr


def _run_on_import(statements: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    for node in statements:
        if isinstance(node, Function) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            continue
        yield node
        for block in ("body", "orelse", "handlers", "finalbody"):
            yield from _run_on_import(getattr(node, block, ()))


def modules_of(folder: Path) -> list[Module]:
    """Of a package, or of a folder of files; not those of environments within it."""
    found = []
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder.parent).with_suffix("").parts
        if not any(part.startswith(".") for part in parts):
            found.append(Module(file, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)))
    return found


def circles(modules: Iterable[Module]) -> list[set[str]]:
    """Sets of modules that need one another."""
    known = {module.name: module for module in modules}
    needs = {name: {*module.imports(known)} - {name} for name, module in known.items()}
    reached = {name: _reached(name, needs) for name in needs}
    found = {frozenset(other for other in reached[name] if name in reached[other]) for name in needs if name in reached[name]}
    return sorted(map(set, found), key=sorted)


def _reached(name: str, needs: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    ahead = [name]
    while ahead:
        new = needs[ahead.pop()] - found
        found |= new
        ahead += new
    return found


def row(name: str, modules: list[Module]) -> str:
    """One line of the table."""
    code, comments = (sum(getattr(module, figure) for module in modules) for figure in ("code", "comments"))
    functions = sorted(length for module in modules for length in module.functions) or [0]
    classes = sorted((each for module in modules for each in module.classes), reverse=True)[:LARGEST]
    lengths = f"{statistics.median_low(functions)} / {functions[int(0.9 * (len(functions) - 1))]} / {functions[-1]}"
    per_hundred = 100 * comments / max(code, 1)
    return f"| {name} | {code:,} | {lengths} | {per_hundred:.0f} | {len(circles(modules))} | {'; '.join(map(str, classes))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="this project's packages by default")
    options = parser.parse_args()
    folders = options.folders or sorted(file.parent for file in REPOSITORY.glob("*/__init__.py"))
    read = {folder: modules_of(folder.resolve()) for folder in folders}
    print("| package | lines | functions | comments | circles | largest classes |")
    print("|---|---|---|---|---|---|")
    for folder, modules in read.items():
        print(row(folder.name, modules))
    if not options.folders:
        together = [module for modules in read.values() for module in modules]
        print(row("all", together))
        tests, code = (sum(module.code for module in each) for each in (modules_of(REPOSITORY / "tests"), together))
        print(f"\n{tests / code:.2f} lines of test a line of code")


if __name__ == "__main__":
    main()
