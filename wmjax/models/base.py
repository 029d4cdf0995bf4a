"""The contract that every world model fulfils: the train step never asks for a model's name.

A family is a subclass of WorldModel. `model.name` names it, in wmjax or in a package of its own.
The step holds parameters as plain nested dicts, because `jax.jit` dispatches these several times
faster than NNX states. A Blueprint builds the model and divides its variables:

    blueprint = Blueprint.of({"name": "vjepa2", "size": "tiny"}, InputSpec(16, 256, 256))
    trained, frozen, target = blueprint.divide(*blueprint.variables(blueprint.create(nnx.Rngs(0))))
    model, target = blueprint.join(trained, frozen, target)
    output = model.loss(target, batch, key)
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from inspect import getattr_static
from typing import Any, ClassVar, NamedTuple

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from wmjax.errors import UserError, check_range, suggest
from wmjax.models import FAMILIES
from wmjax.nn.compute import CHOICES, Compute
from wmjax.plugins import ANY, resolve
from wmjax.types import TokenGrid, WorldModelInput, WorldModelOutput

# Keys of the model group that all families share.
SHARED = ("name", "pretrained", *CHOICES)

Params = dict[str, Any]  # nested dicts of arrays, or of anything else for each parameter


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """Sizes of the clips that a model is built for, fixed for a run.

    frames, height, width: of a clip. views: cameras of an instant. stride: recorded frames between
    two sampled ones, so also actions. state_size, action_size: numbers of a state, of an action.
    """

    frames: int
    height: int
    width: int
    views: int = 1
    stride: int = 1
    state_size: int = 0
    action_size: int = 0

    def __post_init__(self) -> None:
        for key, value in dataclasses.asdict(self).items():
            check_range(f"{key} of a clip", value, 0, 2**20)


class Stage(NamedTuple):
    """A stage of the loss that runs alone, so that benchmarks can time it.

    run(model, target, batch, features) returns a tree of float arrays. features: shapes, rows
    first, of the arrays that the stages before it would give. trained: a step also runs the stage
    backward, into the parameters and the features.
    """

    run: Callable[[Any, Params, WorldModelInput, Any], Any]
    features: tuple[jax.ShapeDtypeStruct, ...] = ()
    trained: bool = True


@dataclasses.dataclass(frozen=True)
class NoSettings:
    """Settings of a family that has none."""


class WorldModel(nnx.Module):
    """The contract. A family defines create, loss, features and token_grid; the rest has defaults.

    Settings: a frozen dataclass of the family's keys in the `model` group, with defaults; its
    __post_init__ checks the values. A property `function` may say which of them change what the
    parameters compute (see function_of). uses_masks: False: the reader draws none for this family.
    A parameter is an `nnx.Param`. Metadata `axes`, a logical name for each dimension, say how it is
    sharded (see sharding.py) and which dimension is the depth ("layers"); without axes it is
    replicated. Any other `nnx.Variable` is never trained.
    """

    Settings: ClassVar[type] = NoSettings
    uses_masks: ClassVar[bool] = True

    @classmethod
    def create(
        cls,
        settings: Any,
        compute: Compute,
        spec: InputSpec,
        statistics: Sequence[Mapping[str, Any]],
        rngs: nnx.Rngs,
    ) -> "WorldModel":
        """Build the model.

        settings: an instance of Settings. statistics: of state and action, a dict for each dataset
        of the run (see nn/normalize.py); empty where the data has none.
        """
        raise UserError(f"model.name: {cls.__qualname__} does not define create")

    @classmethod
    def token_grid(cls, settings: Any, frames: int, height: int, width: int) -> TokenGrid:
        """Return the tokens of such a clip along time, rows and columns; UserError if none fit."""
        raise UserError(f"model.name: {cls.__qualname__} does not define token_grid")

    @classmethod
    def outline(cls, settings: Any) -> str:
        """Describe the settings in a line for the console."""
        fields = dataclasses.fields(settings)
        return ", ".join(f"{field.name} {getattr(settings, field.name)}" for field in fields)

    def trained(self, path: str) -> bool:
        """Say whether a parameter is trained; path: as in "encoder/blocks/mlp/fc1/kernel".

        What is not trained gets no gradient, moments or weight decay, and is stored once.
        """
        return True

    def decays(self, path: str) -> Any:
        """Say whether weight decay acts on a parameter of rank 2 or more that is no bias.

        A bool, or an array of them that broadcasts to the parameter.
        """
        return True

    def followed(self, params: Params) -> Params:
        """Return the part of the parameters that an EMA target follows; {}: there is none."""
        return {}

    def loss(self, target: Params, batch: WorldModelInput, key: jax.Array) -> WorldModelOutput:
        """Return the loss to minimise, float32, with its named terms.

        target: the EMA of what `followed` returns; no gradient reaches it. key: PRNG key of the
        step, for models that draw something.
        """
        raise UserError(f"model.name: {type(self).__qualname__} does not define loss")

    def stream_weight(self, stream: str) -> float:
        """Return the weight of the loss on a stream of batch.beside, where that of clips is 1.

        The step calls `loss` on each stream by itself. Its loss, gradients and updates are the
        weighted means.
        """
        return 1.0

    def evaluate(self, target: Params, batch: WorldModelInput) -> WorldModelOutput:
        """Return the loss as validation has it: a family with dropout leaves it out here."""
        return self.loss(target, batch, jax.random.key(0))

    def features(self, target: Params, video_BTHWC: jax.Array) -> jax.Array:
        """Return float32 features of all tokens, BND, by the EMA target where there is one.

        `wmjax.load(...).encode` returns these. Tokens are ordered by time, row, column.
        """
        raise UserError(f"model.name: {type(self).__qualname__} does not define features")

    def target_features(self, target: Params, video_BTHWC: jax.Array) -> jax.Array:
        """Return the features in the space of the loss, which probes and pictures show."""
        return self.features(target, video_BTHWC)

    def frozen_features(self) -> tuple[str, Mapping[str, Any]]:
        """Say what `target_features` of single frames depend on, where training never changes it.

        The prefix of the parameters, as in "encoder/", and the settings by name; ("", {}): training
        changes them. With a prefix, `loss` takes observation.features_BVTND in place of video.
        """
        return "", {}

    def flops(self, batch: WorldModelInput) -> int:
        """Count the floating-point operations of a train step on a batch; 0: not counted, no MFU.

        Counts products only, a multiply-add as two, and nothing that remat repeats.
        """
        return 0

    def stages(self, batch: WorldModelInput) -> dict[str, Stage]:
        """Name the stages of the loss on such a batch, for benchmarks; {}: it is timed as one."""
        return {}


def family_named(name: str, trust: Sequence[str] = ANY) -> type[WorldModel]:
    """Return the model family that model.name names."""
    found = resolve("model.name", name, FAMILIES, trust)
    if not (isinstance(found, type) and issubclass(found, WorldModel)):
        raise UserError(f"model.name={name!r}: wanted a subclass of wmjax.models.base.WorldModel")
    for method in ("create", "token_grid", "loss", "features"):
        if getattr_static(found, method) is getattr_static(WorldModel, method):
            raise UserError(f"model.name={name!r}: {found.__qualname__} does not define {method}")
    for field in dataclasses.fields(found.Settings):
        if field.name in SHARED:
            raise UserError(
                f"model.name={name!r}: its Settings have {field.name}, a key that all models share"
            )
    return found


def default_settings(name: str) -> dict[str, Any]:
    """Return the keys of a family with their defaults."""
    cls = family_named(name).Settings
    try:
        settings = cls()
    except TypeError as error:
        fault = f"model.name={name!r}: a key of its Settings has no default: {error}"
        raise UserError(fault) from None
    return {field.name: getattr(settings, field.name) for field in dataclasses.fields(cls)}


def freeze_patterns(text: str) -> tuple[str, ...]:
    """Return the patterns of optim.freeze, which are separated by commas."""
    return tuple(filter(None, (each.strip() for each in text.split(","))))


def settings_of(group: Mapping[str, Any], trust: Sequence[str] = ANY) -> Any:
    """Return the settings of the family that a `model` group names, checked.

    Raises UserError for a key that neither the family nor Compute has.
    """
    cls = family_named(group["name"], trust).Settings
    known = [field.name for field in dataclasses.fields(cls)]
    own = {
        key: tuple(value) if isinstance(value, list) else value  # JSON has no tuples
        for key, value in group.items()
        if key not in SHARED
    }
    for key in own:
        if key not in known:
            raise UserError(
                f"model.{key}: no such key of model.name={group['name']!r}{suggest(key, known)}; "
                f"it has: {', '.join(known) or 'none'}"
            )
    return cls(**own)


def function_of(settings: Any) -> dict[str, Any]:
    """Return the settings that decide what the parameters of a model compute, by key.

    Shapes do not reveal all of them: heads, for example. A Settings class lists them in a property
    `function`; without one, every setting counts.
    """
    own = isinstance(getattr(type(settings), "function", None), property)
    return settings.function if own else dataclasses.asdict(settings)


def differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Describe each setting that has another value in `found`."""
    return [
        f"model.{key}={value!r}, found {found[key]!r}"
        for key, value in wanted.items()
        if value != found[key]
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class Blueprint:
    """All that a model is built from, and how a train state divides its variables.

    freeze: glob patterns of parameters that are frozen besides those that the family freezes, such
    as "encoder/**"; * matches within a name, ** across names.

    A train state keeps three trees. trained: parameters that the optimiser changes. frozen: all
    other variables. target: the EMA of those trained parameters that the family's `followed` picks;
    a frozen parameter is its own target.
    """

    family: type[WorldModel]
    settings: Any
    compute: Compute
    spec: InputSpec
    statistics: Sequence[Mapping[str, Any]] = ()
    freeze: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        group: Mapping[str, Any],
        spec: InputSpec,
        statistics: Sequence[Mapping[str, Any]] = (),
        freeze: tuple[str, ...] = (),
        trust: Sequence[str] = ANY,
    ) -> "Blueprint":
        """Read the `model` group of a configuration, as a plain dict."""
        found = family_named(group["name"], trust)
        return cls(found, settings_of(group, trust), Compute.of(group), spec, statistics, freeze)

    def create(self, rngs: nnx.Rngs) -> WorldModel:
        return self.family.create(self.settings, self.compute, self.spec, self.statistics, rngs)

    @property
    def scanned(self) -> "Blueprint":
        """The same model, of the same parameters, which compiles faster: for evaluations."""
        return dataclasses.replace(self, compute=dataclasses.replace(self.compute, scan=True))

    @property
    def _package(self) -> tuple[str]:
        """The package of the family, which the user has named and so trusts."""
        return (self.family.__module__.partition(".")[0],)

    def is_of(self, name: str) -> bool:
        """Return whether a name is that of this family; one of an unknown package is not."""
        with contextlib.suppress(UserError):
            return family_named(name, self._package) is self.family
        return False

    def check_function(self, group: Mapping[str, Any], where: str) -> list[str]:
        """Compare with the `model` group of saved parameters; list differences of no consequence.

        These are settings of the loss and of the computation. where: begins the error. Raises
        UserError for another family, or a setting with which the same parameters compute something
        else.
        """
        if not self.is_of(group["name"]):
            wanted = f"{self.family.__module__}:{self.family.__qualname__}"
            raise UserError(f"{where}: model.name={group['name']!r}; wanted {wanted}")
        saved = settings_of(group, self._package)
        if different := differences(function_of(self.settings), function_of(saved)):
            raise UserError(
                f"{where}: its parameters were trained with other settings:\n{'; '.join(different)}"
            )
        pairs = (self.settings, saved), (self.compute, Compute.of(group))
        return [line for pair in pairs for line in differences(*map(dataclasses.asdict, pair))]

    @property
    def grid(self) -> TokenGrid:
        """Tokens of the clips of the run along time, rows and columns."""
        return self.token_grid(self.spec.frames, self.spec.height, self.spec.width)

    def token_grid(self, frames: int, height: int, width: int) -> TokenGrid:
        """Return the tokens of any clip along time, rows and columns."""
        return self.family.token_grid(self.settings, frames, height, width)

    @cached_property
    def abstract(self) -> WorldModel:
        """The model with a shape and a dtype in place of every array."""
        model = nnx.eval_shape(lambda: self.create(nnx.Rngs(0)))
        for path, module in nnx.iter_modules(model):
            for name, value in vars(module).items():
                if isinstance(value, jax.Array):
                    where = ".".join(map(str, (*path, name)))
                    raise UserError(
                        f"model.name: {self.family.__qualname__}.{where} is a plain array; wanted "
                        "nnx.Param(...), which is trained, or nnx.Variable(...), which is not"
                    )
        return model

    @cached_property
    def graph(self) -> nnx.GraphDef:
        return split(self.abstract)[0]

    @cached_property
    def shapes(self) -> Params:
        """Shape and dtype of every variable."""
        return split(self.abstract)[1]

    @cached_property
    def axes(self) -> Params:
        """Logical axes of every variable, a tuple of names."""
        return split(self.abstract)[2]

    @cached_property
    def mask(self) -> Params:
        """Say of every variable whether it is trained."""
        kinds = flatten_dict(_kinds(self.abstract), sep="/")
        for name, kind in kinds.items():
            if issubclass(kind, nnx.RngState):
                raise UserError(
                    f"model.name: {self.family.__qualname__} holds PRNG state in {name}; "
                    "wanted draws from the key that loss gets"
                )
        frozen = [name for pattern in self.freeze for name in self._matches(pattern, kinds)]
        mask = {
            name: issubclass(kind, nnx.Param)
            and name not in frozen
            and bool(self.abstract.trained(name))
            for name, kind in kinds.items()
        }
        if not any(mask.values()):
            by = f"optim.freeze={','.join(self.freeze)!r}" if self.freeze else "model.name"
            raise UserError(
                f"{by}: all {len(mask)} variables of {self.family.__qualname__} are frozen; "
                "nothing is left to train"
            )
        return unflatten_dict(mask, sep="/")

    def _matches(self, pattern: str, names: Iterable[str]) -> list[str]:
        regex = re.escape(pattern).replace(r"\*\*", ".*").replace(r"\*", "[^/]*")
        matches = [name for name in names if re.fullmatch(regex, name)]
        if not matches:
            parts = dict.fromkeys(f"{name.partition('/')[0]}/**" for name in names)
            raise UserError(
                f"optim.freeze={pattern!r}: matches no parameter of {self.family.__qualname__}"
                f"{suggest(pattern, list(parts))}; its parts: {', '.join(parts)}"
            )
        return matches

    @cached_property
    def followed_paths(self) -> Params:
        """The path of the parameter that each leaf of the target follows."""
        paths = {path: path for path in flatten_dict(self.mask, sep="/")}
        return self.abstract.followed(unflatten_dict(paths, sep="/"))

    def variables(self, model: WorldModel) -> tuple[Params, Params]:
        """Return all variables of a model, and a target equal to those that `followed` picks."""
        params = split(model)[1]
        return params, self.abstract.followed(params)

    def divide(self, params: Params, target: Params) -> tuple[Params, Params, Params]:
        """Return (trained, frozen, target) of all variables and all that an EMA follows.

        Where a frozen parameter and its target differ, the target is what is kept.
        """
        trained, _ = partition(params, self.mask)
        _, frozen = partition(self.overlay(params, target), self.mask)
        return trained, frozen, partition(target, self.abstract.followed(self.mask))[0]

    def join(self, trained: Params, frozen: Params, target: Params) -> tuple[Any, Params]:
        """Return the model and its whole target, the inverse of `divide`."""
        params = combine(trained, frozen)
        followed = self.abstract.followed(params)
        _, fixed = partition(followed, self.abstract.followed(self.mask))
        return merge(self.graph, params), combine(target, fixed)

    def overlay(self, params: Params, target: Params) -> Params:
        """Return the parameters with the target in place of those that it follows."""
        values = flatten_dict(target, sep="/")
        ema = {path: values[at] for at, path in flatten_dict(self.followed_paths, sep="/").items()}
        return unflatten_dict(flatten_dict(params, sep="/") | ema, sep="/")


def partition(tree: Params, mask: Params) -> tuple[Params, Params]:
    """Return the leaves whose mask is True, and the others, without empty branches."""
    leaves, chosen = flatten_dict(tree, sep="/"), flatten_dict(mask, sep="/")
    parts = ({k: v for k, v in leaves.items() if chosen[k] is which} for which in (True, False))
    true, false = (unflatten_dict(part, sep="/") for part in parts)
    return true, false


def combine(*trees: Params) -> Params:
    """Return the leaves of all trees; where several have one, the last tree's."""
    return unflatten_dict(
        {k: v for tree in trees for k, v in flatten_dict(tree, sep="/").items()}, sep="/"
    )


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params, Params]:
    """Take a module apart: static graph, arrays of all variables, and their logical axes.

    The axes have the structure of the arrays with a tuple of names (None: not sharded) for every
    leaf, so map over them with `is_leaf=lambda x: isinstance(x, tuple)`.
    """
    graphdef, state = nnx.split(model)

    def names(variable: nnx.Variable) -> tuple[str | None, ...]:
        rank = len(jax.tree.leaves(variable)[0].shape)
        return variable.get_metadata().get("axes") or (None,) * rank

    axes = jax.tree.map(names, state, is_leaf=_is_variable)
    return graphdef, _text_keys(nnx.to_pure_dict(state)), _text_keys(nnx.to_pure_dict(axes))


def merge(graphdef: nnx.GraphDef, params: Params) -> Any:
    """Put a module together from its graph and a nested dict of arrays."""
    return nnx.merge(graphdef, nnx.State(_number_keys(params)))


def merge_target(encoder: Any, target: Params) -> Any:
    """Put the EMA encoder together: `encoder`, which has .blocks, with the target's parameters."""
    merged = merge(nnx.graphdef(encoder), target)
    if merged.blocks.compute.target_dtype:
        merged.blocks.use_float8("model.target_dtype")
    return merged


def _kinds(model: nnx.Module) -> Params:
    """Return the class of every variable."""
    kinds = jax.tree.map(type, nnx.split(model)[1], is_leaf=_is_variable)
    return _text_keys(nnx.to_pure_dict(kinds))


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _text_keys(tree: Any) -> Any:
    """Return a nested dict with text in place of the numbers that NNX gives the items of lists."""
    if not isinstance(tree, dict):
        return tree
    for key in tree:
        if isinstance(key, str) and (key.isdigit() or "/" in key):
            raise UserError(
                f"model.name: {key!r} is the name of a variable or a key of an nnx.Dict; wanted a "
                "name that is no number and has no /"
            )
    return {str(key): _text_keys(value) for key, value in tree.items()}


def _number_keys(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {int(k) if k.isdigit() else k: _number_keys(v) for k, v in tree.items()}
