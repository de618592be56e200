"""The house rules: who may import whom, how long a function may be, what must never be called."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "silc"
FILES = sorted(SOURCE.rglob("*.py"))
LAYERS = [
    {"config", "plain", "losses", "tensors", "eval.metrics"},
    {"model", "data", "parallel"},
    {"train.optim", "train.checkpoint", "train.guard", "train.log", "train.lora", "eval.embed", "eval.prompts"}
    | {"eval.protocols", "eval.linear", "eval.suites", "eval.trained"},
    {"train.pretrain", "train.student", "train.segment", "predict", "opening", "adapters", "export", "eval.run"}
    | {"eval"},
    {"train.loop", "train.prepare", "recipes", "plan", "doctor", "app", "bridges"},
    {"cli", "quickstart", "study", "__main__", ""},
]


def room(module: str) -> str:
    return module.removeprefix("silc").removeprefix(".")


def layer(name: str) -> int:
    """The most specific entry decides: eval.metrics before eval."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        for number, rooms in enumerate(LAYERS):
            if ".".join(parts[:length]) in rooms:
                return number
    return len(LAYERS) - 1 if name == "" else -1


def module_of(path: Path) -> str:
    return room(".".join(("silc", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"))


def imports(path: Path) -> set[str]:
    """Rooms that a file imports, `from silc.x import y` counting as x.y where y is a module; types-only ones too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            as_file = SOURCE.parent / node.module.replace(".", "/")
            names = {f"{node.module}.{a.name}" for a in node.names if (as_file / f"{a.name}.py").exists()}
            found |= names or {node.module}
    return {room(name) for name in found if name == "silc" or name.startswith("silc.")}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_one_way(path: Path) -> None:
    name = module_of(path)
    if name == "" or path.name == "__init__.py":
        return  # the package's own front door resolves names lazily
    mine = layer(name)
    assert mine >= 0, f"{name} stands in no layer: add it to LAYERS"
    for other in imports(path) - {""}:
        if layer(other) == mine and other != name:
            same_room = other.split(".")[0] == name.split(".")[0]
            assert mine in (4, 5) or (
                same_room and not (mine == 3 and name.startswith("eval") and name != "eval.run")
            ), f"{name} imports its neighbour {other}"
        assert layer(other) <= mine, f"{name} (layer {mine}) imports {other} (layer {layer(other)})"
        assert not (name.startswith("eval") and other.startswith("train")), "evaluation never needs training"
        assert {name.split(".")[0], other.split(".")[0]} != {"model", "data"}, "model and data do not know each other"


def functions(path: Path) -> list[tuple[str, int]]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        (node.name, (node.end_lineno or node.lineno) - node.lineno + 1)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, kinds)
    ]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_functions_fit_on_a_screen_and_files_open_with_what_they_are(path: Path) -> None:
    for name, length in functions(path):
        assert length <= 60, f"{name} is {length} lines long"
    assert len(path.read_text().splitlines()) <= 400
    assert ast.get_docstring(ast.parse(path.read_text())), "a file opens by saying what it is"


FORBIDDEN = {"pickle.load", "pickle.loads", "torch.load", "os.system", "eval", "exec"}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_nothing_unpickles_and_nothing_runs_a_shell(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            safely = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            assert called not in FORBIDDEN or (called == "torch.load" and safely), f"{called} in line {node.lineno}"
            arrays = [k for k in node.keywords if k.arg == "allow_pickle"]
            assert called != "np.load" or arrays, f"{called} without allow_pickle=False in line {node.lineno}"
            for keyword in node.keywords:
                shell = keyword.arg == "shell" or keyword.arg == "allow_pickle"
                if shell:
                    assert isinstance(keyword.value, ast.Constant) and keyword.value.value is False


def test_the_readme_shows_every_room() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in SOURCE.iterdir():
        if path.suffix == ".py" and not path.name.startswith("__"):
            assert path.name in readme, f"README.md does not tell what {path.name} is for"
