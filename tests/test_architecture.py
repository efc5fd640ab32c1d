"""Architecture rules: the import contracts in .importlinter, and rules that neither it nor ruff can express.

A hand-written rule is a function from parsed files to complaints, and must also find the faults in its bad examples.
"""

from __future__ import annotations

import ast
import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from ray_cxr.labels import FINDINGS, LABELS

ROOT = Path(__file__).parents[1]
#: Files that may contain tables keyed by finding. Sequences of this many findings are an error there too, because they
#: would define a second order of findings.
FINDING_TABLES = {
    "ray_cxr/imaging/phantoms.py": 5,  # the four companions of each finding
    "ray_cxr/imaging/phantom_findings.py": 5,  # the drawing of each finding
    "ray_cxr/data/external_dialects.py": 4,  # the names of other archives for each finding
    "ray_cxr/data/consensus.py": 5,  # the four findings of an airspace opacity
    "ray_cxr/evaluation/published.py": 4,  # published figures per finding
    "ray_cxr/reporting/sr_document.py": 4,  # the DICOM code of each
}
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
PLACES = {"local", "is_local", "local_mode", "on_laptop", "is_laptop", "on_cluster", "is_cluster"}
#: A private name of Ray, or a module that it generates.
PRIVATE_NAME = re.compile(r"ray(\.\w+)*\.(_\w|core\.generated)")
#: Options of `Dataset.map` and its like that Ray 2.64 removes.
DEPRECATED_OPTIONS = {"ray_remote_args_fn", "max_restarts", "max_task_retries", "max_retries"}
UNSAFE_CALLS = {"eval", "exec", "yaml.load", "builtins.eval", "builtins.exec"}
UNSAFE_METHODS = {"read_pickle", "to_pickle", "enable_unsafe_deserialization", "unsafe_load", "full_load"}

Files = Mapping[str, ast.Module]
Check = Callable[[Files], list[str]]


@functools.cache
def parse_files() -> dict[str, ast.Module]:
    """Parse every Python file of the package and the jobs, by its path in the repository."""
    paths = sorted([*ROOT.glob("ray_cxr/**/*.py"), *ROOT.glob("jobs/**/*.py")])
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def _last(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _text(node: ast.AST) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def list_imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield imported modules with their lines, also those imported by name; an unknown name is `?`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and _last(node.func) in ("import_module", "__import__"):
            yield (_text(node.args[0]) if node.args else None) or "?", node.lineno


def jobs_import_only_the_program(files: Files) -> list[str]:
    """Jobs call `ray_cxr.__main__`, and no module imports a job: import-linter knows one root package only."""
    return [
        f"{path}:{line}: imports {module}"
        for path, tree in files.items()
        for module, line in list_imports(tree)
        if module.split(".")[0] == "jobs"
        or (path.startswith("jobs/") and module.startswith("ray_cxr") and module != "ray_cxr.__main__.main")
    ]


def no_own_module_imported_by_name(files: Files) -> list[str]:
    """import-linter cannot see these imports."""
    return [
        f"{path}:{line}: imports {module} by name"
        for path, tree in files.items()
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call))
        for module, line in list_imports(ast.Expression(call))
        if module.split(".")[0] in ("?", "ray_cxr", "jobs")
    ]


def no_catch_all_names(files: Files) -> list[str]:
    """The name of a file says what it contains."""
    return [path for path in files if FORBIDDEN_NAMES & set(path.removesuffix(".py").split("/"))]


def findings_are_listed_once(files: Files) -> list[str]:
    """Four or more findings in one collection are a second list of findings."""
    bad = []
    for path, tree in files.items():
        if path == "ray_cxr/labels.py":
            continue
        too_many = FINDING_TABLES.get(path, 4)
        for node in ast.walk(tree):
            names = _collect_names(node)
            found = names & set(FINDINGS)
            if path in FINDING_TABLES and isinstance(node, ast.Dict):
                if len(found) >= 4 and names - set(LABELS):
                    bad.append(f"{path}:{node.lineno}: {', '.join(sorted(names - set(LABELS)))} is no finding")
            elif len(found) >= too_many:
                bad.append(f"{path}:{getattr(node, 'lineno', 0)}: names {len(found)} findings; use labels.FINDINGS")
    return bad


def _collect_names(node: ast.AST) -> set[str]:
    """Return the strings in a collection, as its items or keys."""
    names: list[str | None] = []
    match node:
        case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
            # [("Mass", 1), ("Nodule", 2)] is a table of findings too.
            firsts = [item.elts[0] for item in items if isinstance(item, (ast.List, ast.Tuple)) and item.elts]
            names = [_text(item) for item in [*items, *firsts]]
        case ast.Dict(keys=keys):
            names = [_text(key) for key in filter(None, keys)]
        case ast.Call(keywords=keywords):
            names = [keyword.arg for keyword in keywords]
        case ast.Constant(value=str(text)) if "\n" not in text:
            names = [word.strip() for word in text.replace("|", ",").split(",")]
    return set(filter(None, names))


def no_unsafe_calls(files: Files) -> list[str]:
    """No call executes the data that it reads."""
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


def private_names_of_ray_are_in_one_module(files: Files) -> list[str]:
    """`ray_api` alone uses names that Ray may change in any minor version, as imports, attributes or texts."""
    bad = []
    for path, tree in files.items():
        if path == "ray_cxr/ray_api.py":
            continue
        found = list(list_imports(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
                found.append((ast.unparse(node), node.lineno))
            elif isinstance(node, ast.Constant) and " " not in (_text(node) or " "):
                found.append((str(node.value), node.lineno))
            elif isinstance(node, ast.Call) and _last(node.func) in ("map", "flat_map", "map_batches"):
                found += [(f"ray._{one.arg}", node.lineno) for one in node.keywords if one.arg in DEPRECATED_OPTIONS]
        bad += [f"{path}:{line}: {name}" for name, line in found if PRIVATE_NAME.match(name)]
    return bad


def no_branch_on_the_place(files: Files) -> list[str]:
    """Laptop and cluster differ in settings, never in a branch."""
    return [
        f"{path}:{node.lineno}: a branch on the place"
        for path, tree in files.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.If, ast.IfExp, ast.While)) and PLACES & {_last(inner) for inner in ast.walk(node.test)}
    ]


#: Every rule, with files that break it.
RULES: dict[Check, list[tuple[str, str]]] = {
    jobs_import_only_the_program: [
        ("jobs/x.py", "from ray_cxr.training import trainer"),
        ("jobs/x.py", "import ray_cxr"),
        ("jobs/x.py", "from ray_cxr.cli import main"),
        ("ray_cxr/cli/data.py", "import jobs.train"),
    ],
    no_own_module_imported_by_name: [
        ("ray_cxr/data/x.py", "import importlib\nimportlib.import_module('ray_cxr.models')"),
        ("ray_cxr/data/x.py", "def f(name):\n    __import__(name)"),
    ],
    no_catch_all_names: [("ray_cxr/data/helpers.py", ""), ("ray_cxr/misc/x.py", "")],
    findings_are_listed_once: [
        ("ray_cxr/data/x.py", "A = ['Mass', 'Nodule', 'Edema', 'Hernia']"),
        ("ray_cxr/imaging/phantoms.py", "A = ['Mass', 'Nodule', 'Edema', 'Hernia', 'Fibrosis']"),
        ("ray_cxr/imaging/phantoms.py", "A = {'Mass': 1, 'Nodule': 2, 'Edema': 3, 'Hernia': 4, 'Hernai': 5}"),
        ("ray_cxr/data/x.py", "A = {'Mass': 1, 'Nodule': 2, 'Edema': 3, 'Hernia': 4}"),
        ("ray_cxr/data/x.py", "A = dict(Mass=1, Nodule=2, Edema=3, Hernia=4)"),
        ("ray_cxr/data/x.py", "A = [('Mass', 1), ('Nodule', 2), ('Edema', 3), ('Hernia', 4)]"),
        ("ray_cxr/data/x.py", "A = 'Mass|Nodule|Edema|Hernia'.split('|')"),
    ],
    no_unsafe_calls: [
        ("ray_cxr/x.py", "np.load(f, allow_pickle=flag)"),
        ("ray_cxr/x.py", "eval('1')"),
        ("ray_cxr/x.py", "pd.read_pickle(f)"),
        ("ray_cxr/x.py", "keras.models.load_model(f, safe_mode=False)"),
    ],
    private_names_of_ray_are_in_one_module: [
        ("ray_cxr/x.py", "def f():\n    from ray._private.utils import get_num_cpus"),
        ("ray_cxr/x.py", "from ray.train.v2._internal.callbacks import datasets"),
        ("ray_cxr/x.py", "import ray\nray._private.state.state"),
        ("ray_cxr/x.py", "logging.getLogger('ray.data._internal.progress')"),
        ("ray_cxr/x.py", "from ray.core.generated import gcs_service_pb2"),
        ("jobs/x.py", "dataset.map(f, max_restarts=3)"),
    ],
    no_branch_on_the_place: [
        ("ray_cxr/x.py", "a = 1 if settings.local else 2"),
        ("ray_cxr/x.py", "if not is_local():\n    pass"),
    ],
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds_and_finds_faults_in_bad_files(rule: Check) -> None:
    assert rule(parse_files()) == []
    for path, code in RULES[rule]:
        assert rule({path: ast.parse(code)}), (path, code)


def test_good_file_passes_every_rule_and_all_files_are_checked() -> None:
    code = (
        "import numpy as np\nfrom ray_cxr import config, labels\n"
        "def f(address):\n    importlib.import_module('gdcm')\n"
        "    if address == 'local':\n        np.load('x', allow_pickle=False)\n    return ['Mass', 'Nodule', 'Edema']\n"
    )
    assert [complaint for rule in RULES for complaint in rule({"ray_cxr/cli/data.py": ast.parse(code)})] == []
    expected = {"ray_cxr/__init__.py", "ray_cxr/labels.py", "ray_cxr/imaging/resize.py", "jobs/train.py"}
    assert expected <= set(parse_files())


def test_import_contracts_hold_and_find_faults(tmp_path: Path) -> None:
    """They hold for the package, and fail for a copy of its empty modules with nine faults."""
    lines = {
        "data/__init__.py": "from ray_cxr.evaluation import metrics",
        "imaging/__init__.py": "def f():\n    import ray_cxr.data",
        "scoring/__init__.py": "if TYPE_CHECKING:\n    from ray_cxr.training import loop",
        "models/__init__.py": "from ..scoring import pipeline",
        "evaluation/__init__.py": "import ray.data",
        "storage/paths.py": "from ray_cxr.storage import files",
        "storage/files.py": "from ray_cxr.storage import paths",
        "novelty.py": "",
        "training/loop.py": "import keras\nimport tensorflow",
        # The exceptions, which must match an import.
        "__init__.py": "from ray_cxr import api\nfrom ray_cxr.imaging import overlays\n"
        "from ray_cxr.models import bundle\nfrom ray_cxr.data import features",
        "data/prepared.py": "import ray",
        "models/keras_setup.py": "import keras\nimport tensorflow",
    }
    for path in ROOT.glob("ray_cxr/**/*.py"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.touch()
    for name, code in lines.items():
        (tmp_path / "ray_cxr" / name).write_text(code, encoding="utf-8")
    shutil.copy(ROOT / ".importlinter", tmp_path)
    for folder, kept in ((ROOT, 4), (tmp_path, 0)):
        program = [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"]
        done = subprocess.run(program, cwd=folder, capture_output=True, encoding="utf-8")
        assert f"{kept} kept, {4 - kept} broken" in done.stdout, done.stdout + done.stderr
        assert (done.returncode == 0) == (kept == 4)
