"""The points of a save at which something may happen: each operation on the disk, amid each file.

crash.py kills at them, tests/test_checkpoint.py also lets them fail; the product has no hooks.
"""
import os
from contextlib import contextmanager
from pathlib import Path

import checkpoint
from common import files

OPERATIONS = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir", "chmod")


class Halves:
    """A file that is written in two halves, with a point in between."""

    def __init__(self, file, at):
        self.file, self.at = file, at

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        self.file.write(data[:len(data) // 2])
        self.file.flush()
        self.at("half a file", self.file.name)
        self.file.write(data[len(data) // 2:])


@contextmanager
def points(at, folder):
    """Calls at(name of the operation, *its arguments) at every point of work in this folder, in
    this process.

    Elsewhere is no point: libraries make cache folders when they first need them, at another time
    in each process.
    """
    real, save_file = {name: getattr(os, name) for name in OPERATIONS}, checkpoint.save_file

    def hook(name):
        def call(where, *args, **kwargs):
            if (
                isinstance(where, int)
                or "dir_fd" in kwargs
                or Path(folder) in Path(where).absolute().parents
            ):
                at(name, where, *args)
            return real[name](where, *args, **kwargs)
        return call

    def watched_open(path, mode="r", *args, **kwargs):
        if mode != "wb":
            return open(path, mode, *args, **kwargs)
        at("open", path)
        return Halves(open(path, mode), at)

    def watched_save_file(tensors, path, metadata=None):
        at("before a tensor file", path)
        save_file(tensors, path, metadata)
        whole = path.read_bytes()
        path.write_bytes(whole[:len(whole) // 2])
        at("half a tensor file", path)
        path.write_bytes(whole)

    for name in OPERATIONS:
        setattr(os, name, hook(name))
    checkpoint.save_file = watched_save_file
    files.open = watched_open
    try:
        yield
    finally:
        for name in OPERATIONS:
            setattr(os, name, real[name])
        checkpoint.save_file = save_file
        del files.open
