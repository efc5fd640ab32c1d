"""Which part of the code may import which, and what may exist only once.

Every rule is a function from parsed files to complaints, and must complain about some bad files. The rules that ruff
knows are its list of banned names in pyproject.toml: `ray.init`, `tf.distribute`, a second resize, pickles.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from ray_cxr.labels import FINDINGS, LABELS

ROOT = Path(__file__).parents[1]

BOTTOM = frozenset({"errors", "labels", "extras"})
BELOW_STORAGE = BOTTOM | {"config", "progress", "telemetry", "versions", "cluster", "tasks"}
BELOW_IMAGING = BELOW_STORAGE | {"storage"}
BELOW_DATA = BELOW_IMAGING | {"imaging"}
BELOW_MODELS = BELOW_DATA | {"data", "evaluation"}
#: What each room may import besides itself. `ray_cxr` is the package itself, for its version.
ALLOWED: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "labels": frozenset({"errors"}),
    "extras": frozenset({"errors"}),
    "ray_cxr": BOTTOM | {"models"},  # lazily, so that `ray_cxr.load_bundle` is there
    "progress": BOTTOM,
    "versions": BOTTOM | {"ray_cxr"},
    "cluster": BOTTOM | {"progress"},
    "tasks": BOTTOM | {"progress"},
    "telemetry": frozenset(),
    "config": BOTTOM,
    "storage": BELOW_STORAGE,
    "imaging": BELOW_IMAGING,
    "data": BELOW_DATA,
    "evaluation": BELOW_STORAGE,
    "models": BELOW_MODELS,
    "training": BELOW_MODELS | {"models", "reporting"},
    "tuning": BELOW_MODELS | {"models", "training", "reporting"},
    "scoring": BELOW_MODELS | {"models"},
    "reporting": BELOW_MODELS,
    "demo": BELOW_MODELS | {"models"},  # it runs the commands, and is handed them
    "session": BELOW_IMAGING | {"ray_cxr"},
    "cli": BELOW_MODELS | {"session", "models", "training", "tuning", "scoring", "reporting", "demo", "ray_cxr"},
    "jobs": frozenset({"cli"}),
}
RAY_ROOMS = ("ray_cxr/training/", "ray_cxr/tuning/", "ray_cxr/scoring/", "jobs/")
#: telemetry gives counts to ray.util.metrics, so that the rooms that count need not import Ray.
RAY_FILES = (
    "ray_cxr/cluster.py",
    "ray_cxr/tasks.py",
    "ray_cxr/data/prepared.py",
    "ray_cxr/session.py",
    "ray_cxr/telemetry.py",
)
#: Files that may have tables keyed by finding, if all keys are findings; and how many findings are too many for a
#: sequence, which would be a second order of findings.
KNOWS_EACH_FINDING = {
    "ray_cxr/imaging/phantoms.py": 5,  # the four companions of each finding
    "ray_cxr/imaging/phantom_findings.py": 5,  # the drawing of each finding
    "ray_cxr/data/consensus.py": 5,  # which four make up an airspace opacity
    "ray_cxr/evaluation/published.py": 4,  # what others have measured of each
}
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
PLACES = {"local", "is_local", "local_mode", "on_laptop", "is_laptop", "on_cluster", "is_cluster"}
UNSAFE_CALLS = {"eval", "exec", "yaml.load", "builtins.eval", "builtins.exec"}
UNSAFE_METHODS = {"read_pickle", "to_pickle", "enable_unsafe_deserialization", "unsafe_load", "full_load"}

Files = Mapping[str, ast.Module]
Check = Callable[[Files], list[str]]


@functools.cache
def files() -> dict[str, ast.Module]:
    """Every Python file of the package and the jobs, by its path below the repository."""
    paths = sorted([*ROOT.glob("ray_cxr/**/*.py"), *ROOT.glob("jobs/**/*.py")])
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def modules(tree: ast.AST, path: str) -> Iterator[tuple[str, int]]:
    """Every module or name that a file imports, anywhere in it, with the line; `from a import b` gives `a.b`."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno
        elif isinstance(node, ast.Call) and _last(node.func) in ("import_module", "__import__") and node.args:
            name = _text(node.args[0])
            if name:
                yield name, node.lineno


def _last(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def room(path: str) -> str:
    parts = path.removesuffix(".py").split("/")
    return "jobs" if parts[0] == "jobs" else "ray_cxr" if parts[1] == "__init__" else parts[1]


def one_way_street(files: Files) -> list[str]:
    """(a) Rooms import only rooms below them; lazy imports and those for types alone count too."""
    bad = []
    for path, tree in files.items():
        here = room(path)
        if here not in ALLOWED:
            bad.append(f"{path}: a new room: say in this test what it may import, and in DESIGN.md where it stands")
            continue
        for module, line in modules(tree, path):
            parts = module.split(".")
            if parts[0] == "jobs":
                bad.append(f"{path}:{line}: imports {module}; jobs are the top")
            there = parts[1] if len(parts) > 1 else "ray_cxr"
            if parts[0] == "ray_cxr" and there in ALLOWED and there != here and there not in ALLOWED[here]:
                bad.append(f"{path}:{line}: {here} imports {there}")
    return bad


def ray_in_its_rooms(files: Files) -> list[str]:
    """(b) Ray is imported only where work is spread."""
    return [
        f"{path}:{line}: imports {module}"
        for path, tree in files.items()
        for module, line in modules(tree, path)
        if module.split(".")[0] == "ray" and not path.startswith(RAY_ROOMS) and path not in RAY_FILES
    ]


def no_rag_bags(files: Files) -> list[str]:
    """(e) No file is named after nothing."""
    return [path for path in files if FORBIDDEN_NAMES & set(path.removesuffix(".py").split("/"))]


def one_list_of_findings(files: Files) -> list[str]:
    """(f) Four or more findings in one collection are a second list of findings."""
    bad = []
    for path, tree in files.items():
        if path == "ray_cxr/labels.py":
            continue
        too_many = KNOWS_EACH_FINDING.get(path, 4)
        for node in ast.walk(tree):
            names = _names(node)
            found = names & set(FINDINGS)
            if path in KNOWS_EACH_FINDING and isinstance(node, ast.Dict):
                if len(found) >= 4 and names - set(LABELS):
                    bad.append(f"{path}:{node.lineno}: {', '.join(sorted(names - set(LABELS)))} is no finding")
            elif len(found) >= too_many:
                bad.append(f"{path}:{getattr(node, 'lineno', 0)}: names {len(found)} findings; use labels.FINDINGS")
    return bad


def _names(node: ast.AST) -> set[str]:
    """The words that stand in a collection, as its items or keys."""
    names: list[str | None] = []
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        # [("Mass", 1), ("Nodule", 2)] is a table of findings too.
        firsts = [item.elts[0] for item in node.elts if isinstance(item, (ast.List, ast.Tuple)) and item.elts]
        names = [_text(item) for item in [*node.elts, *firsts]]
    elif isinstance(node, ast.Dict):
        names = [_text(key) for key in node.keys if key is not None]
    elif isinstance(node, ast.Call):
        names = [keyword.arg for keyword in node.keywords]
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
        names = [word.strip() for word in node.value.replace("|", ",").split(",")]
    return {name for name in names if name}


def _text(node: ast.AST) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def nothing_unsafe(files: Files) -> list[str]:
    """(h) Nothing that runs what it reads."""
    bad = []
    for path, tree in files.items():
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = ast.unparse(node.func)
            if name in UNSAFE_CALLS or _last(node.func) in UNSAFE_METHODS:
                bad.append(f"{path}:{node.lineno}: {name}(")
            for keyword in node.keywords:
                is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if (keyword.arg == "allow_pickle" and not is_false) or (keyword.arg == "safe_mode" and is_false):
                    bad.append(f"{path}:{node.lineno}: {keyword.arg}")
    return bad


def no_local_branch(files: Files) -> list[str]:
    """Laptop and cluster differ in settings, never in a branch."""
    return [
        f"{path}:{node.lineno}: a branch on the place"
        for path, tree in files.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.If, ast.IfExp, ast.While)) and PLACES & {_last(inner) for inner in ast.walk(node.test)}
    ]


#: Every rule, with files that break it.
RULES: dict[Check, list[tuple[str, str]]] = {
    one_way_street: [
        ("ray_cxr/config.py", "import ray_cxr"),
        ("ray_cxr/data/x.py", "from ray_cxr.evaluation import metrics"),
        ("ray_cxr/models/x.py", "def f():\n    import ray_cxr.scoring.pipeline as p"),
        ("ray_cxr/scoring/x.py", "if TYPE_CHECKING:\n    from ray_cxr.training import loop"),
        ("ray_cxr/reporting/x.py", "from ..models import bundle"),
        ("ray_cxr/data/x.py", "import importlib\nimportlib.import_module('ray_cxr.models')"),
        ("ray_cxr/cli.py", "import jobs.train"),
        ("jobs/x.py", "from ray_cxr.training import trainer"),
        ("ray_cxr/novelty.py", ""),
    ],
    ray_in_its_rooms: [
        ("ray_cxr/data/manifest.py", "def f():\n    import ray.data as rd"),
        ("ray_cxr/evaluation/x.py", "from ray import data"),
    ],
    no_rag_bags: [("ray_cxr/data/helpers.py", ""), ("ray_cxr/misc/x.py", "")],
    one_list_of_findings: [
        ("ray_cxr/data/x.py", "A = ['Mass', 'Nodule', 'Edema', 'Hernia']"),
        ("ray_cxr/imaging/phantoms.py", "A = ['Mass', 'Nodule', 'Edema', 'Hernia', 'Fibrosis']"),
        ("ray_cxr/imaging/phantoms.py", "A = {'Mass': 1, 'Nodule': 2, 'Edema': 3, 'Hernia': 4, 'Hernai': 5}"),
        ("ray_cxr/data/x.py", "A = {'Mass': 1, 'Nodule': 2, 'Edema': 3, 'Hernia': 4}"),
        ("ray_cxr/data/x.py", "A = dict(Mass=1, Nodule=2, Edema=3, Hernia=4)"),
        ("ray_cxr/data/x.py", "A = [('Mass', 1), ('Nodule', 2), ('Edema', 3), ('Hernia', 4)]"),
        ("ray_cxr/data/x.py", "A = 'Mass|Nodule|Edema|Hernia'.split('|')"),
    ],
    nothing_unsafe: [
        ("ray_cxr/x.py", "np.load(f, allow_pickle=flag)"),
        ("ray_cxr/x.py", "eval('1')"),
        ("ray_cxr/x.py", "pd.read_pickle(f)"),
        ("ray_cxr/x.py", "keras.models.load_model(f, safe_mode=False)"),
    ],
    no_local_branch: [
        ("ray_cxr/x.py", "a = 1 if settings.local else 2"),
        ("ray_cxr/x.py", "if not is_local():\n    pass"),
    ],
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds_and_finds_fault_with_bad_files(rule: Check) -> None:
    assert rule(files()) == []
    for path, code in RULES[rule]:
        assert rule({path: ast.parse(code)}), (path, code)


def test_good_file_passes_every_rule_and_all_files_are_checked() -> None:
    code = (
        "import numpy as np\nimport ray_cxr\nfrom ray_cxr import config, labels\n"
        "def f(address):\n    from ray_cxr.training import trainer\n"
        "    if address == 'local':\n        np.load('x', allow_pickle=False)\n    return ['Mass', 'Nodule', 'Edema']\n"
    )
    assert [complaint for rule in RULES for complaint in rule({"ray_cxr/cli.py": ast.parse(code)})] == []
    assert {"ray_cxr/__init__.py", "ray_cxr/labels.py", "ray_cxr/imaging/resize.py", "jobs/train.py"} <= set(files())
    assert {room(path) for path in files()} <= set(ALLOWED)


def test_allowed_imports_have_no_circle() -> None:
    """The package itself, with its lazy names, is the only exception."""
    below = {here: rooms - {"ray_cxr"} for here, rooms in ALLOWED.items() if here != "ray_cxr"}
    TopologicalSorter(below).prepare()  # CycleError names a circle
