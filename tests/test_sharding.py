"""Where arrays live on many machines: the layout of the devices, and goldens of the shardings."""

import dataclasses
import json

import jax
import micro
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from wmjax import config as configs
from wmjax import sharding
from wmjax.models.base import Blueprint, InputSpec

GOLDEN = micro.ROOT / "tests" / "data" / "shardings.json"


@dataclasses.dataclass(frozen=True)
class Host:
    """A device of one of several hosts, which are numbered in no order."""

    id: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "H100"


@dataclasses.dataclass(frozen=True)
class Slice:
    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "H100"


@pytest.mark.parametrize(("hosts", "each", "fsdp"), [(2, 4, 4), (2, 4, 2), (4, 2, 2)])
def test_a_state_is_split_within_a_host(hosts, each, fsdp):
    devices = [Host(id, id % hosts) for id in range(hosts * each)]
    grid = sharding.arrange(devices, hosts * each // fsdp, fsdp)
    assert {device for row in grid for device in row} == set(devices)
    for row in grid:
        assert len({device.process_index for device in row}) == 1


def test_a_state_is_split_within_a_slice_of_several_hosts():
    devices = [Slice(id, id // 2, id % 2) for id in range(8)]
    grid = sharding.arrange(devices, 2, 4)
    assert [{device.slice_index for device in row} for row in grid] == [{0}, {1}]


def test_a_state_that_fits_no_host_is_split_over_several():
    devices = [Host(id, id // 2) for id in range(8)]
    grid = sharding.arrange(devices, 1, 8)
    assert grid.shape == (1, 8)
    assert [device.id for device in np.ravel(grid)] == list(range(8))


def test_the_parameters_of_large_and_giant_are_split_as_they_were():
    found = {f"{size}, fsdp 16": shardings(size, 16) for size in ("large", "giant")}
    assert found == json.loads(GOLDEN.read_text())


def shardings(size, fsdp):
    """Map every parameter to what is written of it in the golden: shape and mesh axes."""
    mesh = AbstractMesh((2, fsdp), sharding.AXES)
    config = configs.load("vjepa2_aloha", [f"model.size={size}"])
    model = Blueprint.of(config.model.to_dict(), InputSpec(16, 256, 256))
    params, axes = model.shapes, model.axes
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): "{} {}".format(
            "x".join(map(str, leaf.shape)),
            sharding.parameter_sharding(mesh, names, leaf.shape).spec,
        )
        for (path, leaf), names in zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)),
            strict=True,
        )
    }
