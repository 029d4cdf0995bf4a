"""The reader by lerobot: with a fake lerobot, and with lerobot itself where it is installed."""

import pickle
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from recordings import VIDEO, edit_info, missing_names, open_pusht, refused
from shared_data import PUSHT

from wmjax.data.lerobot.native import LeRobotSource
from wmjax.data.lerobot.via_lerobot import LeRobotReader
from wmjax.data.media.transforms import FULL_BOX, crop_and_scale
from wmjax.errors import ClipError, UserError

SETTINGS = {"frames": 4, "fps": 4}
CASES = Path(__file__).parent / "data/recordings"


def array(values):
    return np.array(values)


class Metadata:
    def __init__(self, repo_id, root=None, revision=None):
        source = open_pusht(root)
        self.fps, self.features, self.total_episodes = 10, source._features, 5
        self.episodes = [
            {"dataset_from_index": e.first_row, "dataset_to_index": e.first_row + e.length}
            for e in source.episodes
        ]


def empty_metadata(self, repo_id, root=None, revision=None):
    self.fps, self.features = 10, open_pusht(root)._features
    self.total_episodes, self.episodes = 0, []


class Table:
    """Fake of datasets.Dataset: only what the reader uses."""

    def __init__(self, columns):
        self._columns = columns

    def select_columns(self, names):
        return Table({name: self._columns[name] for name in names})

    def with_format(self, kind):
        assert kind == "numpy"
        return self

    def __getitem__(self, rows):
        return {name: values[rows] for name, values in self._columns.items()}


class Dataset:
    """Fake of LeRobotDataset 0.6: rows clamped to the episode, CHW frames, `_is_pad`."""

    def __init__(
        self,
        repo_id,
        root=None,
        revision=None,
        delta_timestamps=None,
        video_backend=None,
        return_uint8=False,
    ):
        self._meta = Metadata(repo_id, root)
        self._source = open_pusht(root, frames=1, stride=1)
        self._deltas = {k: [round(d * 10) for d in v] for k, v in delta_timestamps.items()}
        self._uint8 = return_uint8
        columns = {
            "observation.state": self._source._tables["observation.state"],
            "action": self._source._tables["action"],
        }
        self.hf_dataset = Table(columns)

    def __getitem__(self, index):
        bounds = next(e for e in self._meta.episodes if index < e["dataset_to_index"])
        first, end = bounds["dataset_from_index"], bounds["dataset_to_index"]
        item = {}
        for key, deltas in self._deltas.items():
            rows = [index + delta for delta in deltas]
            item[f"{key}_is_pad"] = array([not first <= row < end for row in rows])
            rows = [min(max(row, first), end - 1) for row in rows]
            if key == "observation.image":
                frames = [self._source[row]["frames_VT"][0][0] for row in rows]
                pixels = array([f.to_ndarray(format="rgb24") for f in frames]).transpose(0, 3, 1, 2)
                pixels = pixels if self._uint8 else np.float32(pixels) / 255
                item[key] = pixels[0] if len(rows) == 1 else pixels
            else:
                item[key] = self.hf_dataset[:][key][rows]
        return item


class Dataset04(Dataset):
    """Before 0.6: float frames from 0 to 1 only."""

    def __init__(self, repo_id, root=None, delta_timestamps=None, video_backend=None):
        super().__init__(repo_id, root, None, delta_timestamps, video_backend)


@pytest.fixture(params=[Dataset, Dataset04])
def lerobot(request, monkeypatch):
    module = types.ModuleType("lerobot.datasets.lerobot_dataset")
    module.LeRobotDataset, module.LeRobotDatasetMetadata = request.param, Metadata
    package = types.ModuleType("lerobot.datasets")
    package.lerobot_dataset = module
    for name, value in [
        ("lerobot", types.ModuleType("lerobot")),
        ("lerobot.datasets", package),
        ("lerobot.datasets.lerobot_dataset", module),
    ]:
        monkeypatch.setitem(sys.modules, name, value)
    return module


def check_same(reader, native, indices):
    for name in ("views", "stride", "state_size", "action_size", "cameras", "draws"):
        assert getattr(reader, name) == getattr(native, name)
    assert len(reader) == len(native)
    assert reader.statistics()[0]["action"] == native.statistics()[0]["action"]
    for i in indices:
        a, b = reader[i], native[i]
        assert a.keys() == b.keys()
        assert (a["episode"], a["start"]) == (b["episode"], b["start"])
        for key in ("state_TS", "state_mask_TS", "action_TPA", "action_mask_TPA"):
            np.testing.assert_array_equal(a[key], b[key])
            assert a[key].dtype == b[key].dtype
        for x, y in zip(a["frames_VT"], b["frames_VT"], strict=True):
            size = x[0].shape[:2]
            np.testing.assert_array_equal(
                crop_and_scale(x, FULL_BOX, *size), crop_and_scale(y, FULL_BOX, *size)
            )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ends": "repeat"},
        {"cameras": "each", "clips_per_episode": 3, "stride": 5},
        {"frames": 1},
        {"split": "validation", "val_share": 0.4},
    ],
)
def test_clips_are_those_of_the_native_reader(lerobot, changes):
    settings = {**SETTINGS, **changes}
    native = open_pusht(**settings)
    last = len(native) - 1
    check_same(LeRobotReader(PUSHT, **settings), native, [0, last // 2, last])


def test_describe_and_pickle(lerobot):
    reader = LeRobotReader(PUSHT, **SETTINGS)
    again = pickle.loads(pickle.dumps(reader))
    assert again.describe() == reader.describe()
    native = open_pusht().describe().split(", ")
    assert reader.describe().split(", ")[1:] == native[1:]
    assert not missing_names(reader.describe(), str(PUSHT), "lerobot")
    check_same(again, open_pusht(), [5])


def test_what_lerobot_raises_is_one_line(lerobot, monkeypatch):
    reader = LeRobotReader(PUSHT, **SETTINGS)

    def fails(self, index):
        raise RuntimeError("\nframe 3 outside of tolerance\nmore")

    monkeypatch.setattr(lerobot.LeRobotDataset, "__getitem__", fails)
    names = (str(PUSHT), "episode 0", "frame 2", "RuntimeError", "frame 3 outside of tolerance")
    with refused(*names, kind=ClipError, lines=1):
        reader[2]

    def refuses(*args, **kwargs):
        raise NotImplementedError("too old")

    monkeypatch.setattr(lerobot, "LeRobotDatasetMetadata", refuses)
    with refused(str(PUSHT), "NotImplementedError", "too old", lines=1):
        LeRobotReader(PUSHT, **SETTINGS)
    with refused("data.root='nowhere'", "meta", lines=1):
        LeRobotReader("nowhere", **SETTINGS)


def test_labels_and_what_is_wrong_are_those_of_the_native_reader(lerobot, monkeypatch):
    settings = {**SETTINGS, "labels": "auto", "ends": "repeat", "val_share": 0.4}
    readers = [kind(PUSHT, **settings) for kind in (LeRobotReader, LeRobotSource)]
    assert readers[0].label_sizes == readers[1].label_sizes == {"observation.state": 2}
    for index in (0, 100, len(readers[0]) - 1):
        (episode, labels), (same, wanted) = (reader.labels(0, index) for reader in readers)
        assert episode == same == readers[0][index]["episode"]
        np.testing.assert_array_equal(labels["observation.state"], wanted["observation.state"])
        np.testing.assert_array_equal(labels["observation.state"], readers[0][index]["state_TS"])
    for changes in (
        {"state_key": "joints"},
        {"action_key": "observation.image"},
        {"labels": "speed"},
        {"frames": 40},
        {"split": "validation"},
    ):
        said = []
        for kind in (LeRobotReader, LeRobotSource):
            with pytest.raises(UserError) as error:
                kind(PUSHT, **SETTINGS | changes)
            said.append(str(error.value))
        assert said[0] == said[1]


def test_numbers_that_cannot_be_are_one_line(lerobot, monkeypatch):
    opened = lerobot.LeRobotDataset.__init__
    rows = {}

    def changed(self, *args, **kwargs):
        opened(self, *args, **kwargs)
        self.hf_dataset._columns["action"] = rows["action"]

    monkeypatch.setattr(lerobot.LeRobotDataset, "__init__", changed)
    rows["action"] = np.zeros((400, 2), np.float32)
    rows["action"][200, 1] = np.nan
    with refused(str(PUSHT), "episode 2", "action[1]", "nan", "frame 40"):
        LeRobotReader(PUSHT, **SETTINGS)
    rows["action"] = np.array([np.zeros(1 + i % 2) for i in range(400)], object)
    with refused(str(PUSHT), "action", 2):
        LeRobotReader(PUSHT, **SETTINGS)
    monkeypatch.setattr(Metadata, "__init__", empty_metadata)
    with refused(str(PUSHT), 0, "episodes"):
        LeRobotReader(PUSHT, **SETTINGS)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("v3_place_float", None),
        ("v3_gap_between_episodes", None),
        ("rate_29_5_called_30", "data.reader=native"),  # by count, which lerobot cannot
        ("late_first_frame", "data.reader=native"),
    ],
)
def test_the_rule_decides_before_lerobot_reads(lerobot, monkeypatch, name, wanted):
    """lerobot takes the frame nearest on the video's clock: right where the rule has proven it."""
    root, tolerances = CASES / name, []

    class Opened:
        def __init__(self, repo_id, root, revision=None, tolerance_s=1e-4, **options):
            tolerances.append(tolerance_s)
            source = LeRobotSource(root, frames=1, fps=30)
            self.hf_dataset = Table(source._tables | {"action": source._tables["action"]})

        def __getitem__(self, index):
            raise AssertionError("lerobot was asked")

    class Listed:
        def __init__(self, repo_id, root=None, revision=None):
            source = LeRobotSource(root, frames=1, fps=30)
            self.fps, self.features = 30, source._features
            self.total_episodes = len(source.episodes)
            self.episodes = [
                {"dataset_from_index": e.first_row, "dataset_to_index": e.first_row + e.length}
                for e in source.episodes
            ]

    monkeypatch.setattr(lerobot, "LeRobotDataset", Opened)
    monkeypatch.setattr(lerobot, "LeRobotDatasetMetadata", Listed)
    reader = LeRobotReader(root, frames=1, fps=30)
    assert tolerances == [0.5 / 30]
    with refused("episode 0", wanted or "lerobot was asked", kind=ClipError):
        reader[0]


@pytest.fixture
def elsewhere(lerobot, monkeypatch):
    """lerobot reads the recording in tests/data, whatever folder it is given."""
    for fake in (Metadata, lerobot.LeRobotDataset):

        def opened(self, repo_id, root=None, _open=fake.__init__, **options):
            _open(self, repo_id, PUSHT, **options)

        monkeypatch.setattr(fake, "__init__", opened)
    return lerobot.LeRobotDataset


def test_the_rule_is_not_asked_about_a_version_it_does_not_know(elsewhere, monkeypatch, tmp_path):
    root = shutil.copytree(PUSHT, tmp_path / "set")
    edit_info(root, codebase_version="v3.1")
    tolerances, opened = [], elsewhere.__init__

    def newer(self, repo_id, root=None, tolerance_s=1e-4, **options):
        tolerances.append(tolerance_s)
        opened(self, repo_id, root, **options)

    monkeypatch.setattr(elsewhere, "__init__", newer)
    (root / VIDEO).write_bytes(b"")
    assert LeRobotReader(root, **SETTINGS)[0]["episode"] == 0
    edit_info(root, codebase_version="v3.0")
    with refused(VIDEO, kind=ClipError):
        LeRobotReader(root, **SETTINGS)[0]
    assert tolerances == [0.001, 0.05]


def test_episodes_and_links_hold_for_lerobots_reader_too(elsewhere, tmp_path):
    assert [e.index for e in LeRobotReader(PUSHT, episodes="1,3:", **SETTINGS).episodes] == [
        1,
        3,
        4,
    ]
    last, whole = (
        LeRobotReader(PUSHT, episodes="-1", **SETTINGS)[0],
        LeRobotReader(PUSHT, **SETTINGS),
    )
    assert (last["episode"], last["start"]) == (4, 0)
    np.testing.assert_array_equal(last["frames_VT"], whole[4 * 71]["frames_VT"])
    root = shutil.copytree(PUSHT, tmp_path / "set")
    (root / "videos").rename(tmp_path / "elsewhere")
    (root / "videos").symlink_to(tmp_path / "elsewhere")
    with refused("data.follow_links=True", str(tmp_path / "elsewhere")):
        LeRobotReader(root, **SETTINGS)
    assert LeRobotReader(root, follow_links=True, **SETTINGS)[0]["episode"] == 0


def test_without_lerobot_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lerobot", None)
    with refused("data.reader=lerobot", "ModuleNotFoundError", ".[lerobot]"):
        LeRobotReader(PUSHT, **SETTINGS)


def test_lerobot_itself_where_it_is_installed():
    pytest.importorskip("lerobot.datasets.lerobot_dataset")
    check_same(LeRobotReader(PUSHT, **SETTINGS), open_pusht(), [0, 100, 354])
    settings = {**SETTINGS, "ends": "repeat"}
    check_same(LeRobotReader(PUSHT, **settings), open_pusht(**settings), [79, 399])
