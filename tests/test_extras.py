"""The extras resolve together from a clean clone; `-m campaign`, because uv asks the registry."""

import re
import shutil
import subprocess

import pytest
from micro import ROOT
from says import says

pytestmark = [
    pytest.mark.campaign,
    pytest.mark.skipif(not shutil.which("uv"), reason="uv is not installed"),
]
# Of each extra: what it must bring, in which versions, and what it must not.
WANTED = {
    "swm": ({"stable-worldmodel": "0", "pymunk": "7", "torchvision": "0"}, {"gym-pusht"}),
    "sim": ({"gym-pusht": "0", "gym-aloha": "0", "pymunk": "6", "mujoco": "3"}, {"torch"}),
}


def uv(*words, cwd):
    return subprocess.run(["uv", *words], cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What uv reads of a clone, locked: an extra that clashes with another one fails here."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    locked = uv("lock", cwd=folder)
    assert locked.returncode == 0, locked.stderr
    return folder


@pytest.mark.parametrize("python", ["3.11", "3.12"])
@pytest.mark.parametrize("extra", WANTED)
def test_an_extra_resolves(clone, extra, python):
    words = ("--quiet", "--no-header", "--python-version", python, "--extra", extra)
    found = uv("pip", "compile", *words, "pyproject.toml", cwd=clone)
    assert found.returncode == 0, found.stderr
    versions = dict(re.findall(r"^([\w-]+)==(\d+)", found.stdout, re.MULTILINE))
    wanted, absent = WANTED[extra]
    assert wanted.items() <= versions.items()
    assert not absent & versions.keys()


@pytest.mark.parametrize("other", ["lerobot", "cuda", "tpu", "torch", "sim", "swm"])
@pytest.mark.parametrize("extra", WANTED)
def test_which_extras_exclude_each_other(clone, extra, other):
    found = uv("export", "--quiet", "--frozen", "--extra", extra, "--extra", other, cwd=clone)
    assert found.returncode == (0 if extra == other else 2)
    if extra != other:
        says(found.stderr, extra, other)
