"""A folder of python -m export --format hf as Aria reads it again: aria.json, and the files of
which it has a hash.

    manifest = read_manifest(folder)
    check_files(folder, manifest, NEEDED, remedy)       # Damage where one is not what was written

Used by hf/folder.py, which writes such folders, by hf/hub.py, by checkpoint.py for --ckpt, and by
config.py for names.
"""
import re
from pathlib import Path

from common.console import Damage, UserError
from common.files import file_sha256, read_json, seal_holds

FORMAT = "aria-hf-2"
MANIFEST = "aria.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.model"
NEEDED = (WEIGHTS, TOKENIZER)       # of the listed files, what Aria reads
PREFIX = "denoiser."                # of every tensor's name
AGAIN = "write it again with python -m export --format hf"
NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


def is_name(name):
    """Is this owner/name, as the hub has names?"""
    return bool(NAME.fullmatch(name))


def is_published(folder):
    """Is this a folder of python -m export --format hf, whole or damaged?"""
    return (Path(folder) / MANIFEST).is_file()


def read_manifest(folder):
    """aria.json: sealed, of our format, and with all that Aria needs."""
    path = Path(folder) / MANIFEST
    manifest = read_json(path)
    found = manifest.get("format")
    if found != FORMAT:
        raise UserError(f"{path} has the format {found!r}, this version reads {FORMAT}: {AGAIN}")
    if not seal_holds(manifest):
        raise Damage(f"{path} was changed after it was written: {AGAIN}")
    for name in (*NEEDED, *manifest["files"]):
        entry = manifest["files"].get(name)
        if Path(name).name != name or not isinstance(entry, dict):
            raise Damage(f"{path} does not list the files of a model: {AGAIN}")
    return manifest


def check_files(folder, manifest, names, remedy):
    """Each of these files is the one that was written; remedy: what to do if not."""
    for name in names:
        path = Path(folder) / name
        entry = manifest["files"][name]
        if not path.is_file():
            raise Damage(f"{path} is missing: {remedy}")
        if path.stat().st_size != entry.get("bytes") or file_sha256(path) != entry.get("sha256"):
            raise Damage(f"{path} is not the file that was exported: {remedy}")
