"""The shape of the project: one-way imports, no name that hides another, no dangerous call, each knob declared once.

    python -m pytest tests/test_layout.py
"""
import ast
import dataclasses
import importlib.util
import re
import subprocess
import sys

import pytest

import config

ROOT = config.ROOT
# a module imports only modules of strictly lower rank, late imports inside functions included
RANKS = {
    "knobs": 0, "layers": 0, "masking": 0, "samplers": 0, "judge": 0,
    "shapes": 1, "documents": 1, "romanise": 1, "optim": 1, "attention": 1, "eco_hybrid": 1, "decode": 1, "hub": 1,
    "guard": 1, "objective": 1, "estimators": 1, "study_report": 1, "sinks": 1, "terminal": 1,
    "studies": 2, "shards": 2, "model": 2,
    "config": 3, "distributed": 3,
    "cli": 4, "study_plan": 4, "corpus": 4, "runtime": 4, "tokenizer": 4,
    "tokens": 5, "clean": 5, "spool": 5, "checkpoint": 5, "fast": 5, "fit": 5,
    "prepare": 6, "drive": 6, "verdict": 6,
    "runs": 7, "report": 7,
    "train": 8, "sample": 8,
    "evaluate": 9,
    "edge_benchmark": 10, "colab_train_eco": 10, "run_experiments": 10,
}
NEEDS_NO_TORCH = ("knobs", "shapes", "objective", "starter", "config", "cli", "documents", "hub", "clean", "spool",
                  "tokenizer", "corpus", "tokens", "prepare", "train", "sample", "evaluate", "edge_benchmark", "colab_train_eco",
                  "romanise", "studies", "study_plan", "study_report", "run_experiments", "sinks", "report")   # --help is instant
SOURCES = sorted(ROOT.glob("*.py"))
TREES = {p.stem: ast.parse(p.read_text(encoding="utf-8")) for p in SOURCES}
EVERYTHING = [p for p in sorted(ROOT.rglob("*.py")) if not {".venv", "data", "checkpoints"} & set(p.relative_to(ROOT).parts)]


def imports(tree, top_only=False):
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import: there is no package"
            yield node.module.split(".")[0]


def test_imports_go_one_way():
    assert set(TREES) == set(RANKS), "a new file needs a rank"
    for name, tree in TREES.items():
        for other in set(imports(tree)) & set(RANKS):
            assert RANKS[other] < RANKS[name], f"{name} (rank {RANKS[name]}) imports {other} (rank {RANKS[other]})"


def test_the_readme_lists_a_file_below_what_it_imports():
    names = re.findall(r"^\| `(\w+)\.py` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    for i, name in enumerate(names):
        below = set(imports(TREES[name])) & set(names[i:])
        assert not below, f"{name} stands above {below}, which it imports"


def test_the_starter_corpus_is_data():
    """starter/: constants, and the one list that its files make together; what is done with them stands in corpus.py."""
    for path in (ROOT / "starter").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            assert isinstance(node, (ast.Expr, ast.Assign, ast.ImportFrom)), f"{path.name}:{node.lineno}"
            assert not isinstance(node, ast.ImportFrom) or (path.stem, node.module) == ("__init__", "starter")


def test_what_goes_to_stderr_by_itself_is_a_warning():
    """Lines of progress go through say(), which --quiet silences."""
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) != "print":
                continue
            if any(keyword.arg == "file" and ast.unparse(keyword.value) == "sys.stderr" for keyword in node.keywords):
                text = ast.unparse(node.args[0]).lstrip("f\"'")
                assert text.startswith(("error", "warning", "notice")), f"{name}.py:{node.lineno}: print where say belongs"


def test_no_root_name_hides_a_module():
    for name in TREES:
        assert name not in sys.stdlib_module_names, f"{name}.py would break `import {name}` everywhere"
        found = importlib.util.find_spec(name)
        assert found and found.origin == str(ROOT / f"{name}.py"), f"{name} is also {found and found.origin}"


@pytest.mark.parametrize("name", NEEDS_NO_TORCH)
def test_torch_comes_late(name):
    done = subprocess.run([sys.executable, "-c", f"import sys, {name}; sys.exit('torch' in sys.modules)"], cwd=ROOT)
    assert done.returncode == 0, f"import {name} pulls in torch"


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_says_what_it_is(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "no docstring"
    runs = any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)
    if runs and path.parent == ROOT:
        assert f"python -m {path.stem}" in ast.get_docstring(tree), "it runs, but does not say how"


FORBIDDEN = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {("torch", "load"), ("torch", "save"), ("os", "system"), ("os", "popen"), ("np", "load")}


@pytest.mark.parametrize("name", TREES)
def test_no_way_to_run_what_a_file_says(name):
    """No pickle, no eval, no shell: a checkpoint or a text is data, never code."""
    tree = TREES[name]
    bad = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"} & set(imports(tree))
    assert not bad, bad
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            f = node.func
            assert not (isinstance(f, ast.Name) and f.id in FORBIDDEN), ast.unparse(node)
            if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name):
                assert (f.value.id, f.attr) not in FORBIDDEN_ATTRIBUTES, ast.unparse(node)
            for keyword in node.keywords:
                assert keyword.arg not in ("shell", "trust_remote_code", "allow_pickle"), ast.unparse(node)


def test_a_knob_has_one_default():
    """No function gives a parameter that is called like a knob a default of its own, unless it is listed with its reason."""
    allowed = {  # building blocks whose parameter means the same word in another place
        "seed", "model", "device", "steps", "force",
        "resume"}     # the resume rule of a knob, in knobs.py
    names = {f.name for c in config.COMMANDS.values() for f in dataclasses.fields(c)} - allowed
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.Lambda)):
                a = node.args
                pairs = [*zip(a.args[::-1], a.defaults[::-1], strict=False), *zip(a.kwonlyargs, a.kw_defaults, strict=True)]
                for arg, default in pairs:
                    plain = isinstance(default, ast.Constant) and default.value is not None
                    assert not (plain and arg.arg in names), f"{module}.py:{node.lineno}: {arg.arg}={ast.unparse(default)}"


def test_no_registry_host_and_no_personal_path():
    for path in [*EVERYTHING, *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*.txt"), *ROOT.glob("*.toml")]:
        text = path.read_text(encoding="utf-8")
        if path.name == "test_layout.py":
            continue
        assert not re.search(r"pypi\.org|index-url|pythonhosted|download\.pytorch|/home/\w|/Users/\w|/work/", text), path


def test_fork_of_state_is_absent():
    """No module-level mutable state that a command changes: the only globals are constants and registries in capitals."""
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            assert not isinstance(node, ast.Global), f"{name}.py:{node.lineno} has a global statement"


def test_shapes_are_written_where_they_change():
    """In the files that hold the mathematics, a line that changes a shape ends in a comment with the new shape."""
    for name in ("attention", "eco_hybrid", "layers", "masking"):
        for number, line in enumerate((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines(), 1):
            if re.search(r"\.(view|reshape|unflatten|permute|unfold)\(|einsum\(", line):
                assert re.search(r"#.*\(|-> \(|return ", line), f"{name}.py:{number}: no shape comment: {line.strip()}"
