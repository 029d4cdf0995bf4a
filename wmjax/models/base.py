"""What every world model fulfils, so that the train step never branches on a model's name.

A model is a file `models/NAME.py` with `create(rngs, **cfg) -> BaseWorldModel`, where cfg is the
`model` group of a config without its name. No mesh, no config object, no data in this room.

The step holds parameters as a plain nested dict, because `jax.jit` dispatches plain dicts several
times faster than NNX states:

    graphdef, shapes, axes = split(abstract(name, **cfg))
    init = lambda key: split(create(name, nnx.Rngs(key), **cfg))[1]     # jit with out_shardings
    loss = lambda params: merge(graphdef, params).loss(target_params, batch, key)
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

import wmjax.models
from wmjax.errors import UserError
from wmjax.types import WorldModelInput, WorldModelOutput

Params = dict[str, Any]  # nested dicts of arrays


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """The sizes that data and masking need: clips in frames and pixels, and their token grid."""

    frames: int
    height: int
    width: int
    tubelet: int
    patch: int

    def __post_init__(self) -> None:
        for what, size, by in (
            ("frames", self.frames, self.tubelet),
            ("height", self.height, self.patch),
            ("width", self.width, self.patch),
        ):
            if size <= 0 or size % by:
                unit = "tubelet" if what == "frames" else "patch"
                raise UserError(f"{what} of the clips={size}: wanted a multiple of {unit}={by}")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Cells along time, rows and columns."""
        return self.frames // self.tubelet, self.height // self.patch, self.width // self.patch

    @property
    def tokens(self) -> int:
        time, rows, columns = self.grid
        return time * rows * columns


class Part(NamedTuple):
    """A part of the loss that can be run alone, to see what of a step's time it takes.

    run(model, target, batch, features) returns a tree of float arrays. features: shapes, rows
    first, of what the parts before it would hand it. trained: a step also runs it backward, into
    the parameters and the features.
    """

    run: Callable[[Any, Params, WorldModelInput, Any], Any]
    features: tuple[jax.ShapeDtypeStruct, ...] = ()
    trained: bool = True


class BaseWorldModel(nnx.Module):
    """The contract. Every parameter is an `nnx.Param` with metadata `axes`, a name a dimension."""

    def loss(
        self, target: Params, batch: WorldModelInput, key: jax.Array
    ) -> tuple[jax.Array, WorldModelOutput]:
        """Return the float32 scalar to minimise, and what is measured in training and validation.

        target: parameters of the structure that `target_params` gives; no gradient reaches them.
        key: for models that draw something in training.
        """
        raise NotImplementedError

    def target_features(self, target: Params, video_BTHWC: jax.Array) -> jax.Array:
        """Return float32 features BND of all tokens, as the EMA target has them in the loss."""
        raise NotImplementedError

    def input_spec(self, frames: int, height: int, width: int) -> InputSpec:
        """Return the token grid of such clips; UserError where they do not divide."""
        raise NotImplementedError

    def target_params(self, params: Params) -> Params:
        """Pick the part of the trained parameters that the EMA target follows."""
        raise NotImplementedError

    def flops(self, batch: WorldModelInput) -> int:
        """Count the floating-point operations a train step needs on a batch of these shapes.

        Products only, a multiply-add being two; nothing is counted that remat does again.
        """
        raise NotImplementedError

    def parts(self, batch: WorldModelInput) -> dict[str, Part]:
        """Name the parts that the loss on a batch of these shapes consists of, for benchmarks."""
        raise NotImplementedError


def create(name: str, rngs: nnx.Rngs, **cfg: Any) -> BaseWorldModel:
    """Build the model in `models/NAME.py`."""
    files = [m.name for m in pkgutil.iter_modules(wmjax.models.__path__) if m.name != "base"]
    module = importlib.import_module(f"wmjax.models.{name}") if name in files else None
    if not hasattr(module, "create"):
        modules = ((f, importlib.import_module(f"wmjax.models.{f}")) for f in files)
        known = ", ".join(f for f, m in modules if hasattr(m, "create"))
        raise UserError(f"model.name={name!r}: unknown model; there are: {known}")
    return module.create(rngs, **cfg)  # type: ignore[union-attr]


def abstract(name: str, **cfg: Any) -> BaseWorldModel:
    """Build the model without its numbers: every parameter a shape and a dtype."""
    return nnx.eval_shape(lambda: create(name, nnx.Rngs(0), **cfg))


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params, dict[str, Any]]:
    """Take a model apart: static graph, parameters, and each parameter's logical axes.

    The axes have the structure of the parameters with a tuple of names (None: never sharded) for
    every leaf, so map over them with `is_leaf=lambda x: isinstance(x, tuple)`.
    """
    graphdef, state = nnx.split(model, nnx.Param)
    axes = jax.tree.map(
        lambda p: p.get_metadata()["axes"], state, is_leaf=lambda p: isinstance(p, nnx.Variable)
    )
    return graphdef, nnx.to_pure_dict(state), nnx.to_pure_dict(axes)


def merge(graphdef: nnx.GraphDef, params: Params) -> Any:
    """Put a model together again from its graph and a nested dict of parameters."""
    return nnx.merge(graphdef, nnx.State(params))
