"""Configurations: list, get, load with overrides, check, and write as JSON.

A configuration is a Python file with `get_config() -> ConfigDict`; the shipped ones are found by
name, from a checkout and from an installed wheel alike. `main`, `train` and the `__main__` doors
see a ConfigDict; every other room takes plain keyword arguments.
"""

import ast
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from wmjax.errors import UserError, suggest


def _folder() -> Path:
    """Where the shipped configurations are: inside the wheel, or beside the package."""
    wheel = Path(__file__).parent / "_configs"
    return wheel if wheel.is_dir() else Path(__file__).parents[1] / "configs"


def list_configs() -> list[str]:
    """Name every shipped configuration that can be run (base is what they vary)."""
    return sorted(p.stem for p in _folder().glob("*.py") if p.stem != "base")


def describe(name: str) -> str:
    """Return the first line of a shipped configuration's header."""
    header = ast.get_docstring(ast.parse((_folder() / f"{name}.py").read_text())) or ""
    return header.partition("\n")[0]


def get_config(name: str) -> ml_collections.ConfigDict:
    """Return the shipped configuration `name`, for instance "debug_world_model".

    A path such as configs/debug_world_model.py is looked up by its stem, so that the README's
    commands work from any folder.
    """
    stem = Path(name).stem if name.endswith(".py") else name
    path = _folder() / f"{stem}.py"
    if not path.is_file():
        raise UserError(
            f"--config={name}: no such configuration{suggest(stem, list_configs())}\n"
            f"shipped: {', '.join(list_configs())}; or give the path of a .py file"
        )
    return _run(path)


def load(name_or_path: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """Return a configuration by name or path with `KEY=VALUE` overrides applied."""
    path = Path(name_or_path)
    own = path.suffix == ".py" and path.is_file()
    config = _run(path) if own else get_config(name_or_path)
    override(config, overrides)
    return config


def override(config: ml_collections.ConfigDict, overrides: Sequence[str]) -> None:
    """Apply `KEY=VALUE` overrides."""
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise UserError(f"--config.{key}: no value; write --config.{key}=VALUE")
        _override(config, key, text)


def outline(config: ml_collections.ConfigDict) -> str:
    """Say in three lines what a configuration asks for."""
    model, data, optim = config.model, config.data, config.optim
    sizes = {"wide": model.width, "deep": model.depth}
    encoder = ", ".join([model.size, *(f"{size} {what}" for what, size in sizes.items() if size)])
    origin = data.mixture or data.root or data.repo_id or "no dataset yet"
    if data.source == "synthetic":
        origin = "generated video"
    rate = f"stride {data.stride}" if data.stride else f"{data.fps:g} fps"
    return "\n".join(
        [
            f"  model     {model.name}, encoder {encoder}; predictor {model.predictor_width} wide, "
            f"{model.predictor_depth} deep; patches of {model.tubelet} x {model.patch} x "
            f"{model.patch}",
            f"  data      {origin}: {data.frames} frames of {data.image_size} x {width(config)} "
            f"at {rate}; masks {', '.join(config.mask)}",
            f"  training  {config.train.num_steps:,} steps of {data.batch_size} clips; "
            f"learning rate {optim.learning_rate:g}, {optim.schedule}; seed {config.seed}",
        ]
    )


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Return the configuration as it reads back from JSON: dicts, lists, numbers, strings."""
    return json.loads(to_json(config))


def to_json(config: ml_collections.ConfigDict) -> str:
    """Render the resolved configuration, keys sorted, as JSON."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List `key: old -> new` for every leaf in which two configurations (as from JSON) differ."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def check(config: ml_collections.ConfigDict) -> None:
    """Raise UserError for values that contradict one another, before anything is loaded."""
    model, data, optim = config.model, config.data, config.optim
    for key, size in (("image_size", data.image_size), ("image_width", width(config))):
        if size <= 0 or size % model.patch:
            raise UserError(
                f"data.{key}={size}: not divisible by the patch, model.patch={model.patch}; "
                f"nearest: {max(1, round(size / model.patch)) * model.patch}"
            )
    if data.frames <= 0 or data.frames % model.tubelet:
        raise UserError(
            f"data.frames={data.frames}: not divisible by the tubelet, "
            f"model.tubelet={model.tubelet}; wanted a multiple of it"
        )
    if config.init_from and model.pretrained:
        raise UserError(
            f"init_from={config.init_from!r} with model.pretrained={model.pretrained!r}: "
            "wanted one of them"
        )
    _check_origin(config)
    _check_mixture(config)
    _choice(config, "data.source", ("lerobot", "synthetic"))
    if data.source == "synthetic" and config.eval.labels not in ("auto", "state"):
        raise UserError(f"eval.labels={config.eval.labels!r}: generated video has: state")
    _choice(config, "data.reader", ("native", "lerobot"))
    _choice(config, "data.ends", ("drop", "repeat"))
    _choice(config, "data.on_error", ("raise", "skip"))
    _choice(config, "model.dtype", ("float32", "bfloat16"))
    _choice(config, "model.rope", ("tiled", "interleaved", "sincos"))
    _choice(config, "model.attention", ("auto", "xla", "cudnn", "triton", "splash"))
    _choice(config, "model.gelu", ("auto", "exact", "polynomial"))
    _choice(config, "model.norm", ("auto", "xla", "fused"))
    _choice(config, "optim.schedule", ("constant", "cosine", "linear"))
    positive = {
        "data.batch_size": data.batch_size,
        "data.fps": 1 if data.stride else data.fps,  # stride takes its place
        "data.threads": data.threads,
        "optim.schedule_steps": optim.schedule_steps,
        "optim.accumulate": optim.accumulate,
        "train.num_steps": config.train.num_steps,
        "train.log_every": config.train.log_every,
        "train.max_skipped": config.train.max_skipped,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
        "eval.batches": config.eval.batches,
        "mesh.fsdp": config.mesh.fsdp,
    }
    for key, value in positive.items():
        if value <= 0:
            raise UserError(f"{key}={value}: wanted a number above 0")
    if config.eval.probe_clips < 10:
        raise UserError(
            f"eval.probe_clips={config.eval.probe_clips}: wanted 10 or more, to fit a line to"
        )
    for key, value in {
        "data.stride": data.stride,
        "data.clips_per_episode": data.clips_per_episode,
        "train.eval_every": config.train.eval_every,
        "train.stuck_after": config.train.stuck_after,
        "eval.probe_every": config.eval.probe_every,
        "optim.learning_rate": optim.learning_rate,
        "optim.final_learning_rate": optim.final_learning_rate,
        "optim.weight_decay": optim.weight_decay,
        "optim.clip_norm": optim.clip_norm,
    }.items():
        if value < 0:
            raise UserError(f"{key}={value}: wanted 0 or above")
    if data.workers < -1:
        raise UserError(f"data.workers={data.workers}: wanted -1 (as data.threads), 0 or above")
    shares = {
        "optim.ema": optim.ema,
        "optim.final_ema": max(optim.final_ema, 0),  # below 0: as optim.ema
        "optim.warmup": optim.warmup,
        "optim.cooldown": optim.cooldown,
        "data.val_share": data.val_share,
        "data.max_skip_share": data.max_skip_share,
    }
    for key, value in shares.items():
        if not 0 <= value <= 1:
            raise UserError(f"{key}={value}: wanted a share between 0 and 1")
    if optim.cooldown and optim.schedule != "constant":
        raise UserError(
            f"optim.cooldown={optim.cooldown}: goes with optim.schedule=constant, "
            f"found {optim.schedule}, which falls all the way; wanted 0"
        )
    if optim.warmup + optim.cooldown > 1:
        raise UserError(
            f"optim.warmup={optim.warmup}, optim.cooldown={optim.cooldown}: wanted shares of "
            "optim.schedule_steps that add up to 1 at most"
        )


# Keys of the data group in which the datasets of a mixture may differ.
_OF_A_MEMBER = ("cameras", "state", "action", "fps", "stride", "ends", "clips_per_episode")


def mixture(config: ml_collections.ConfigDict) -> dict[str, tuple[str, float]]:
    """Return folder and weight of each dataset in data.mixture, by the folder's name."""
    members: dict[str, tuple[str, float]] = {}
    for item in config.data.mixture.split(","):
        root, _, text = item.strip().rpartition(":")
        try:
            weight = float(text)
        except ValueError:
            weight = 0.0
        if not root or not 0 < weight < float("inf"):
            raise UserError(f"data.mixture: {item!r}: wanted DIR:WEIGHT with a weight above 0")
        name = Path(root).name
        if name in members:
            raise UserError(
                f"data.mixture: two folders are called {name}: {members[name][0]} and {root}; "
                "wanted different names, by which reports tell them apart"
            )
        members[name] = root, weight
    return members


def _check_origin(config: ml_collections.ConfigDict) -> None:
    data = config.data
    if data.source == "lerobot" and not (data.root or data.repo_id or data.mixture):
        raise UserError(
            "data.root is empty: give the dataset's folder with --config.data.root=DIR, or its "
            "name on the Hub with --config.data.repo_id=OWNER/NAME"
        )
    if data.source == "synthetic" and (data.root or data.repo_id):
        raise UserError(
            f"data.source='synthetic' with data.root={data.root!r} and data.repo_id="
            f"{data.repo_id!r}: generated video is read from nowhere; for the recording: "
            "--config.data.source=lerobot"
        )
    if data.repo_id and (data.root or data.mixture):
        raise UserError(
            f"data.repo_id={data.repo_id!r} with data.root={data.root!r} and "
            f"data.mixture={data.mixture!r}: wanted exactly one of them"
        )
    if data.revision and not data.repo_id:
        raise UserError(f"data.revision={data.revision!r}: goes with data.repo_id, which is empty")


def _check_mixture(config: ml_collections.ConfigDict) -> None:
    data = config.data
    if data.mixture and (data.root or data.source != "lerobot"):
        raise UserError(
            f"data.mixture={data.mixture!r} with data.root={data.root!r} and "
            f"data.source={data.source!r}: wanted a mixture alone, of lerobot"
        )
    names = list(mixture(config)) if data.mixture else []
    for name, settings in data.members.items():
        if name not in names:
            raise UserError(
                f"data.members.{name}: not in data.mixture{suggest(name, names)}; "
                f"there are: {', '.join(names) or 'none'}"
            )
        for key in settings:
            if key not in _OF_A_MEMBER:
                raise UserError(
                    f"data.members.{name}.{key}: not a setting of one dataset"
                    f"{suggest(key, _OF_A_MEMBER)}; there are: {', '.join(_OF_A_MEMBER)}"
                )


def model_arguments(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Return name and keyword arguments of the model; what it is pretrained on is none of them."""
    return {key: value for key, value in config.model.to_dict().items() if key != "pretrained"}


def width(config: ml_collections.ConfigDict) -> int:
    """Width of the training clips in pixels: data.image_width, where 0 means square."""
    return config.data.image_width or config.data.image_size


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
            f"--config={path}: get_config() gave {type(config).__name__}, wanted ConfigDict"
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
        raise UserError(f"--config.{key}: is a group; its keys: {', '.join(sorted(current))}")
    node[leaf] = _parse(key, text, current)


def _parse(key: str, text: str, current: Any) -> Any:
    """Read `text` as the type that the key has now."""
    wanted = type(current)
    if wanted is str:
        return text
    try:
        if wanted is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if wanted is tuple:
            return _parse_tuple(text, current)
        return wanted(text)
    except (KeyError, ValueError, TypeError, SyntaxError):
        raise UserError(
            f"--config.{key}={text}: not {_article(wanted.__name__)}; the default is {current!r}"
        ) from None


def _parse_tuple(text: str, current: tuple) -> tuple:
    value = ast.literal_eval(text)
    if not isinstance(value, tuple | list) or len(value) != len(current):
        raise ValueError
    return tuple(type(old)(new) for old, new in zip(current, value, strict=True))


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _choice(config: ml_collections.ConfigDict, key: str, choices: Sequence[str]) -> None:
    group, leaf = key.split(".")
    value = config[group][leaf]
    if value not in choices:
        raise UserError(
            f"{key}={value!r}: unknown{suggest(str(value), choices)}; choices: {', '.join(choices)}"
        )


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value
