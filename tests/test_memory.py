"""Memory that runs out is two lines and code 2; what cannot fit is refused before it compiles."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest
from says import refused, says
from test_beside import compiled

from wmjax import assemble
from wmjax.run import jaxprs, memory, summary


def traced(config, devices=1):
    setup = micro.prepare(config, devices=devices)
    steps, batch = setup.steps, assemble.abstract_batch(config, setup)
    return steps.train.trace(steps.abstract, batch), steps.abstract, batch, setup.mesh


@pytest.mark.parametrize("overrides", [(), ("model.remat=full",), ("model.scan=False",)])
def test_the_least_that_a_step_needs_is_less_than_what_its_program_takes(monkeypatch, overrides):
    step = traced(micro.config(*overrides))
    used = step[0].lower().compile().memory_analysis()
    takes = used.argument_size_in_bytes + used.temp_size_in_bytes
    monkeypatch.setattr(memory, "host_bytes", lambda: takes)
    memory.check_step(*step)
    monkeypatch.setattr(memory, "host_bytes", lambda: takes // 4)
    with refused("state", "batch", "data.batch_size", "model.remat=full", lines=2):
        memory.check_step(*step)


def test_of_a_scan_only_what_it_stacks_counts():
    def loop(x):
        return jax.lax.scan(lambda x, _: (x + 1, x[:2]), x, length=3)

    assert jaxprs.largest_result(jax.make_jaxpr(loop)(jnp.ones(100))) == 3 * 2 * 4


def test_a_batch_that_cannot_fit_is_refused_before_the_step_is_compiled(tmp_path):
    config = micro.config("data.batch_size=1048576", "data.image_size=256")
    with compiled() as programs, refused("data.batch_size", "data.image_size", lines=2):
        micro.train(config, tmp_path)
    assert "jit(train_step)" not in programs


def test_the_step_is_traced_once(tmp_path):
    found = []

    def note(event, _, fun_name="", **__):
        if event == "/jax/core/compile/jaxpr_trace_duration":
            found.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        assert micro.train(micro.config("train.num_steps=1"), tmp_path) == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert found.count("train_step") == 1


def test_real_errors_of_device_and_host_are_told_and_others_are_not():
    with pytest.raises(jax.errors.JaxRuntimeError) as device:
        jnp.zeros((1 << 20, 1 << 20, 64)).block_until_ready()
    says(memory.out_of_memory(device.value), "cpu", "281,475.0 GB", "data.batch_size", lines=2)
    with pytest.raises(MemoryError) as host:
        np.zeros(1 << 45)
    says(memory.out_of_memory(host.value), "host", "256", "TiB", lines=2)
    for other in (RuntimeError("RESOURCE_EXHAUSTED: too many files"), ValueError("memory")):
        assert not memory.out_of_memory(other)


RUNS_OUT = """
import jax.numpy as jnp
from wmjax import door
door.run_and_exit(lambda argv: jnp.zeros((1 << 20, 1 << 20, 64)).block_until_ready(), "")
"""


@pytest.mark.processes
def test_a_command_without_memory_ends_with_2_and_two_lines():
    command = [sys.executable, "-c", RUNS_OUT]
    how = {"env": micro.environment(1), "cwd": micro.ROOT, "timeout": 120}
    done = subprocess.run(command, **how, capture_output=True, text=True)
    assert done.returncode == 2
    says(done.stderr, "error", "281,475.0", "data.batch_size", lines=2)


def test_a_step_of_minutes_on_a_cpu_is_told():
    says(summary.of_slow_step(84_600_000_000_000, 2), "warning", "84.6", 2, lines=2)
    assert not summary.of_slow_step(micro.FLOP, 2)
