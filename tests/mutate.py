"""Change single lines of the product and count the changes that the gate detects.

usage: python tests/mutate.py [--seed 1] [--count 40] [--jobs 2] [--list] [--ray]

The changes are made in a copy of the tree: one in each of COUNT lines, which the seed chooses, spread evenly over
scoring, training, evaluation and data. Kinds: a condition or boundary (`<` to `<=`, `==` to `!=`, `and` to `or`, a
dropped `not`), a sign (`+` to `-`), a number plus one, a dropped call (fsync, rename, flush), two swapped arguments,
columns or branches. Text, log lines, type annotations, tuning constants (`BLOCK_ROWS = 8192`), the digits of `round`
and the drawings of phantoms stay unchanged, because other values would work as well.

Each change is tested with the tests that run the line (measured by coverage.py), then with all tests of the folder,
and with `--ray` also with the folder's tests that need Ray. The change is caught if a test fails.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "scoring": ["scoring"],
    "training": ["training"],
    "evaluation": ["evaluation"],
    "data": ["data", "imaging", "storage"],
}
#: Additional test folders for a package.
ALSO = {
    "data": ["tests/test_security.py"],
    "imaging": ["tests/test_security.py"],
    "storage": ["tests/test_security.py", "tests/data"],
    "evaluation": ["tests/reporting"],
}
COMPARISONS: dict[type, str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
OPERATORS: dict[type, str] = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*"}
GATE = "not ray and not long and not readme"


@dataclass(frozen=True)
class Change:
    """One changed line: bytes `start` to `end` of `line` become `new`."""

    file: str
    line: int
    start: int
    end: int
    new: str
    kind: str

    def apply(self, text: str) -> str:
        lines = text.splitlines(keepends=True)
        old = lines[self.line - 1].encode()
        lines[self.line - 1] = (old[: self.start] + self.new.encode() + old[self.end :]).decode()
        return "".join(lines)


def changes(file: str, text: str) -> Iterator[Change]:
    """Yield every possible change of a file; each is within one line."""
    tree = ast.parse(text)
    rows = [row.encode() for row in text.splitlines()]
    skipped = set(_skipped(tree))

    def segment(node: ast.AST) -> str:
        return rows[node.lineno - 1][node.col_offset : node.end_col_offset].decode()

    def change(node: ast.AST, new: str, kind: str) -> Change:
        return Change(file, node.lineno, node.col_offset, node.end_col_offset, new, kind)

    def swapped(whole: ast.AST, first: ast.AST, second: ast.AST, kind: str) -> Change:
        row = rows[whole.lineno - 1]
        new = segment(second).encode() + row[first.end_col_offset : second.col_offset] + segment(first).encode()
        return Change(file, whole.lineno, first.col_offset, second.end_col_offset, new.decode(), kind)

    for node in ast.walk(tree):
        if node in skipped or getattr(node, "lineno", None) is None or node.lineno != node.end_lineno:
            continue
        match node:
            case ast.Compare(left=left, ops=[operator], comparators=[right]):
                new = f"{segment(left)} {COMPARISONS[type(operator)]} {segment(right)}"
                yield change(node, new, "condition")
            case ast.BoolOp(op=operator, values=[first, second]):
                word = "or" if isinstance(operator, ast.And) else "and"
                yield change(node, f"({segment(first)}) {word} ({segment(second)})", "condition")
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                yield change(node, segment(operand), "condition")
            case ast.BinOp(op=operator) if type(operator) in OPERATORS and not _is_text(node) and not _is_path(node):
                new = f"{segment(node.left)} {OPERATORS[type(operator)]} {segment(node.right)}"
                yield change(node, new, "sign")
            case ast.Constant(value=value) if type(value) is int:
                yield change(node, str(value + 1), "number")
            case ast.Expr(value=ast.Call() as call) if not segment(call).startswith(("logger.", "super()")):
                yield change(node, "pass", "dropped call")
            case ast.IfExp(body=body, orelse=orelse):
                new = f"{segment(orelse)} if {segment(node.test)} else {segment(body)}"
                yield change(node, new, "swapped branches")
            case ast.Call(args=[ast.Name() as first, ast.Name() as second, *_]) if segment(node.func) != "np.clip":
                yield swapped(node, first, second, "swapped arguments")
            case ast.List(elts=[first, second, *_]) | ast.Tuple(elts=[first, second, *_]) if _are_names(first, second):
                yield swapped(node, first, second, "swapped columns")


def _are_names(*nodes: ast.AST) -> bool:
    return all(isinstance(node, ast.Constant) and isinstance(node.value, str) for node in nodes)


def _is_text(node: ast.BinOp) -> bool:
    return any(isinstance(part, ast.JoinedStr) or _are_names(part) for part in (node.left, node.right))


def _is_path(node: ast.BinOp) -> bool:
    """Return whether a division looks like `folder / NAME`: as a product it always fails."""
    right = node.right
    return isinstance(node.op, ast.Div) and (_are_names(right) or (isinstance(right, ast.Name) and right.id.isupper()))


def _skipped(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes of annotations, raised errors, texts, log lines and decorators, which tests must not pin."""
    for node in ast.walk(tree):
        parts: list[ast.AST | None] = []
        match node:
            case ast.AnnAssign(annotation=annotation) | ast.arg(annotation=annotation):
                parts = [annotation]
            case ast.FunctionDef():
                parts = [node.returns, *node.decorator_list]
            case ast.ClassDef():
                parts = [*node.decorator_list]
            case ast.Call(func=ast.Attribute(attr="isin"), args=[chosen]):
                parts = [chosen]  # a set: its order means nothing
            case ast.Call(func=ast.Name(id=name), args=[*_, ast.List() as columns]) if name.startswith("read_"):
                parts = [columns]  # read by name: the order means nothing
            case ast.keyword(arg="columns", value=ast.List() as columns):
                parts = [columns]
            case ast.DictComp(generators=[ast.comprehension(iter=ast.Tuple() as names)]):
                parts = [names]  # keys of a dict
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.Dict(values=values)) if name.isupper():
                parts = [value for value in values if isinstance(value, ast.Tuple)]  # other names of one thing
            case ast.Call(func=ast.Name(id="round"), args=[_, digits]):
                parts = [digits]  # how much of a duration is shown
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant() | ast.BinOp() as value) if name.isupper():
                parts = [value]  # a size or a time that any other value near it would serve as well
            case ast.Raise() | ast.JoinedStr() | ast.Subscript(value=ast.Name(id="dict" | "list" | "tuple" | "set")):
                parts = [node]
            case ast.Call(func=ast.Attribute(value=ast.Name(id="logger" | "telemetry"))):
                parts = [node]
        for part in filter(None, parts):
            yield from ast.walk(part)


def choose(seed: int, count: int) -> list[Change]:
    """Return `count` changes in as many lines, spread evenly over `PACKAGES`; a seed determines them."""
    randomness = random.Random(seed)
    chosen: list[Change] = []
    for index, packages in enumerate(PACKAGES.values()):
        by_line: dict[tuple[str, int], list[Change]] = {}
        for path in sorted(path for package in packages for path in (ROOT / "ray_cxr" / package).rglob("*.py")):
            file = path.relative_to(ROOT).as_posix()
            if "phantoms" in file:
                continue
            for change in changes(file, path.read_text(encoding="utf-8")):
                by_line.setdefault((change.file, change.line), []).append(change)
        share = count * (index + 1) // len(PACKAGES) - count * index // len(PACKAGES)
        chosen += [randomness.choice(by_line[line]) for line in randomness.sample(sorted(by_line), share)]
    return chosen


def copy_checkout(target: Path) -> None:
    """Copy the tracked files; link the environment."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    (target / ".venv").symlink_to(ROOT / ".venv")


def measure(data: Path, copy: Path) -> None:
    """Run the gate's tests without Ray once and record which test runs which line."""
    config = data.parent / "settings.rc"  # coverage.py removes files with the prefix of the data
    config.write_text(f"[run]\nsource = ray_cxr\ndata_file = {data}\n", "utf-8")
    # A restarted worker would delete the data of the other one.
    workers = ["-n", "2", "--dist", "loadscope", "--max-worker-restart", "0"]
    program = [sys.executable, "-m", "pytest", "-q", "-m", GATE, *workers, "-p", "no:cacheprovider", "--cov"]
    subprocess.run([*program, f"--cov-config={config}", "--cov-report=", "--cov-context=test"], cwd=copy, check=True)


def tests_of(data: Path, change: Change) -> list[str]:
    """Return the tests that ran a line, from the data of `measure`."""
    with sqlite3.connect(data) as database:
        rows = database.execute(
            "select context.context, line_bits.numbits from line_bits join file on file.id = line_bits.file_id "
            "join context on context.id = line_bits.context_id where file.path like ?",
            (f"%/{change.file}",),
        ).fetchall()
    byte, bit = divmod(change.line, 8)
    hit = [name for name, bits in rows if len(bits) > byte and bits[byte] >> bit & 1]
    return sorted({name.split("|")[0] for name in hit if name.startswith("tests/")})


def catch(change: Change, data: Path, copy: Path, *, with_ray: bool) -> str | None:
    """Return the step that detected a change, or None."""
    file = copy / change.file
    original = file.read_text(encoding="utf-8")
    package = change.file.split("/")[1]
    folder = [f"tests/{package}", *ALSO.get(package, [])]
    narrow = tests_of(data, change)
    steps = [("tests that run the line", ["-m", GATE, *narrow[:400]])] if narrow else []
    steps.append(("tests of the folder", ["-m", GATE, *folder]))
    if with_ray:
        steps.append(("tests with Ray", ["-m", "ray and not long", f"tests/{package}"]))
    try:
        file.write_text(change.apply(original), encoding="utf-8")
        for step, arguments in steps:
            program = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments]
            try:
                done = subprocess.run(program, cwd=copy, capture_output=True, timeout=600)
            except subprocess.TimeoutExpired:
                return f"{step} (time limit)"
            if done.returncode in (1, 2):  # a test failed, or could not be imported
                return step
        return None
    finally:
        file.write_text(original, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("seed", 1), ("count", 40), ("jobs", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ray", action="store_true", help="also run the folder's tests with Ray")
    parser.add_argument("--list", action="store_true", help="print the changes and stop")
    parser.add_argument("--coverage", type=Path, help="coverage data of an earlier run")
    options = parser.parse_args()
    chosen = choose(options.seed, options.count)

    def describe(change: Change) -> str:
        text = (ROOT / change.file).read_text(encoding="utf-8")
        old, new = (version.splitlines()[change.line - 1].strip() for version in (text, change.apply(text)))
        return f"{change.file}:{change.line} {change.kind}\n    - {old}\n    + {new}"

    if options.list:
        print("\n".join(map(describe, chosen)))
        return
    with tempfile.TemporaryDirectory(prefix="mutate-") as name:
        folder = Path(name)
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(options.jobs):
            copy = folder / str(number) / "checkout"
            copy_checkout(copy)
            if (ROOT.parent / "shared").exists():
                (copy.parent / "shared").symlink_to(ROOT.parent / "shared")
            copies.put(copy)
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        data = options.coverage or folder / "coverage"
        if not data.exists():
            measure(data.absolute(), folder / "0" / "checkout")

        def attempt(change: Change) -> bool:
            copy = copies.get()
            try:
                found = catch(change, data, copy, with_ray=options.ray)
            finally:
                copies.put(copy)
            print(f"{'caught by ' + found if found else 'MISSED'}: {describe(change)}", flush=True)
            return found is not None

        with ThreadPoolExecutor(options.jobs) as pool:
            caught = sum(pool.map(attempt, chosen))
    print(json.dumps({"seed": options.seed, "changes": len(chosen), "caught": caught}))


if __name__ == "__main__":
    main()
