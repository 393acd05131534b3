"""The documents are true: commands by line 25, flags that exist, a file table that is the folder,
generated tables up to date.

    python -m pytest tests/test_docs.py          # python tests/test_docs.py rewrites docs/flags.md
        after a deliberate change
"""
import importlib.metadata
import json
import re
import shlex
from pathlib import Path

import pytest

import cli
import config
from common.files import ROOT
import conftest  # noqa: F401  (puts the repository on the path)
from common.flags import table
from evaluation import study_report

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    ROOT / "data/README.md",
    ROOT / "checkpoints/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


def fences(text):
    return [
        line.strip()
        for block in re.findall(r"```bash\n(.*?)```", text, re.S)
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip() and not line.startswith("#")
    ]


def flags_page():
    parts = [f"## {name}\n\n{table(cls)}\n" for name, cls in config.COMMANDS.items()]
    return (
        "# Every flag\n\nGenerated from config.py by `python tests/test_docs.py`.\n\n"
        + "\n".join(parts)
    )


def test_both_commands_come_first_and_say_how_long_they_take():
    top = README.splitlines()[:25]
    lines = [line for line in top if line.startswith("python3 -m venv .venv")]
    assert (
        len(lines) == 2
        and "-m train --preset starter" in lines[0]
        and lines[1].endswith("-m pytest")
    )
    for line in lines:
        assert "-r requirements.txt" in line and "-c constraints.txt" in line
    prose = " ".join(top)
    assert len(re.findall(r"\d+ (?:minutes|seconds|s\b)", prose)) >= 2, "no times"
    without_pytorch = "python3 -m venv .edge && .edge/bin/pip install -q -r requirements_edge.txt"
    assert README.index(without_pytorch) > README.index(lines[1])


def test_each_pin_fits_every_python_that_the_readme_promises():
    """A pinned version that needs a newer Python has a marker that says so. CI resolves the pins
    for each version, too.
    """
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
    assert "Python 3.10 or newer" in README
    looked = 0
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        try:
            found = importlib.metadata.distribution(pin.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if pin.specifier.contains(found.version):
            looked += 1
            needs = SpecifierSet(found.metadata["Requires-Python"] or "")
            for version in ("3.10", "3.11", "3.12", "3.13"):
                used = pin.marker is None or pin.marker.evaluate({"python_version": version})
                assert not used or needs.contains(version + ".99"), f"{line}: needs Python {needs}"
    assert looked > 5, "no pinned package is installed here"


COMMANDS = sorted(
    {(page, line) for page in PAGES for line in fences(page.read_text(encoding="utf-8"))}, key=str
)


@pytest.mark.parametrize(
    "page, line", COMMANDS, ids=lambda v: v.name if isinstance(v, Path) else v[:70]
)
def test_every_documented_command_parses(page, line):
    for part in line.split("&&"):
        words = shlex.split(part, comments=True)
        if "-m" not in words:
            continue
        module, argv = words[words.index("-m") + 1], words[words.index("-m") + 2:]
        if module in config.COMMANDS:
            cli.parse(config.COMMANDS[module], argv, module)          # a usage error raises
        elif module.startswith("diffusion"):
            assert (ROOT / Path(*module.split("."))).with_suffix(".py").exists()
        else:
            assert module in ("venv", "pytest", "pip", "ruff"), module


def test_the_table_of_files_names_every_file_and_room():
    """The README says where a line lives: each root file, each folder of code, in backticks."""
    names = {p.name for p in ROOT.glob("*.py")} | {f"{p.parent.name}/" for p in ROOT.glob("*/*.py")}
    table = "\n".join(line for line in README.splitlines() if line.startswith("|"))
    assert not [name for name in sorted(names) if f"`{name}`" not in table]
    named = re.findall(r"`([\w./]+(?:\.py|/))`", table)
    assert all((ROOT / name).exists() for name in named)


def test_the_container_file_names_what_is_there():
    """Its command parses, its files exist, what the commands need is not ignored, no host is named.
    """
    text = (ROOT / "container/Containerfile").read_text(encoding="utf-8")
    steps = dict(re.findall(r"^(ENTRYPOINT|CMD|USER) (.+)$", text, re.M))
    assert json.loads(steps["ENTRYPOINT"]) == ["python", "-m"] and steps["USER"] != "root"
    command, *argv = json.loads(steps["CMD"])
    cli.parse(config.COMMANDS[command], argv, command)
    for names in re.findall(r"^COPY (.+) \./$", text, re.M):
        assert all((ROOT / name).is_file() for name in names.split())
    assert not re.search(r"://(?!127\.0\.0\.1)", text)
    path = ROOT / "container/Containerfile.dockerignore"
    ignored = path.read_text(encoding="utf-8").split("\n")
    rooms = {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests", "benchmarks"}
    assert not rooms & set(ignored) and "!exports/starter" in ignored


def anchors(page):
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text(encoding="utf-8")):
            target, _, anchor = link.partition("#")
            path = page.parent / target if target else page
            assert path.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(path), f"{page.name} links to {link}"


def test_named_functions_exist():
    """`module.name` or `Class.name` in a document is a real name; a renamed function takes its
    sentence with it.
    """
    code = {path: path.read_text(encoding="utf-8")
            for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]}
    for page in PAGES:
        for owner, name in re.findall(
            r"`(\w+)\.(\w+)(?:\(\))?`", page.read_text(encoding="utf-8")
        ):
            texts = [text for path, text in code.items()
                     if path.stem == owner or re.search(rf"^class {owner}\b", text, re.M)]
            if texts and name not in ("py", "md", "json", "jsonl"):
                found = any(re.search(rf"\b{name}\b", text) for text in texts)
                assert found, f"{page.name}: {owner}.{name}"


def test_named_files_exist():
    """A path of code in a document leads to a file; a folder may be left out where the sentence has
    named it.
    """
    for page in PAGES:
        for name in re.findall(r"`((?:[\w-]+/)*\w+\.py)`", page.read_text(encoding="utf-8")):
            there = [ROOT / name, *ROOT.glob(f"*/{name}")]
            assert any(path.exists() for path in there), f"{page.name}: {name}"


def test_the_page_of_flags_is_generated():
    assert (ROOT / "docs/flags.md").read_text(encoding="utf-8") == flags_page(), (
        "run python tests/test_docs.py"
    )


def test_the_tables_of_results_are_made_of_the_lines_beside_them():
    """docs/studies/NAME/results.jsonl, a line for each run. python -m run_experiments --report
    docs/studies makes them again.
    """
    page, found = (
        (ROOT / "docs/results.md").read_text(encoding="utf-8"),
        study_report.sections(ROOT / "docs/studies"),
    )
    for name, lines in found:
        assert (
            f"<!-- begin {name} -->\n{study_report.markdown(name, lines)}<!-- end {name} -->"
            in page
        ), name
    assert len(found) >= 5 and all(
        len(line["documents"]["bytes"]) > 1 for _, lines in found for line in lines
    )


if __name__ == "__main__":
    (ROOT / "docs/flags.md").write_text(flags_page(), encoding="utf-8")
