"""The file helpers of runs: what a kill or a full disk leaves behind does no harm."""

import json
import math

import pytest

from wmjax.errors import UserError
from wmjax.run import files


def test_entries_come_back_in_order(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert files.read_json_lines(path) == []
    entries = [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "name": "é\n\u2028"}]
    for entry in entries:
        files.append_json_line(path, entry)
    assert files.read_json_lines(path) == entries
    assert path.read_text().count("\n") == 2


@pytest.mark.parametrize("cut", [*range(1, 14), 14])
def test_a_line_that_was_cut_short_costs_no_other_line(tmp_path, cut):
    path = tmp_path / "rows.jsonl"
    files.append_json_line(path, {"step": 1})
    whole = path.read_bytes()
    files.append_json_line(path, {"step": "\u00e9"})
    second = path.read_bytes()[len(whole) :]
    path.write_bytes(whole + second[:cut])
    kept = files.read_json_lines(path)
    assert kept[:1] == [{"step": 1}]
    files.append_json_line(path, {"step": 3})
    assert files.read_json_lines(path) == [*kept, {"step": 3}]


@pytest.mark.parametrize("line", [b"\xff\xfe", b"\0" * 20, b"[1]", b"3", b"", b'{"step": 1'])
def test_what_is_no_object_is_left_out(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 2}\n')
    assert [entry["step"] for entry in files.read_json_lines(path)] == [0, 2]


@pytest.mark.parametrize("content", ["text\n", b"\0bytes"])
def test_a_file_is_replaced_as_a_whole(tmp_path, content):
    path = tmp_path / "config.json"
    files.write_whole(path, "old")
    files.write_whole(path, content)
    found = path.read_bytes()
    assert found == (content if isinstance(content, bytes) else content.encode())
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_keeps_the_old_file_and_leaves_no_part(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("old")

    def interrupted():
        with files.part_file(path) as part:
            part.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="No such file"):
        files.write_whole(tmp_path / "gone" / "config.json", "new")


def test_numbers_survive_a_rewrite(tmp_path):
    """metrics.jsonl is rewritten when a run goes on: its figures stay equal to the last bit."""
    path = tmp_path / "rows.jsonl"
    row = {"a": 1 / 3, "b": 1e-310, "c": float("inf"), "d": 12345678901234567890}
    files.append_json_line(path, row)
    before = path.read_text()
    rows = files.read_json_lines(path)
    assert rows == [row]
    files.write_whole(path, "".join(files.to_json(r) + "\n" for r in rows))
    assert path.read_text() == before


def refuse(name):
    raise AssertionError(f"bare {name}")


def test_what_json_lacks_has_a_name_and_comes_back(tmp_path):
    row = {"loss": math.nan, "all": [{"top": math.inf}, (1.0, -math.inf)], "name": "nan"}
    path = tmp_path / "rows.jsonl"
    files.append_json_line(path, row)
    written = json.loads(path.read_text(), parse_constant=refuse)
    assert written["all"] == [{"top": "Infinity"}, [1.0, "-Infinity"]]
    (found,) = files.read_json_lines(path)
    assert math.isnan(found.pop("loss"))
    assert found == {"all": [{"top": math.inf}, [1.0, -math.inf]], "name": "nan"}
    path.write_text('{"loss": NaN, "peak": Infinity}\n')  # as earlier commits wrote
    assert files.read_json_lines(path)[0]["peak"] == math.inf


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json.part", "checkpoints/7", "viz"])
def test_a_link_in_a_workdir_is_not_written_through(tmp_path, name):
    other = tmp_path / "other"
    other.write_text("mine")
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(other)
    with pytest.raises(UserError, match=str(other)):
        files.refuse_links(tmp_path / "run")
    assert other.read_text() == "mine"


def test_a_workdir_may_be_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    files.refuse_links(tmp_path / "link")
