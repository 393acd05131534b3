"""How densely the code is written: a few counts that say whether a person can read it line by line.

    python benchmarks/readability.py               # this repository, tests and benchmarks left out
    python benchmarks/readability.py PATH ...      # any files or folders, to compare with

Counts per file set: tokens per code line (names, numbers, strings, operators; comments and
docstrings left out), lines over 100 characters, conditional expressions and tuple assignments per
1,000 code lines, imports inside functions, assignments inside conditions, and the longest
functions. Tables of words (text/starter, the tables of text/romanise.py) are left out of the long
lines. The last line is one JSON document.
"""
import ast
import io
import json
import tokenize
from pathlib import Path

from harness import arguments

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = {"tests", "benchmarks", "data", "checkpoints", ".venv", "__pycache__"}
WORD_TABLES = ("text/starter/", "text/romanise.py")
WIDTH = 100
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENCODING, tokenize.ENDMARKER}


def source_files(paths):
    """The Python files of these paths; without any, those of the repository's own rooms."""
    if not paths:
        return [
            p for p in sorted(ROOT.rglob("*.py")) if p.relative_to(ROOT).parts[0] not in LEFT_OUT
        ]
    found = []
    for path in map(Path, paths):
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return found


def docstring_lines(tree):
    """The numbers of the lines that docstrings take."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            text = node.body[0]
            lines |= set(range(text.lineno, text.end_lineno + 1))
    return lines


def count(path):
    """The counts of one file, as a dictionary; functions as (lines, name)."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    docs = docstring_lines(tree)
    tokens, code_lines = 0, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in SILENT or token.start[0] in docs:
            continue
        tokens += 1
        code_lines.update(range(token.start[0], token.end[0] + 1))
    nodes = list(ast.walk(tree))
    functions = [
        node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    late = set()
    for function in functions:
        late |= {
            node for node in ast.walk(function) if isinstance(node, (ast.Import, ast.ImportFrom))
        }
    words = any(part in path.as_posix() for part in WORD_TABLES)
    return {
        "tokens": tokens,
        "code_lines": len(code_lines),
        "long_lines": 0 if words else sum(len(line) > WIDTH for line in source.split("\n")),
        "conditional_expressions": sum(isinstance(node, ast.IfExp) for node in nodes),
        "tuple_assignments": sum(
            isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
            and isinstance(node.value, ast.Tuple) for node in nodes),
        "assignments_in_conditions": sum(isinstance(node, ast.NamedExpr) for node in nodes),
        "late_imports": len(late),
        "functions": [(f.end_lineno - f.lineno + 1, f"{path.stem}.{f.name}") for f in functions],
    }


def measure(files):
    """All files together -> the figures that are printed."""
    counts = [count(path) for path in files]
    total = {key: sum(c[key] for c in counts) for key in counts[0] if key != "functions"}
    functions = sorted((f for c in counts for f in c["functions"]), reverse=True)
    thousand = total["code_lines"] / 1000
    return {
        "files": len(files),
        "code_lines": total["code_lines"],
        "tokens_per_line": round(total["tokens"] / total["code_lines"], 2),
        "long_lines": total["long_lines"],
        "conditional_expressions_per_1000": round(total["conditional_expressions"] / thousand, 1),
        "tuple_assignments_per_1000": round(total["tuple_assignments"] / thousand, 1),
        "assignments_in_conditions": total["assignments_in_conditions"],
        "late_imports": total["late_imports"],
        "longest_functions": [f"{name} {lines}" for lines, name in functions[:5]],
    }


def main():
    parser = arguments(__doc__)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="files or folders")
    figures = measure(source_files(parser.parse_args().paths))
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):34} {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
