"""What edge_benchmark --profiles has proved about a checkpoint on one machine: profiles.json beside
its folder, that is, in the run's folder or in exports/.

    keep(saved.path, args, {"max": {"settings": {"block_size": 64, "threshold": 0.9}, ...}})
    settings_of(saved.path, args, "max")     # those settings, or None: not measured under this

Used by edge_benchmark.py and sampling/settings.py. A speed holds for one checkpoint, one machine
and one kind of products: what was measured under other conditions does not count. No torch.
"""
import os
import platform
from pathlib import Path

import config
from common.files import file_sha256, read_json, write_json
from common.flags import checked
from hf.published import MANIFEST, is_published

FILE = "profiles.json"


def conditions(folder, args):
    """What a speed depends on."""
    manifest = Path(folder, "MANIFEST.json")
    if is_published(folder):
        manifest = Path(folder, MANIFEST)
    return {
        "checkpoint": file_sha256(manifest),
        "machine": platform.node(),
        "cpus": os.cpu_count(),
        "device": args.device,
        "precision": args.precision,
        "threads": args.threads,
    }


def read(folder):
    """-> (the file, {name of a folder beside it: {"conditions", "profiles"}})."""
    path = Path(folder).parent / FILE
    if not path.exists():
        return path, {}
    return path, read_json(path)


def profiles_of(folder, args):
    """{profile: its entry}, as far as they were measured under these conditions."""
    _, known = read(folder)
    mine = known.get(Path(folder).name)
    if mine is None or mine.get("conditions") != conditions(folder, args):
        return {}
    return mine.get("profiles", {})


def keep(folder, args, entries):
    """Write the entries of some profiles; those of others stay, if they hold here."""
    path, known = read(folder)
    profiles = profiles_of(folder, args) | entries
    known[Path(folder).name] = {"conditions": conditions(folder, args), "profiles": profiles}
    write_json(path, known)
    return path


def settings_of(folder, args, profile):
    """The settings of sample that were proved for a profile: none if left to right stays. None: it
    was not measured.
    """
    entry = profiles_of(folder, args).get(profile)
    if entry is None:
        return None
    return checked(config.SampleArgs, entry["settings"], f"{read(folder)[0]}, {profile}")
