"""Configurations: list, get, load with overrides, check, and write as JSON.

A configuration is a Python file with `get_config() -> ConfigDict`. The shipped ones are found by
name, in a checkout and in an installed wheel. Only the commands, `assemble` and `train` handle a
ConfigDict; every other room takes plain arguments.
"""

import ast
import difflib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from wmjax.errors import UserError, reason, suggest
from wmjax.plugins import check_trust
from wmjax.run import files


def _folder() -> Path:
    """Return the folder of the shipped configurations: in the wheel, or beside the package."""
    wheel = Path(__file__).parent / "_configs"
    return wheel if wheel.is_dir() else Path(__file__).parents[1] / "configs"


def list_configs() -> list[str]:
    """Return the names of all shipped configurations, without base, which is not run itself."""
    return sorted(p.stem for p in _folder().glob("*.py") if p.stem != "base")


def describe(name: str) -> str:
    """Return the first line of a shipped configuration's header."""
    header = ast.get_docstring(ast.parse((_folder() / f"{name}.py").read_text())) or ""
    return header.partition("\n")[0]


def get_config(name: str) -> ml_collections.ConfigDict:
    """Return the shipped configuration `name`, for instance "debug_world_model".

    Of a path such as configs/debug_world_model.py only the stem is used, so the README's commands
    work in any folder. Raises UserError for an unknown name.
    """
    stem = Path(name).stem if name.endswith(".py") else name
    path = _folder() / f"{stem}.py"
    if not path.is_file():
        raise UserError(
            f"--config={name}: no such configuration{suggest(stem, list_configs())}\n"
            f"shipped: {', '.join(list_configs())}; or give the path of a .py file"
        )
    return _run(path)


def load(
    name_or_path: str, overrides: Sequence[str] = (), trust: Sequence[str] = ()
) -> ml_collections.ConfigDict:
    """Return a configuration by name or path, with `KEY=VALUE` overrides applied.

    A path is of a .py file, or of a run: its folder, or the config.json in it; trust: packages
    outside wmjax that a run may name. Raises UserError for an unknown name or key, or a value of
    another type.
    """
    path = Path(full_name(name_or_path))
    if path.suffix == ".json":
        config = _read(path, trust)
    else:
        own = path.suffix == ".py" and path.is_absolute() and path.is_file()
        config = _run(path) if own else get_config(name_or_path)
    override(config, overrides)
    return config


def full_name(name_or_path: str) -> str:
    """Return the full path of a user's .py file, which runs, or of a run's config.json.

    A run may be named by its folder. A shipped name is returned as given. A file in the current
    folder wins over a shipped configuration of the same name.
    """
    path = Path(name_or_path)
    if (path / "config.json").is_file():
        path /= "config.json"
    own = path.suffix in (".py", ".json") and path.is_file()
    return str(path.resolve()) if own else name_or_path


def override(config: ml_collections.ConfigDict, overrides: Sequence[str]) -> None:
    """Apply `KEY=VALUE` overrides to a configuration in place.

    model.name and data.source are applied first, because they decide which keys the groups `model`
    and `data` have.
    """
    pairs = []
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise UserError(f"--config.{key}: no value found; wanted --config.{key}=VALUE")
        pairs.append((key, text))
    naming = ("model.name", "data.source")
    before = config.model.name
    for key, text in pairs:
        if key in naming:
            _override(config, key, text)
    _adopt_model(config, renamed=config.model.name != before)
    _adopt_source(config)
    for key, text in pairs:
        if key not in naming:
            _override(config, key, text)


def _adopt_model(config: ml_collections.ConfigDict, renamed: bool) -> None:
    """Give the model group the keys of its family, each from the file or else its default.

    renamed: an override chose another family than the file, so the file's own keys are dropped.
    A file may keep the group of base.py and change the name: keys that only the default family has
    are then dropped, and so are its empty values.
    """
    default, group = get_config("base").model.to_dict(), config.model.to_dict()
    if group["name"] == default["name"] and not renamed:
        return
    from wmjax.models import base  # loads jax

    shared = base.SHARED
    if group["name"] == default["name"]:
        kept = {key: value for key, value in group.items() if key in shared}
        config.model = get_config("base").model
        config.model.update(kept)
        return
    known = base.default_settings(group["name"])
    inherited = any(key in default and key not in (*shared, *known) for key in group)
    kept = {}
    for key, value in group.items():
        if key in shared:
            kept[key] = value
        elif renamed or (key in default and key not in known):
            continue
        elif inherited and key in default and value == default[key]:
            if value not in (None, known[key]):
                raise UserError(
                    f"model.{key}={value!r}: is the default of {default['name']}, and "
                    f"{group['name']} has {known[key]!r}\n"
                    'in the file: config.model = {"name": ..., ...}, with own keys only'
                )
        else:
            kept[key] = value
    config.model = ml_collections.ConfigDict(
        {**{k: v for k, v in default.items() if k in shared}, **known, **kept}
    )


def _adopt_source(config: ml_collections.ConfigDict) -> None:
    """Add the options of a source from outside wmjax to the data group, with their defaults."""
    if ":" not in config.data.source:
        return
    from wmjax.data.settings import options_of

    for key, value in options_of(config.data.source).items():
        if key not in config.data:
            config.data[key] = value


def check_data(config: ml_collections.ConfigDict) -> None:
    """Raise UserError for values of the data group that are wrong by themselves; loads no jax."""
    from wmjax.data import settings

    settings.check(config.data.to_dict())


def from_plain(values: Mapping[str, Any], trust: Sequence[str]) -> ml_collections.ConfigDict:
    """Return the configuration of a run from its JSON; keys that are newer get their defaults.

    trust: packages outside wmjax that may be imported. Raises UserError where the model, the source
    or a mask is of another package.
    """
    check_trust("model.name", values["model"].get("name", ""), trust)
    check_trust("data.source", values["data"]["source"], trust)
    of_images = values.get("images", {}).get("mask", {})  # absent in older runs
    for group, masks in (("mask", values["mask"]), ("images.mask", of_images)):
        for name, spec in masks.items():
            check_trust(f"{group}.{name}.strategy", spec.get("strategy", ""), trust)
    config = get_config("base")
    config.update(values)
    config.images.mask = ml_collections.ConfigDict(of_images)
    for group in ("mask", "model"):  # replaced, because their keys depend on the run
        config[group] = ml_collections.ConfigDict(_with_tuples(values[group]))
    return config


def _with_tuples(value: Any) -> Any:
    """Return nested dicts with tuples, as configurations have them, for the lists of JSON."""
    if isinstance(value, Mapping):
        return {key: _with_tuples(inner) for key, inner in value.items()}
    return tuple(value) if isinstance(value, list) else value


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Return the configuration as plain JSON types: dicts, lists, numbers, strings, None."""
    return files.from_json(to_json(config))


def to_json(config: ml_collections.ConfigDict) -> str:
    """Return the configuration as JSON text with sorted keys."""
    return files.to_json(config.to_dict(), indent=2, sort_keys=True) + "\n"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List `key: old -> new` for every leaf in which two configurations (as from JSON) differ.

    A key that was added to base.py since, and has its default, is no difference.
    """
    before, after = dict(_leaves(old)), dict(_leaves(new))
    for key, value in _leaves(plain(get_config("base"))):
        if not key.startswith(("model.", "mask.")) and key in after:
            before.setdefault(key, value)
    return [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not (after.get(key) is None and before.get(key) == _WAS_EMPTY.get(key, 0))
    ]


# The value that meant "empty" in configurations of older commits; 0 for all other keys.
_WAS_EMPTY = {
    "optim.final_weight_decay": -1,
    "optim.final_ema": -1,
    "data.workers": -1,
    "mesh.data": -1,
}


def _read(path: Path, trust: Sequence[str]) -> ml_collections.ConfigDict:
    """Return the configuration in the config.json of a run."""
    try:
        return from_plain(files.from_json(path.read_bytes()), trust)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--config={path}: {type(error).__name__}: {reason(error)}: wanted config.json of a run"
        ) from error


def keys_named(name: str) -> list[str]:
    """Return the keys of base.py whose name, or a word of it, is nearest to `name`."""
    keys: dict[str, list[str]] = {}
    for key, _ in _leaves(get_config("base").to_dict()):
        whole = key.rpartition(".")[2]
        for word in {whole, *whole.split("_")}:
            keys.setdefault(word, []).append(key)
    near = [name] if name in keys else difflib.get_close_matches(name, keys, n=1, cutoff=0.75)
    return keys[near[0]] if near else []


def _run(path: Path) -> ml_collections.ConfigDict:
    spec = importlib.util.spec_from_file_location(f"_wmjax_config_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--config={path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f"--config={path}: get_config() returned {type(config).__name__}, wanted ConfigDict"
        )
    return config


def _override(config: ml_collections.ConfigDict, key: str, text: str) -> None:
    *parents, leaf = key.split(".")
    node = config
    for depth, name in enumerate([*parents, leaf]):
        if not isinstance(node, ml_collections.ConfigDict) or name not in node:
            here = ".".join(parents[:depth])
            keys = list(_leaves(config.to_dict()))
            wrong = f"--config.{key}: no such key{suggest(key, [k for k, _ in keys])}"
            names = node.keys() if isinstance(node, ml_collections.ConfigDict) else ()
            raise UserError(f"{wrong}\n{here or 'config'} has: {', '.join(sorted(names))}")
        if depth < len(parents):
            node = node[name]
    current = node[leaf]
    if isinstance(current, ml_collections.ConfigDict):
        raise UserError(
            f"--config.{key}: a group, wanted a key; it has: {', '.join(sorted(current))}"
        )
    node[leaf] = _parse(key, text, current, node.get_type(leaf))


def _parse(key: str, text: str, current: Any, wanted: type) -> Any:
    """Convert `text` to the type of the key; empty text gives None where the key may be empty."""
    if wanted is str:
        return text
    if not text and _may_be_empty(key):
        return None
    if wanted is type(None):  # the default is None, so the type is unknown
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text
    try:
        if wanted is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if wanted is tuple:
            return _parse_tuple(text, current)
        if wanted is int and (number := float(text)).is_integer() and abs(number) < 2**53:
            return int(text) if text.lstrip("+-").isdigit() else int(number)  # as in 1e3
        return wanted(text)
    except (KeyError, ValueError, TypeError, SyntaxError):
        raise UserError(
            f"--config.{key}={text}: not {_article(wanted.__name__)}; the default is {current!r}"
        ) from None


def _may_be_empty(key: str) -> bool:
    """Return whether base.py has no value, None, at this key."""
    leaves = dict(_leaves(get_config("base").to_dict()))
    return key in leaves and leaves[key] is None


def _parse_tuple(text: str, current: tuple) -> tuple:
    value = ast.literal_eval(text)
    if not isinstance(value, tuple | list) or len(value) != len(current):
        raise ValueError
    return tuple(type(old)(new) for old, new in zip(current, value, strict=True))


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value
