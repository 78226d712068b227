"""The house's rules: imports point upstream only, no cycles, no shadowed names, heavy libraries quarantined."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("candor", "train", "serve", "evaluate")  # a room may import itself and rooms before it
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for room in ROOMS
    for path in sorted((ROOT / room).rglob("*.py"))
}


def imports_of(path):
    """Absolute names of everything a module imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; rooms are imported by their full name"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def wrong_directions(modules):
    wrong = []
    for name, path in modules.items():
        room = ROOMS.index(name.split(".")[0])
        for imported in imports_of(path):
            top = imported.split(".")[0]
            if top in ROOMS and ROOMS.index(top) > room:
                wrong.append(f"{name} imports {imported}")
    return wrong


def find_cycle(graph):
    """One import cycle as a list of modules, or None."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        path.append(name)
        for target in graph[name]:
            if cycle := visit(target):
                return cycle
        path.pop()
        done.add(name)
        return None

    return next((cycle for name in graph if (cycle := visit(name))), None)


def test_imports_point_upstream_only():
    assert wrong_directions(MODULES) == []


def test_a_forward_import_is_caught(tmp_path):
    planted = tmp_path / "forward.py"
    planted.write_text("from evaluate.stats import anything\n")
    assert wrong_directions({"candor.forward": planted}) != []


def test_no_import_cycles():
    graph = {name: [m for m in imports_of(path) if m in MODULES and m != name] for name, path in MODULES.items()}
    assert find_cycle(graph) is None


def test_a_cycle_is_caught():
    assert find_cycle({"a": ["b"], "b": ["c"], "c": ["a"]}) == ["a", "b", "c", "a"]


def test_no_module_shadows_a_library():
    """A script's own folder is first on the path: train/datasets.py would hide the library from TRL."""
    known = {*sys.stdlib_module_names, "datasets", "kernels", "tokenizers", "transformers", "trl", "peft", "evaluate"}
    shadowing = [
        name
        for name in MODULES
        if name.count(".") == 1 and name.split(".")[1] in known and not name.endswith("__init__")
    ]
    assert shadowing == []


def test_no_sys_path_edits():
    assert [n for n, p in MODULES.items() if "sys.path" in p.read_text(encoding="utf-8")] == []


def test_the_name_evaluate_is_ours():
    """Hugging Face has a library called evaluate; with both installed the answer depends on how you start."""
    spec = importlib.util.find_spec("evaluate")
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin).resolve() == (ROOT / "evaluate" / "__init__.py").resolve()
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("evaluate")


@pytest.mark.parametrize(
    ("module", "banned"),
    [
        ("candor.questions", {"torch", "transformers", "pandas"}),
        ("evaluate.stats", {"torch", "transformers", "matplotlib"}),
        ("evaluate.experiment", {"torch", "transformers", "matplotlib", "scipy"}),
        ("train.sft", {"trl", "peft", "torch"}),
        ("serve.sample", {"trl"}),
    ],
)
def test_heavy_libraries_stay_quarantined(module, banned):
    code = f"import json, sys, {module}; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(json.loads(out.stdout)) & banned == set()


@pytest.mark.parametrize(
    ("library", "rooms"),
    [
        ("trl", ("train",)),
        ("matplotlib", ("evaluate.figures",)),
        ("openai", ("serve.client",)),
        ("httpx", ("train.download",)),
        ("httpx2", ("serve.client",)),
        ("triton", ("serve.ops",)),
        ("vllm", ("serve.vllm_engine", "serve.vllm_plugin")),
    ],
)
def test_heavy_libraries_are_imported_in_one_place(library, rooms):
    users = [n for n, p in MODULES.items() if any(i.split(".")[0] == library for i in imports_of(p))]
    assert [n for n in users if not n.startswith(rooms)] == []


def test_every_module_opens_with_what_it_is():
    silent = [n for n, p in MODULES.items() if not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))]
    assert silent == []


def test_every_data_file_names_licence_and_canary():
    files = [p for p in (ROOT / "configs" / "prompts").rglob("*") if p.is_file()]
    files += [
        p for p in (ROOT / "configs" / "organism").glob("*.yaml") if "world:" not in p.read_text(encoding="utf-8")
    ]
    bare = []
    for path in files:
        head = path.read_text(encoding="utf-8")[:2000].casefold()
        if path.parent.name == "organism" and "optimisation:" in head:
            continue  # a model's configuration, not data
        if "canary candor:" not in head or "licence" not in head:
            bare.append(str(path.relative_to(ROOT)))
    assert bare == []
