"""Datasets of the Hub, in a cache that the tests write: no test needs a network."""

import fnmatch
import os
import shutil
import subprocess
import sys
import types

import micro
import pytest
from recordings import VIDEO, digest, missing_names, open_pusht, refused
from shared_data import PUSHT

from wmjax import assemble
from wmjax import config as configs
from wmjax.data.lerobot import hub
from wmjax.open_sources import make_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = sorted(str(p.relative_to(PUSHT)) for p in PUSHT.rglob("*") if p.is_file())


def lay_out(cache, files=FILES):
    """Write files of the recording as the Hub's cache does: links into blobs."""
    repo = cache / "datasets--someone--pusht"
    snapshot = repo / "snapshots" / COMMIT
    for folder in ("blobs", "refs"):
        (repo / folder).mkdir(parents=True, exist_ok=True)
    (repo / "refs/main").write_text(COMMIT)
    for file in files:
        blob = repo / "blobs" / file.replace("/", "-")
        shutil.copy(PUSHT / file, blob)
        link = snapshot / file
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Fake huggingface_hub: `calls` records the requests, `error` is raised."""
    errors = types.ModuleType("huggingface_hub.errors")
    for name in ("RepositoryNotFoundError", "RevisionNotFoundError", "LocalEntryNotFoundError"):
        setattr(errors, name, type(name, (Exception,), {}))
    errors.GatedRepoError = type("GatedRepoError", (errors.RepositoryNotFoundError,), {})
    module = types.ModuleType("huggingface_hub")
    module.errors, module.calls, module.error = errors, [], None

    def snapshot_download(repo_id, *, repo_type, revision, allow_patterns):
        module.calls.append((repo_id, repo_type, revision))
        if module.error:
            raise module.error
        wanted = [f for f in FILES if any(fnmatch.fnmatch(f, p) for p in allow_patterns)]
        return str(lay_out(tmp_path, wanted))

    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    hub.download.cache_clear()
    yield module
    hub.download.cache_clear()


def test_what_is_needed_is_fetched_of_one_commit(fake):
    root = hub.download("someone/pusht", "", "image")
    assert sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()) == FILES
    assert digest(open_pusht(root)[3]) == digest(open_pusht()[3])
    assert open_pusht(root).notes == []
    # Every split reads the commit of the first call.
    assert hub.download("someone/pusht", "", "image") == root
    assert fake.calls == [
        ("someone/pusht", "dataset", None),
        ("someone/pusht", "dataset", COMMIT),
    ]


def test_patterns_leave_out_other_cameras(fake):
    patterns = []
    real = fake.snapshot_download

    def spy(*args, **kwargs):
        patterns.append(kwargs["allow_patterns"])
        return real(*args, **kwargs)

    fake.snapshot_download = spy
    hub.download("someone/pusht", "v3.0", "all")
    assert fake.calls[0][2] == "v3.0"

    def matched(path):
        return any(fnmatch.fnmatch(path, pattern) for pattern in patterns[1])

    assert matched("data/chunk-001/file-012.parquet")
    for folder, wanted in [("observation.image", True), ("image", True), ("side", False)]:
        assert matched(f"videos/{folder}/chunk-000/file-000.mp4") == wanted


def test_a_wrong_camera_is_told_before_any_video_is_fetched(fake):
    names = ("data.cameras='wrist'", "observation.image", "data.repo_id='someone/pusht'")
    with refused(*names, lines=2):
        hub.download("someone/pusht", "", "wrist")
    assert len(fake.calls) == 1


PAGE, LOGIN, FOLDER = "https://huggingface.co/datasets/a/b", "hf auth login", "--config.data.root"


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("GatedRepoError", {PAGE, LOGIN}),
        ("RepositoryNotFoundError", {LOGIN}),
        ("RevisionNotFoundError", {"branch", "commit"}),
        ("LocalEntryNotFoundError", {FOLDER}),
        ("HfHubHTTPError", {"HfHubHTTPError", "500"}),
    ],
)
def test_what_the_hub_refuses_is_one_line(fake, name, names):
    kind = getattr(fake.errors, name, type(name, (Exception,), {}))
    fake.error = kind("500 Server Error\nRequest ID: 1")
    with refused("data.repo_id='a/b'", "data.revision='v9'", lines=1) as caught:
        hub.download("a/b", "v9", "all")
    every = {PAGE, LOGIN, "branch", "commit", FOLDER, "HfHubHTTPError", "500"}
    assert every - set(missing_names(str(caught.value), *every)) == names
    assert len(fake.calls) == 1


OFFLINE = """
from wmjax.data.lerobot.hub import download
from wmjax.data.lerobot.native import LeRobotSource
from wmjax.errors import UserError
try:
    print(LeRobotSource(download("someone/pusht", "", "all"), frames=4, fps=4).describe())
except UserError as error:
    print("error:", error)
"""


def offline(cache):
    """Open a dataset with the real huggingface_hub in offline mode."""
    pytest.importorskip("huggingface_hub")
    run = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        env={**micro.environment(1), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.strip()


def test_offline_with_nothing_in_the_cache_is_one_line(tmp_path):
    text = offline(tmp_path)
    assert text.startswith("error: ")
    assert "\n" not in text
    assert not missing_names(text, "data.repo_id='someone/pusht'", "--config.data.root=DIR")


def test_offline_the_cache_is_read(tmp_path):
    lay_out(tmp_path)
    assert not missing_names(offline(tmp_path), f"snapshots/{COMMIT}", "v3.0", "5 episodes")


def test_offline_a_cache_without_the_videos_is_an_error(tmp_path):
    lay_out(tmp_path, [file for file in FILES if file != VIDEO])
    text = offline(tmp_path)
    assert text.startswith("error: ")
    assert not missing_names(text, f"snapshots/{COMMIT}/{VIDEO}", "data.cameras")


def test_training_opens_what_the_configuration_names(fake):
    settings = ["data.source=lerobot", "data.repo_id=someone/pusht", "data.fps=5"]
    config = micro.config(*settings)
    assemble.check(config)
    source = make_source(config, "train")
    assert not missing_names(source.describe(), f"snapshots/{COMMIT}", "v3.0", "4 episodes")


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ([], ["data.root", "data.repo_id"]),
        (["data.repo_id=a/b", "data.root=x"], ["data.repo_id='a/b'", "data.root='x'"]),
        (["data.repo_id=a/b", "data.mixture=x:1"], ["data.mixture='x:1'"]),
        (["data.root=x", "data.revision=v3.0"], ["data.revision='v3.0'", "data.repo_id"]),
        (["data.root=x", "data.reader=lerobt"], ["data.reader='lerobt'", "lerobot"]),
    ],
)
def test_settings_that_contradict(overrides, names):
    with refused(*names):
        assemble.check(configs.load("debug_world_model", ["data.source=lerobot", *overrides]))
