"""One Python file out of several modules of ours: what one of them uses, and nothing else.

    source = joined(FILES, head)

Used by hf/folder.py, for the file that an exported folder carries: people who load it have no Aria.
So the network there is this one, line by line. The modules come in the order of FILES. Of each come
the classes, functions and constants that the last one needs, with the comments above them; imports
of each other go, the others stand at the top, once.
"""
import ast
from pathlib import Path
from typing import NamedTuple

from common.files import ROOT

FILES = (
    "model_config.py",
    "layers.py",
    "attention.py",
    "eco_hybrid.py",
    "model.py",
    "hf/modeling.py",
)
SPACE = "\n\n\n"        # between two parts
WIDTH = 100


class Part(NamedTuple):
    """A statement at the top level of a module."""
    names: set          # that it defines
    uses: set           # names that it may need
    text: str           # with the comments above it


class Module(NamedTuple):
    path: str
    docstring: str
    parts: list         # [Part]
    imports: dict       # {name: where it comes from}, of what is not ours
    ours: set           # names that come from other modules of ours


def joined(files, head):
    """The source of all that the last of the files needs; head: the new file's docstring."""
    modules = [read(path) for path in files]
    owners = {}
    for module in modules:
        for part in module.parts:
            for name in part.names:
                assert name not in owners, f"{module.path} and {owners.get(name)}: both have {name}"
                owners[name] = module.path
    wanted = needed(modules)

    imports = {}
    sections = []
    for module in modules:
        kept = [part for part in module.parts if part.names & wanted]
        uses = set().union(*(part.uses for part in kept))
        missing = module.ours & uses - set(owners)
        assert not missing, f"{module.path} uses {missing}, which none of the files has"
        for name, origin in module.imports.items():
            if name in uses:
                imports.setdefault(origin, set()).add(name)
        whole = len(kept) == len(module.parts)
        parts = [heading(module, whole), *(part.text for part in kept)]
        sections.append(SPACE.join(parts))
    top = f'"""{head}"""\n' + "\n".join(import_lines(imports))
    return SPACE.join([top, *sections]) + "\n"


def read(path):
    """The parts of one module."""
    text = (ROOT / path).read_text(encoding="utf-8")
    lines = text.splitlines()
    tree = ast.parse(text)
    ours = {Path(other).stem for other in FILES} | {
        other.name for other in ROOT.iterdir() if (other / "__init__.py").exists()
    }
    parts = []
    imports = {}
    names = set()                               # from other modules of ours
    end = tree.body[0].end_lineno               # of the docstring
    for node in tree.body[1:]:
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ours:
            names |= {alias.name for alias in node.names}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            imports |= imported(node)
        else:
            comments = "\n".join(lines[end:node.end_lineno]).strip("\n")
            uses = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
            parts.append(Part(defined(node), uses, comments))
        end = node.end_lineno
    return Module(path, ast.get_docstring(tree), parts, imports, names)


def imported(node):
    """{name: where it comes from: a module, or the words of its import} of one import."""
    found = {}
    for alias in node.names:
        name = alias.asname or alias.name
        if isinstance(node, ast.ImportFrom) and not alias.asname:
            found[name] = node.module
        else:
            found[name] = ast.unparse(node)
    return found


def import_lines(imports):
    """{where from: names} -> the statements, `import x` first."""
    plain, others = [], []
    for origin, names in sorted(imports.items()):
        if origin.startswith("import "):
            plain.append(origin)
        else:
            others.append(f"from {origin} import {', '.join(sorted(names))}")
    return [*plain, *others]


def defined(node):
    """The names that a statement at the top level gives a meaning."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    assert isinstance(node, ast.Assign), f"line {node.lineno}: neither a definition nor a constant"
    return {inner.id for target in node.targets for inner in ast.walk(target)
            if isinstance(inner, ast.Name)}


def needed(modules):
    """The names that the last module's parts need, directly or through others."""
    parts = {}
    for module in modules:
        for part in module.parts:
            parts |= dict.fromkeys(part.names, part)
    wanted = set()
    waiting = [name for part in modules[-1].parts for name in part.names]
    while waiting:
        name = waiting.pop()
        if name in parts and name not in wanted:
            wanted.add(name)
            waiting += parts[name].uses
    return wanted


def heading(module, whole):
    """The module's name and what its docstring says, as comments: of one that lost a part only the
    first paragraph, as the rest may be about what is not there.
    """
    said = module.docstring
    if not whole:
        said = said.split("\n\n")[0]
    lines = ["=" * (WIDTH - 2), module.path, "", *said.splitlines()]
    return "\n".join(f"# {line}".rstrip() for line in lines)
