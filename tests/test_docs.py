"""Every command of the pages: its flags and configuration keys are right; those for a CPU run."""

import re
import shlex

import micro
import ml_collections
import pytest
from shared_data import PUSHT

import wmjax
from wmjax import assemble, demo, main, plan, train
from wmjax import config as configs
from wmjax.bench import __main__ as bench
from wmjax.data import __main__ as data
from wmjax.masking import Masks
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


FILLED = {"--processes=N": "--processes=2", "--process=I": "--process=0"}
COMMANDS = sorted({(*words,) for page in PAGES for words in commands(page) if len(words) > 1})


def check_config(config):
    if not config.data.root and config.data.source == "lerobot":
        config.data.root = str(PUSHT)  # which the text around the command asks for
    configs.check(config)
    Masks(config.mask.to_dict(), assemble.token_grid(config))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_says_what_the_door_takes(words, monkeypatch, tmp_path):
    module, *argv = words
    argv = [re.sub(r"\bmy_robot\.py$", "vjepa2_aloha", word) for word in argv]
    argv = [FILLED.get(word, word) for word in argv if word != "..."]
    if module == "wmjax.main":
        taken = []
        rooms = ((train, "train"), (train, "evaluate"), (demo, "demo"), (plan, "plan"))
        for room, name in rooms:
            monkeypatch.setattr(room, name, lambda config, _: taken.append(config) or 0)
        monkeypatch.chdir(tmp_path)
        if not any(word.startswith("--config=") for word in argv):  # of the command it belongs to
            argv.append("--config=vjepa2_aloha")
        assert main.run(argv) == 0
        for config in taken:
            check_config(config)
        assert taken or "--list" in argv
        return
    parse = {"bench": bench, "data": data, "viz": viz, "weights": weights}[
        module.split(".")[1]
    ].parse
    if argv[0] in ("check", "transcode", "stats") and len(argv) == 1:
        return  # a command named in the text, without what it is run on
    parsed = parse(argv)
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
    for key in found:
        holder = base
        for part in key.split("."):
            assert part in holder, key
            holder = holder[part]


def test_commands_are_found():
    assert len(COMMANDS) > 15
    assert {words[0] for words in COMMANDS} == {
        *("wmjax.main", "wmjax.bench", "wmjax.data", "wmjax.viz", "wmjax.weights")
    }


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


@pytest.mark.campaign
@pytest.mark.parametrize(
    "words", [w for w in COMMANDS if "--config.train.num_steps=2" in w], ids=" ".join
)
def test_a_command_runs(words, tmp_path):
    child = micro.run(tmp_path / "run", *(w.removeprefix("--config.") for w in words[2:]))
    assert child.returncode == 0, child.stderr
