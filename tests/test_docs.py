"""Every command of the pages: its flags and configuration keys are right; those for a CPU run."""

import re
import shlex
import sys

import micro
import ml_collections
import numpy as np
import pytest
from says import refused
from shared_data import PUSHT

import wmjax
from wmjax import assemble, encode, main, serve, train
from wmjax import config as configs
from wmjax.bench import __main__ as bench
from wmjax.commands import demo, evaluate, plan
from wmjax.data import __main__ as data
from wmjax.evals import __main__ as evals
from wmjax.models import FAMILIES
from wmjax.models.base import default_settings
from wmjax.viz import __main__ as viz
from wmjax.weights import __main__ as weights

PAGES = [
    micro.ROOT / "README.md",
    *(p for room in ("wmjax", "configs", "launch") for p in (micro.ROOT / room).rglob("*.md")),
]


def commands(page):
    """Yield the words after `python -m` of every command in a page's blocks and in its text."""
    text = page.read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(
        r"`(python -m wmjax[^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    )
    for line in lines:
        words = shlex.split(line, comments=True)
        if "wmjax.main" in words or any(word.startswith("wmjax.") for word in words):
            yield words[words.index("-m") + 1 :]


DOORS = {
    "wmjax.main": main,
    "wmjax.bench": bench,
    "wmjax.encode": encode,
    "wmjax.data": data,
    "wmjax.evals": evals,
    "wmjax.serve": serve,
    "wmjax.viz": viz,
    "wmjax.weights": weights,
}
FILLED = {"--processes=N": "--processes=2", "--process=I": "--process=0"}
COMMANDS = sorted({(*words,) for page in PAGES for words in commands(page) if len(words) > 1})


def check_config(config):
    if not config.data.root and config.data.source == "lerobot":
        config.data.root = str(PUSHT)  # which the text around the command asks for
    assemble.check(config)
    assemble.make_masks(config)


@pytest.fixture(autouse=True)
def mypackage(tmp_path_factory, monkeypatch):
    """The model of the page on models, where its command finds it."""
    folder = tmp_path_factory.mktemp("outside")
    page = (micro.ROOT / "wmjax/models/README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 40
    (folder / "mypackage").mkdir()
    (folder / "mypackage" / "mymodel.py").write_text(block)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "mypackage", raising=False)
    monkeypatch.delitem(sys.modules, "mypackage.mymodel", raising=False)


def test_the_model_of_the_page_trains_resumes_and_loads(tmp_path):
    overrides = [o for o in micro.OVERRIDES if not o.startswith("model.")]
    overrides += ["model.name=mypackage.mymodel:MyModel", "model.width=8", "train.eval_every=2"]

    def steps(count):
        config = configs.load("debug_world_model", [*overrides, f"train.num_steps={count}"])
        assert train.train(config, tmp_path) == 0

    steps(2)
    steps(4)
    rows = micro.rows(tmp_path)
    assert [row["step"] for row in rows if "loss/next" in row] == [1, 2, 3, 4]
    held_out = [row["validation/loss"] for row in rows if "validation/loss" in row]
    assert held_out[1] < held_out[0]
    with refused("model.name='mypackage.mymodel:MyModel'", "mypackage"):
        wmjax.load(tmp_path)
    model = wmjax.load(tmp_path, trust=("mypackage",))
    assert model.encode(np.zeros((4, 32, 32, 3), np.uint8)).shape == (4, 8)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_says_what_the_door_takes(words, monkeypatch, tmp_path):
    module, *argv = words
    argv = [re.sub(r"\bmy_robot\.py$", "vjepa2_aloha", word) for word in argv]
    argv = [FILLED.get(word, word) for word in argv if word != "..."]
    if module == "wmjax.main":
        taken = []
        rooms = ((train, "train"), (evaluate, "evaluate"), (demo, "demo"), (plan, "plan"))
        for room, name in rooms:
            monkeypatch.setattr(room, name, lambda config, _: taken.append(config) or 0)
        monkeypatch.setattr(configs, "check_data", lambda _: None)  # check_config does, with data
        monkeypatch.chdir(tmp_path)
        if not any(word.startswith("--config=") for word in argv):  # of the command it belongs to
            argv.append("--config=vjepa2_aloha")
        (name,) = [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]
        origins = tuple(f"--config.data.{key}=" for key in ("root", "repo_id", "mixture", "source"))
        generated = configs.load(name, ()).data.source == "synthetic"
        if not (generated or any(word.startswith(origins) for word in argv)):
            argv.append(f"--config.data.root={PUSHT}")  # as in check_config
        assert main.run(argv) == 0
        for config in taken:
            check_config(config)
        assert taken or "--list" in argv
        return
    if argv[0] in ("check", "transcode", "stats") and len(argv) == 1:
        return  # a command named in the text, without what it is run on
    parsed = DOORS[module].parse(argv)
    for part in parsed if isinstance(parsed, tuple) else ():
        if isinstance(part, ml_collections.ConfigDict):
            check_config(part)


@pytest.mark.parametrize(
    "words",
    [w for w in COMMANDS if w[0] == "wmjax.data" and w[1] != "transcode" and "DIR" in w],
    ids=" ".join,
)
def test_a_command_on_a_dataset_runs(words, capsys):
    assert data.run([str(PUSHT) if word == "DIR" else word for word in words[1:]]) == 0
    assert capsys.readouterr().out


def test_keys_named_in_the_text_are_there():
    base = wmjax.get_config("base")
    groups = "|".join(name for name in base if isinstance(base[name], ml_collections.ConfigDict))
    named = re.compile(rf"(?:--config\.|`)((?:{groups})\.[a-z_.]+)=")
    found = {key for page in PAGES for key in named.findall(page.read_text())}
    assert len(found) > 30
    of_families = set().union(*map(default_settings, FAMILIES))
    for key in found:
        if key.removeprefix("model.") in of_families:
            continue
        holder = base
        for part in key.split("."):
            assert part in holder, key
            holder = holder[part]


def test_commands_are_found():
    assert len(COMMANDS) > 15
    assert {words[0] for words in COMMANDS} == DOORS.keys()


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


MY_ROBOT = f"""
from wmjax.config import get_config as get_base

def get_config():
    config = get_base("vjepa2_aloha")
    config.data.root = {str(PUSHT)!r}
    return config
"""
HUB = "facebook/vjepa2-vitl-fpc64-256"


def runnable():
    """Yield the commands in an order in which each finds what it needs, trainings first."""
    whole = [words for words in COMMANDS if len(words) > 2 or words[1].startswith(("--", "run"))]
    # Have tests of their own.
    others = ("--coordinator", "mypackage", "wmjax.serve", "PUSH", "CUBES")
    alone = [words for words in whole if not any(o in word for word in words for o in others)]

    def place(words):
        doing = any(word.startswith("--mode") for word in words)
        needs_weights = "import" in words or any(HUB in word for word in words)
        first = "record" not in words
        later = words[0] != "wmjax.main" or doing or needs_weights
        return first, later, needs_weights, words[0] == "wmjax.evals", words

    return sorted(alone, key=place)


def known(argv, overrides):
    """Return the overrides whose key the model of the command's configuration has."""
    names = [word.partition("=")[2] for word in argv if word.startswith("--config=")]
    if not names:  # the run's own configuration, which was small
        return []
    (name,) = names
    model = configs.load(name.replace("my_robot.py", "vjepa2_aloha"), ()).model
    prefix = "--config.model."
    return [
        word
        for word in overrides
        if not word.startswith(prefix) or word.removeprefix(prefix).partition("=")[0] in model
    ]


@pytest.mark.processes
@pytest.mark.timeout(900)
def test_the_commands_run(tmp_path, monkeypatch, capsys):
    """One after another in an empty folder; models and clips small, weights of the Hub our own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_robot.py").write_text(MY_ROBOT)
    small = [f"--config.{override}" for override in (*micro.OVERRIDES, *micro.LEWM)]
    small += ["--config.model.patch=8", "--config.log.figures=False"]
    run = "runs/debug_world_model"
    filled = {"RUN": run, "runs/one": run, "runs/two": run, "runs/vjepa2_aloha": run}
    ran = 0
    for words in runnable():
        module, *argv = words
        place = {"DIR": "imported" if "import" in argv else str(PUSHT), HUB: "OUT", **filled}
        argv = [place.get(word, word.replace(HUB, "OUT")) for word in argv]
        argv = [re.sub(r"=DIR$", f"={PUSHT}", word) for word in argv]
        argv = [re.sub(r"=RUN$", f"={run}", word) for word in argv]
        argv = [word.replace("v5e:16x16", "cpu:2").replace("fsdp=16", "fsdp=2") for word in argv]
        if "transcode" in argv:
            argv[2] = "transcoded"
        if "record" in argv:
            argv += ["--episodes=20", "--steps=60", "--workers=1"]
        own = any("lewm_tworoom_cpu" in word for word in argv)  # records its own data
        argv += ["--config.data.record=tworoom:20"] if own and "--mode=eval" not in argv else []
        if own or "--config.data.root=ROOM" in argv:
            argv += ["--config.eval.env_episodes=2", "--config.eval.env_plan=fast,samples=16"]
        if "--config.eval.env_goals=3" in argv:
            argv += ["--config.eval.env_goals=2", "--config.eval.env_seeds=1"]
        if module in ("wmjax.main", "wmjax.bench"):
            argv += [] if "--list" in argv else known(argv, small)
        if module == "wmjax.bench":
            plans = ["--plans=1", "--plan=fast,samples=8,iterations=1,elites=2"]
            few = {"step": ["--steps=2"], "data": ["--batches=2"], "plan": plans}
            few["encode"] = ["--clips=1", "--frames=4", "--size=32", "--calls=1"]
            argv += few[argv[0]]
        if "--mode=plan" not in argv:
            argv = [word for word in argv if "fsdp" not in word]
        assert DOORS[module].run(argv) == 0, (words, capsys.readouterr())
        ran += 1
    assert ran > 20
