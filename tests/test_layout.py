"""The shape of the project: one-way imports, no name that hides another, no dangerous call, each
flag declared once.

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
from common.files import ROOT

ROOMS = ("common", "text", "training", "sampling", "evaluation", "edge", "hf", "serving", "web")
PATHS = sorted(
    [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
)
TREES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"):
         ast.parse(path.read_text(encoding="utf-8")) for path in PATHS}
COMMANDS = [
    name
    for name, tree in TREES.items()
    if "." not in name
    and any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)
]
ON_COMMANDS = {"colab_train_eco": {"train"}}  # this command is another one with settings of its own
NEEDS_NO_TORCH = sorted(  # --help is instant: whatever a command imports before it knows what to do
    {*COMMANDS, "config", "cli", "model_config", "studies", "training.lengths",
     "training.footprint", "training.launch_plan",
     "evaluation.study_plan",
     "evaluation.study_report",
     *(name for name in TREES if name.startswith(("common", "text", "sampling", "serving")))}
    - {"common.machine", "sampling.fast", "sampling.torch_model", "sampling.trained",
       "sampling.cuda_graphs", "sampling.gaussian_writer"}
    | {"edge.engine"})  # decoding is numpy's work
EVERYTHING = [p for p in sorted(ROOT.rglob("*.py"))
              if not {".venv", ".edge", "data", "checkpoints"} & set(p.relative_to(ROOT).parts)]


def imports(tree, top_only=False):
    """The modules that this one imports, in full where they are ours: `text.hub`, not `text`."""
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name if alias.name in TREES else alias.name.split(".")[0]
                        for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import: name the room"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in TREES else node.module


def test_imports_go_one_way():
    """No circle, late imports inside functions included: every module can be given a rank."""
    below = {name: set(imports(tree)) & set(TREES) - {name} for name, tree in TREES.items()}
    ranks = {}

    def rank(name, above=()):
        circle = " -> ".join([*above[above.index(name):], name]) if name in above else ""
        assert not circle, f"these modules import each other: {circle}"
        if name not in ranks:
            ranks[name] = 1 + max((rank(other, (*above, name)) for other in below[name]), default=0)
        return ranks[name]

    for name in TREES:
        rank(name)
    assert max(ranks.values()) > 5, "the imports were not read"


def test_no_command_imports_another():
    for name, tree in TREES.items():
        commands = set(imports(tree)) & set(COMMANDS) - {name} - ON_COMMANDS.get(name, set())
        assert not commands, f"{name} imports {commands}: what both need belongs into a room"


def test_a_room_knows_nothing_above_it():
    """common/ imports nothing of the project; text/ and checkpoint.py do not know the settings."""
    for name, tree in TREES.items():
        ours = {other for other in imports(tree) if other in TREES}
        if name.startswith("common"):
            assert all(other.startswith("common") for other in ours), (name, ours)
        if name.startswith("text") or name in ("checkpoint", "checkpoint_shards"):
            assert not ours & {"config", "cli"}, f"{name}: callers pass what it needs"


def test_the_starter_corpus_is_data():
    """text/starter/: constants, and the one list that its files make together; grammar.py uses
    them.
    """
    for path in set((ROOT / "text/starter").glob("*.py")) - {ROOT / "text/starter/grammar.py"}:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            assert isinstance(node, (ast.Expr, ast.Assign, ast.ImportFrom)), (
                f"{path.name}:{node.lineno}"
            )
            assert not isinstance(node, ast.ImportFrom) or (path.stem, node.module) == (
                "__init__",
                "text.starter",
            )


def test_what_goes_to_stderr_by_itself_is_a_warning():
    """Lines of progress go through say(), which --quiet silences."""
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) != "print":
                continue
            if any(
                keyword.arg == "file" and ast.unparse(keyword.value) == "sys.stderr"
                for keyword in node.keywords
            ):
                text = ast.unparse(node.args[0]).lstrip("f\"'")
                assert text.startswith(("error", "warning", "notice")), (
                    f"{name}.py:{node.lineno}: print where say belongs"
                )


def test_no_name_hides_a_module():
    for name in {name.split(".")[0] for name in TREES}:
        assert name not in sys.stdlib_module_names, f"{name} would break `import {name}` everywhere"
        found = importlib.util.find_spec(name)
        here = (str(ROOT / f"{name}.py"), str(ROOT / name / "__init__.py"))
        assert found and found.origin in here, f"{name} is also {found and found.origin}"


@pytest.mark.parametrize("name", NEEDS_NO_TORCH)
def test_torch_comes_late(name):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, {name}; sys.exit('torch' in sys.modules)"], cwd=ROOT
    )
    assert done.returncode == 0, f"import {name} pulls in torch"


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_says_what_it_is(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "no docstring"
    runs = any(
        isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body
    )
    if runs and path.parent == ROOT:
        assert f"python -m {path.stem}" in ast.get_docstring(tree), "it runs, but does not say how"


FORBIDDEN = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {
    ("torch", "load"),
    ("torch", "save"),
    ("os", "system"),
    ("os", "popen"),
    ("np", "load"),
}


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
                assert keyword.arg not in ("shell", "trust_remote_code", "allow_pickle"), (
                    ast.unparse(node)
                )


def test_a_flag_has_one_default():
    """No function gives a parameter that is called like a flag a default of its own, unless it is
    listed with its reason.
    """
    allowed = {  # building blocks whose parameter means the same word in another place
        "seed", "model", "device", "steps", "force",
        "resume"}     # the resume rule of a flag, in common/flags.py
    names = {f.name for c in config.COMMANDS.values() for f in dataclasses.fields(c)} - allowed
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.Lambda)):
                a = node.args
                pairs = [
                    *zip(a.args[::-1], a.defaults[::-1], strict=False),
                    *zip(a.kwonlyargs, a.kw_defaults, strict=True),
                ]
                for arg, default in pairs:
                    plain = isinstance(default, ast.Constant) and default.value is not None
                    assert not (plain and arg.arg in names), (
                        f"{module}:{node.lineno}: {arg.arg}={ast.unparse(default)}"
                    )


def test_no_registry_host_and_no_personal_path():
    for path in [
        *EVERYTHING,
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("*.txt"),
        *ROOT.glob("*.toml"),
    ]:
        text = path.read_text(encoding="utf-8")
        if path.name == "test_layout.py":
            continue
        assert not re.search(
            r"pypi\.org|index-url|pythonhosted|download\.pytorch|/home/\w|/Users/\w|/work/", text
        ), path


def test_fork_of_state_is_absent():
    """No module-level mutable state that a command changes: the only globals are constants and
    registries in capitals.
    """
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            assert not isinstance(node, ast.Global), (
                f"{name}.py:{node.lineno} has a global statement"
            )


def test_shapes_are_written_where_they_change():
    """In the files that hold the mathematics, a statement that changes a shape has the new shape in
    a comment: at its end or in the line above it.
    """
    changes = re.compile(r"\.(view|reshape|unflatten|permute|unfold)\(|einsum\(")
    shape = re.compile(r"#.*\(|-> \(|return ")
    for name in ("model", "eco_hybrid", "layers", "masking", "gaussian", "gaussian_model"):
        lines = (ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()
        for node in ast.walk(TREES[name]):
            if not isinstance(node, ast.stmt) or hasattr(node, "body"):
                continue
            statement = lines[node.lineno - 1:node.end_lineno]
            if any(changes.search(line) for line in statement):
                around = [lines[node.lineno - 2], *statement]
                where = f"{name}.py:{node.lineno}"
                assert any(shape.search(line) for line in around), f"{where}: no shape comment"
