"""Disks that fail: what a full disk, a quota or a lost server does, to this process only."""

import builtins
import contextlib
import io
import os
import resource


@contextlib.contextmanager
def full_disk(size=8192):
    """No file may grow beyond some bytes, whatever writes it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refuse(monkeypatch, part, code):
    """Let Python make no file and no folder whose path ends in `part`: each raises this errno."""

    def check(path):
        if isinstance(path, str | os.PathLike) and os.fspath(path).endswith(part):
            raise OSError(code, os.strerror(code), os.fspath(path))

    real_open, real_mkdir = builtins.open, os.mkdir

    def opened(file, mode="r", *more, **settings):
        if set(mode) & {*"wax+"}:
            check(file)
        return real_open(file, mode, *more, **settings)

    def mkdir(path, *more, **settings):
        check(path)
        real_mkdir(path, *more, **settings)

    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(io, "open", opened)
    monkeypatch.setattr(os, "mkdir", mkdir)
