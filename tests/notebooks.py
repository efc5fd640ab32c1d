"""Run the cells of a notebook in one namespace, without Jupyter.

usage: python tests/notebooks.py examples/first_look.ipynb     runs it in the working directory and stores its outputs

The result of a cell is the value of its last expression. A matplotlib figure that is the result becomes a PNG.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure


def read_cells(path: Path) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return cells


def run_cells(cells: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """Run the code cells; return what each printed and the value of its last expression."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    results = []
    for number, cell in enumerate(cells):
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]), f"<cell {number}>")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        value = None
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(tree, f"<cell {number}>", "exec"), namespace)
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), f"<cell {number}>", "eval"), namespace)
        results.append((printed.getvalue(), value))
    return results


def _show(printed: str, value: Any, count: int) -> list[dict[str, Any]]:
    """Return the outputs of a cell in the form of nbformat 4."""
    outputs: list[dict[str, Any]] = []
    if printed:
        outputs.append({"name": "stdout", "output_type": "stream", "text": printed.splitlines(keepends=True)})
    if value is None:
        return outputs
    data: dict[str, Any] = {"text/plain": repr(value).splitlines(keepends=True)}
    if isinstance(value, Figure):
        buffer = io.BytesIO()
        value.savefig(buffer, format="png", dpi=80)
        data = {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": ["<Figure>"]}
    elif hasattr(value, "_repr_html_"):
        data["text/html"] = value._repr_html_().splitlines(keepends=True)
    outputs.append({"data": data, "execution_count": count, "metadata": {}, "output_type": "execute_result"})
    return outputs


def main(path: Path) -> None:
    matplotlib.use("agg")
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for count, (cell, (printed, value)) in enumerate(zip(code, run_cells(notebook["cells"]), strict=True), start=1):
        cell |= {"execution_count": count, "outputs": _show(printed, value, count)}
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
