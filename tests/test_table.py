"""The table of closed-loop results: figures by hand, like with like, and the page that shows it."""

import copy
import json

import micro
import pytest
from recordings import refused

from wmjax.evals import __main__ as door
from wmjax.evals import table

POLICIES = ("planned", "recorded", "random", "still")
PAGE = micro.ROOT / "wmjax/envs/README.md"
RESULTS = micro.ROOT / "wmjax/evals/results"


def trial(goal, seed, planned):
    """Six starts, which are farther and farther; the last is not judged by the stricter rule."""
    rule = {name: [0] * 6 for name in POLICIES} | {"recorded": [1] * 6, "planned": planned}
    return {
        **{"goal": goal, "seed": seed, "solved": 2, "familiar": 0, "clips": [*range(6)]},
        **{"apart": [*range(goal, goal + 6)], "turned": [0.6, 0.1, 0.2, 0.3, 0.4, 0.5]},
        **{"strict_at_start": [0] * 5 + [1], "official": rule, "strict": rule},
    }


def row(seed, *trials, **settings):
    return {
        "step": 100,
        "run": {
            "seed": seed,
            "settings": {"model": {"name": "lewm", **settings}, "data": {"batch_size": 4}},
            "recordings": ["ROOM"],
            "fingerprint": {"frames": 600},
            "parameters": 18_040_000,
            "trained": {"seconds": {"step": 540.0, "data": 60.0, "lost": 9e9}, "devices": "1 x H"},
            "versions": {"wmjax": "0.1", "jax": "0.10"},
        },
        "closed_loop": {
            **{"env": "tworoom", "plan": "lewm", "settings": {"horizon": 5}},
            "trials": [trial(*each) for each in trials],
        },
    }


HALF, ALL, FIRST = [1, 1, 1, 0, 0, 0], [1] * 6, [1, 0, 0, 0, 0, 0]


def lines(section, system, goal):
    return next(r for r in section["rates"] if (r["system"], r["goal"]) == (system, goal))


def test_mean_and_deviation_are_over_training_seeds():
    runs = [row(0, (25, 42, HALF), (25, 43, ALL), (50, 42, HALF)), row(1, (25, 42, FIRST))]
    runs[1]["closed_loop"]["trials"] += [trial(25, 43, FIRST), trial(50, 42, ALL)]
    (section,) = table.table({"ours": runs})
    found = lines(section, "ours", 25)
    # 9 and 2 of 12 starts; 3 + 5 and 1 + 1 of the 10 that the stricter rule judges.
    assert found["official"] == {"mean": 45.83, "std": 41.25}
    assert found["strict"] == {"mean": 50.0, "std": 42.43}
    # Nearest four: 4 and 2 of 4; farthest four: 2 and 0.
    assert found["near"] == {"mean": 75.0, "std": 35.36}
    assert found["far"] == {"mean": 25.0, "std": 35.36}
    # The first and the last start turn most: 3 and 2 of 4.
    assert found["turning"] == {"mean": 62.5, "std": 17.68}
    assert lines(section, "ours", 50)["official"]["mean"] == 75.0
    assert lines(section, "recorded actions", 25)["official"] == {"mean": 100.0, "std": None}
    starts = section["starts"][0]
    assert (starts["starts"], starts["left out, at the goal"]) == (12, 4)
    assert starts["not judged by strict"] == 2
    (system,) = section["systems"]
    assert system["minutes"] == "10.0"
    assert system["training seeds"] == "0, 1"
    text = table.markdown([section])
    assert "| ours | 25 | 45.8 ± 41.2 |" in text
    assert "published, other data" in text
    for grid in text.split("\n\n"):
        assert len({line.count("|") for line in grid.splitlines()}) == 1


def test_only_like_is_compared_with_like():
    one = row(0, (25, 42, HALF))
    with refused("ours", "training seeds", "[0, 0]"):
        table.table({"ours": [one, one]})
    with refused("ours", "model.width", 8, 9):
        table.table({"ours": [row(0, (25, 42, HALF), width=8), row(1, (25, 42, ALL), width=9)]})
    with refused("ours", "goals and seeds", 43):
        table.table({"ours": [one, row(1, (25, 43, HALF))]})
    other = copy.deepcopy(one)
    other["closed_loop"]["trials"][0]["apart"][3] += 1
    with refused("ours", "theirs", "tworoom", 25, 42):
        table.table({"ours": [one], "theirs": [other]})


def test_the_command_keeps_rows_and_reads_them_again(tmp_path, capsys):
    for seed in range(2):
        (tmp_path / str(seed)).mkdir()
        text = "".join(json.dumps(each) + "\n" for each in (row(seed, (25, 42, ALL)), {"step": 9}))
        (tmp_path / str(seed) / "evals.jsonl").write_text(text)
    out, runs = tmp_path / "ours.json", [str(tmp_path / "0"), str(tmp_path / "1")]
    assert door.run([*runs, f"--out={out}"]) == 0
    said = capsys.readouterr().out
    assert "| ours | 25 | 100.0 ± 0.0 |" in said
    assert door.run([str(out)]) == 0
    assert capsys.readouterr().out == said
    assert door.run([str(out), "--json"]) == 0
    (section,) = json.loads(capsys.readouterr().out)
    assert lines(section, "ours", 25)["official"] == {"mean": 100.0, "std": 0.0}
    for words, names in (
        ([str(out), str(out)], ("ours.json", "names")),
        ([str(out), "--out=x.json"], ("--out", "x.json")),
        ([*runs, "--out=x.txt"], ("--out", "x.txt", ".json")),
        ([str(tmp_path)], ("evals.jsonl", "--mode=eval", "eval.env")),
        ([str(tmp_path / "0/evals.jsonl")], ("evals.jsonl", "--out")),
        ([str(tmp_path / "none.json")], ("none.json", "--out")),
    ):
        with refused(*names):
            door.run(words)


@pytest.mark.parametrize("names", [[], ["ours"]])
def test_a_table_without_results_says_so(names):
    systems = {name: [row(0, (25, 42, HALF))] for name in names}
    assert (table.markdown(table.table(systems)) == "No results yet.") is not bool(names)


def test_the_page_shows_the_results_that_are_kept():
    systems = {path.stem: table.read_file(path) for path in sorted(RESULTS.glob("*.json"))}
    _, _, rest = PAGE.read_text().partition("<!-- results -->\n")
    shown, end, _ = rest.partition("\n<!-- end of results -->")
    assert end
    assert shown == table.markdown(table.table(systems))
