"""What plan mode reads from a compiled program, and what it prints."""

import importlib.util
import subprocess

import jax
import jax.numpy as jnp
import micro
import pytest
from jax.experimental import pallas as pl
from says import lines_with, refused, says

from wmjax import main
from wmjax.commands import hlo, plan
from wmjax.run import jaxprs

# A loop of three turns: each gathers 8 rows of 4 by two members, of a mesh of two axes, and adds.
PROGRAM = """
%body (carry: (s32[], f32[4])) -> (s32[], f32[4]) {
  %carry = (s32[], f32[4]{0}) parameter(0)
  %rows = f32[4,4]{1,0} broadcast(%carry), dimensions={1}
  %gathered = f32[8,4]{1,0} all-gather(%rows), replica_groups=mesh['x'=2,'y'=4] {'x'}, dimensions={0}
  %kept = f32[8,4]{1,0:T(8,128)S(1)} copy(%gathered)
  %sum = f32[4]{0} add(%x, %y)
  ROOT %next = (s32[], f32[4]{0}) tuple(%i, %sum)
}

ENTRY %main (weights: f32[4]) -> f32[4] {
  %weights = f32[4]{0} parameter(0)
  %reduced = (f32[4]{0}, f32[4]{0}) all-reduce-start(%weights, %weights), replica_groups=[2,4]<=[8]
  %summed = (f32[4]{0}, f32[4]{0}) all-reduce-done(%reduced)
  %alone = f32[4]{0} all-reduce(%weights), replica_groups={{0},{1}}
  %loop = (s32[], f32[4]{0}) while(%init), condition=%no, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %out = f32[4]{0} get-tuple-element(%loop), index=1
}

%no (carry: (s32[], f32[4])) -> pred[] {
  ROOT %false = pred[] constant(false)
}
"""  # noqa: E501


# What a TPU makes of an exchange that products hide, and of a sum of which each keeps its part.
FUSED = """
%begin (part: f32[4]) -> f32[8] {
  ROOT %all = f32[8]{0} all-gather(%part), replica_groups=[4,2]<=[8], backend_config={"flag_start":"-1"}
}

%go_on (part: f32[4]) -> f32[8] {
  ROOT %all = f32[8]{0} all-gather(%part), replica_groups=[4,2]<=[8], backend_config={"flag_start":"2"}
}

%all-reduce-scatter.1 (whole: f32[8]) -> f32[4] {
  %sum = f32[8]{0} all-reduce(%whole), replica_groups=[4,2]<=[8]
  ROOT %kept = f32[4]{0} dynamic-slice(%sum, %mine), dynamic_slice_sizes={4}
}

ENTRY %main (part: f32[4]) -> f32[4] {
  %begun = f32[8]{0} fusion(%part), kind=kCustom, calls=%begin
  %whole = f32[8]{0} fusion(%begun), kind=kOutput, calls=%go_on
  ROOT %kept = f32[4]{0} fusion(%whole), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # noqa: E501


def test_exchanges_count_as_often_as_their_loop_runs():
    assert hlo.Program(PROGRAM).collectives() == {
        "all-gather": hlo.Collective(count=3, sent=3 * 128 / 2),
        "all-reduce": hlo.Collective(count=1, sent=2 * 32 * 3 / 4),
    }


def test_the_order_of_the_devices_does_not_hide_their_groups():
    ordered = PROGRAM.replace("] {'x'}", "], device_ids=([2,4]T(1,0)) {'x'}")
    assert ordered != PROGRAM
    assert hlo.Program(ordered).collectives() == hlo.Program(PROGRAM).collectives()


def test_an_exchange_in_several_fusions_counts_once():
    assert hlo.Program(FUSED).collectives() == {
        "all-gather": hlo.Collective(count=1, sent=32 / 2),
        "reduce-scatter": hlo.Collective(count=1, sent=32 / 2),
    }


def test_a_loop_without_a_known_count_turns_as_often_as_its_condition_says():
    untold = PROGRAM.replace("known_trip_count", "unknown").replace(
        "constant(false)", "compare(%i, %end), direction=LT\n  %end = s32[] constant(3)"
    )
    assert hlo.Program(untold).collectives() == hlo.Program(PROGRAM).collectives()


def test_traffic_is_what_is_written_to_the_main_memory_and_read_again():
    in_the_loop = 128 + 16  # gathered, sum
    assert hlo.Program(PROGRAM).traffic() == 2 * (32 + 16 + 3 * in_the_loop)


def test_products_count_as_often_as_they_run():
    def loop(x, w):
        def body(x, _):
            return jnp.tanh(x @ w), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(body), x, length=3)[0])

    x, w = jnp.ones((2, 8)), jnp.ones((8, 8))
    once = 2 * 2 * 8 * 8
    assert jaxprs.executed_flop(jax.make_jaxpr(loop)(x, w)) == 3 * once
    backward = jax.make_jaxpr(jax.grad(loop, argnums=(0, 1)))(x, w)
    assert jaxprs.executed_flop(backward) == 3 * 4 * once  # forward, again, and two backward


def test_products_count_for_each_device_and_each_block_of_a_kernel():
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...] @ x_ref[...]

    def on_a_device(x):
        block = pl.BlockSpec((8, 8), lambda i: (i, 0))
        return pl.pallas_call(kernel, x, grid=3, in_specs=[block], out_specs=block)(x)

    mesh = jax.sharding.Mesh(jax.devices()[:2], "x")
    split = jax.shard_map(on_a_device, mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P("x"))
    traced = jax.make_jaxpr(split)(jnp.ones((2 * 3 * 8, 8)))
    assert jaxprs.executed_flop(traced) == 2 * 3 * (2 * 8 * 8 * 8)


def test_a_plan_for_local_devices(capsys):
    assert plan.plan(micro.config("mesh.fsdp=8"), "cpu:8") == 0
    said = capsys.readouterr().out
    assert lines_with(said, "cpu", 8, "data", 1, "fsdp", 8)
    assert lines_with(said, "all-gather", "GB")
    assert lines_with(said, "memory", "GiB")


@pytest.mark.parametrize(
    "error",
    [
        "Used 20.5G of 15.75G hbm. Exceeded",
        "memory required for HLO temporaries (20.5G) exceeds available HBM (15.75G).",
    ],
)
def test_what_a_compiler_lacks_is_told(error):
    says(plan._told(error), "20.5G", "15.75G", lines=1)


@pytest.mark.parametrize(
    ("topology", "said"),
    [
        ("gpu:8", ["--topology=gpu:8", 0]),
        ("cpu:900", ["--topology=cpu:900", 8]),
        ("cpu:x", ["--topology=cpu:x"]),
        ("v5e", ["--topology=v5e", "v5e:16x16", "cpu:N"]),
    ],
)
def test_devices_that_are_not_there_are_named(topology, said):
    try:
        with refused(*said, lines=2):
            plan.find_devices(topology)
    finally:  # for the tests to come
        jax.config.update("jax_enable_compilation_cache", True)


def test_a_plan_joins_no_cluster():
    with refused("--topology=cpu:900", 8):
        main.run(
            ["--mode=plan", "--topology=cpu:900", "--config=debug_world_model"],
            start=lambda *_: pytest.fail("it would wait for the others"),
        )


@pytest.mark.campaign
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="no libtpu (extra tpu)")
@pytest.mark.parametrize("fits", [True, False])
def test_a_plan_for_a_pod_of_tpus(tmp_path, fits):
    overrides = ("mesh.fsdp=2", "model.dtype=bfloat16", "model.attention=auto")
    large = () if fits else ("data.batch_size=400000",)
    command = [*micro.command(tmp_path, *overrides, *large), "--mode=plan", "--topology=v5e:2x2"]
    environment = micro.environment(1) | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    once, again = (
        subprocess.run(command, env=environment, cwd=micro.ROOT, capture_output=True, text=True)
        for _ in range(2)
    )
    said = once.stdout
    assert (once.returncode, once.stderr) == (0 if fits else 1, "")
    assert (again.returncode, again.stderr, again.stdout) == (once.returncode, "", said)
    assert lines_with(said, "TPU v5 lite", 4, "data", 2, "fsdp", 2)
    assert lines_with(said, "memory")
    assert bool(lines_with(said, "MFU")) == fits
    if fits:
        assert "reduce-scatter" in said or "all-reduce" in said
