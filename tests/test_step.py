"""The train step: its arithmetic, its shardings on 8 devices against 1, one compilation."""

import contextlib
import math
import re

import jax
import micro
import numpy as np
import pytest
from says import refused

from wmjax import assemble, sharding
from wmjax.run.metrics import fetch


def prepare(devices, *overrides):
    """Return (steps, batches) of a micro run on the first `devices` devices."""
    config = micro.config(*overrides)
    setup = micro.prepare(config, devices=devices)
    batches = assemble.make_pipeline(config, setup, "train", held_out=False)
    return setup.steps, batches


def losses(devices, *overrides, count=5):
    steps, batches = prepare(devices, *overrides)
    state, out = steps.init(), []
    for _ in range(count):
        state, metrics = steps.train(state, next(batches))
        out.append(fetch(metrics)["loss"])
    batches.close()
    return out


@pytest.fixture(scope="module")
def losses_of_one_device():
    return losses(1)


@pytest.mark.parametrize("fsdp", [1, 4, 8])
def test_eight_devices_agree_with_one(fsdp, losses_of_one_device):
    np.testing.assert_allclose(losses(8, f"mesh.fsdp={fsdp}"), losses_of_one_device, rtol=1e-5)


# Adam's first moves are the gradients' signs where eps is small: that would compare noise.
LARGE_BATCH = ("data.batch_size=16", "optim.eps=1e-3", "optim.clip_norm=0.5")


def two_steps(devices, accumulate, fsdp=1):
    """Take two steps and validate, every fourth view missing: a whole microbatch of four.

    Returns the metrics, the state as NumPy, and the bytes of a step's temporary arrays.
    """
    overrides = (*LARGE_BATCH, f"optim.accumulate={accumulate}", f"mesh.fsdp={fsdp}")
    steps, batches = prepare(devices, *overrides)
    state, rows, program = steps.init(), [], None
    for _ in range(2):
        batch = next(batches)
        mask_BV = batch.observation.view_mask_BV
        there_BV = np.arange(mask_BV.size).reshape(mask_BV.shape) % 4 != 1
        there_BV = jax.device_put(there_BV, mask_BV.sharding)
        batch = batch.replace(observation=batch.observation.replace(view_mask_BV=there_BV))
        program = program or steps.train.lower(steps.abstract, batch).compile()
        state, metrics = program(state, batch)
        rows += [fetch(metrics), fetch(steps.validate(state, batch))]
    batches.close()
    return rows, jax.device_get(state), program.memory_analysis().temp_size_in_bytes


@pytest.fixture(scope="module")
def two_whole_steps():
    return two_steps(1, 1)


@pytest.mark.parametrize(("devices", "accumulate", "fsdp"), [(1, 4, 1), (8, 2, 4)])
def test_microbatches_add_up_to_the_whole_batch(devices, accumulate, fsdp, two_whole_steps):
    rows, state, temporary = two_steps(devices, accumulate, fsdp)
    whole_rows, whole_state, whole_temporary = two_whole_steps
    assert temporary < whole_temporary / 2
    for row, whole in zip(rows, whole_rows, strict=True):
        # Figures of health, and the mean token's, are of a batch's tokens among themselves.
        added = {name for name in whole if not name.startswith(("health/", "l1_mean"))}
        assert {n: row[n] for n in added} == pytest.approx(
            {n: whole[n] for n in added}, rel=1e-5, abs=1e-7
        )
        assert row["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), state, whole_state
    )


def test_the_state_is_split_from_birth_and_stays_split():
    steps, batches = prepare(8, "mesh.fsdp=8")
    fresh = steps.init()
    for state in (fresh, steps.train(steps.init(), next(batches))[0]):
        total, largest = sharding.device_bytes(state)
        assert largest <= 1.15 / 8 * total
        found = jax.tree.map(lambda leaf: leaf.sharding, state)
        wanted = jax.tree.map(lambda leaf: leaf.sharding, steps.abstract)
        assert jax.tree.all(
            jax.tree.map(lambda a, b, x: a.is_equivalent_to(b, x.ndim), found, wanted, state)
        )
    batches.close()


@contextlib.contextmanager
def compilations(workdir):
    """Give a list of (steps reported in workdir by then, function) of all that XLA compiles.

    What the cache of compiled programs holds counts too.
    """
    found, rows = [], workdir / "metrics.jsonl"

    def note(event, _, fun_name="", **__):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append((rows.read_text().count("\n") if rows.exists() else 0, fun_name))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def test_three_programs_are_compiled_before_the_first_step_is_done(tmp_path):
    before = []
    jax.clear_caches()
    with compilations(tmp_path) as compiled:
        config = micro.config("train.num_steps=1")
        micro.train(config, tmp_path, on_step=lambda *_: before.extend(compiled))
    functions = "convert_element_type", "init", "train_step"
    assert before == [(0, f"jit({name})") for name in functions]


def test_two_hundred_steps_compile_the_step_once(tmp_path):
    with compilations(tmp_path) as compiled:
        assert micro.train(micro.config("train.num_steps=201"), tmp_path) == 0
    assert [row["step"] for row in micro.rows(tmp_path)] == [*range(1, 202)]
    assert sum("train_step" in name for _, name in compiled) == 1
    assert [(steps, name) for steps, name in compiled if steps > 0] == []


def test_the_step_follows_the_schedules_of_the_configuration():
    steps, batches = prepare(
        1,
        *("optim.schedule_steps=2", "optim.warmup=0", "optim.schedule=linear"),
        *("optim.learning_rate=0.5", "optim.final_learning_rate=0.25"),
        *("optim.weight_decay=0", "optim.final_weight_decay=1"),
        *("optim.ema=0.75", "optim.final_ema=0.25"),
        "optim.eps=1e9",  # nothing but decay moves the parameters
    )
    state = steps.init()
    before = jax.device_get((state.target, state.params["encoder"]))
    jax.tree.map(np.testing.assert_array_equal, *before)
    for rate, decay, momentum in ((0.375, 0.5, 0.75), (0.25, 1.0, 0.5)):
        state, metrics = steps.train(state, next(batches))
        after = jax.device_get((state.target, state.params["encoder"]))
        assert fetch(metrics)["learning_rate"] == pytest.approx(rate)
        kernels = [params["patch_embed"]["kernel"] for params in (before[1], after[1])]
        np.testing.assert_allclose(kernels[1], (1 - rate * decay) * kernels[0], rtol=1e-5)
        jax.tree.map(
            lambda old, new, now, m=momentum: np.testing.assert_allclose(
                now, m * old + (1 - m) * new, atol=1e-7
            ),
            before[0],
            after[1],
            after[0],
        )
        before = after
    batches.close()


def test_a_mesh_or_batch_that_does_not_divide_is_refused():
    with refused("mesh.fsdp=3", 8, "cpu"):
        sharding.make_mesh(-1, 3)
    with refused("data.batch_size=12", 8, 16):
        sharding.check_batch(sharding.make_mesh(), 12)
    with refused("data.batch_size=24", 8, "optim.accumulate=2", 32):
        sharding.check_batch(sharding.make_mesh(), 24, accumulate=2)


def test_copies_of_the_state_exchange_gradients_and_no_batch():
    """Microbatches included: each device splits the rows that it holds."""
    steps, batches = prepare(8, "data.batch_size=16", "optim.accumulate=2")
    program = steps.train.lower(steps.abstract, next(batches)).compile().as_text()
    assert "all-reduce" in program
    for moved in ("all-gather", "all-to-all", "collective-permute"):
        assert moved not in program
    batches.close()


def test_a_split_state_is_gathered_layer_by_layer_and_no_activation_moves():
    steps, batches = prepare(8, "mesh.fsdp=8")
    program = steps.train.lower(steps.abstract, next(batches)).compile().as_text()
    batches.close()
    wanted = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(steps.abstract.params):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        shape = leaf.shape[1:] if "blocks" in name else leaf.shape
        if "patch_embed.kernel" in name:  # as the product uses it
            shape = (math.prod(shape[:-1]), shape[-1])
        wanted.add(tuple(sorted(shape)))
    gathered = {
        tuple(sorted(int(size) for size in sizes.split(",")))
        for sizes in re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", program)
    }
    assert gathered
    assert gathered <= wanted
    for moved in ("all-to-all", "collective-permute"):
        assert moved not in program
