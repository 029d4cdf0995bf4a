"""Every test runs on 8 fake CPU devices, with jax at its strictest."""

import contextlib
import os
from pathlib import Path

import pytest

from wmjax import door

door.share_heaps()  # as the doors do, before jax starts its threads

# jax reads these when it is imported, and child processes inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Programs here are compiled for a few small steps: optimising them takes longer than it saves.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
door.compile_fast()
# Compiled programs are kept between runs in this checkout, so on this machine.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def lowered_for_gpu(fn, *args):
    """Return the program of an H100, kernels and all, as text: nothing is compiled."""
    import jax
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType

    gpu = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=gpu)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture
def in_python(monkeypatch):
    """Run the attention kernels in Python, their table in float32; return the calls so far.

    A call is the name of the function and the lengths that it was given.
    """
    import jax.numpy as jnp

    from wmjax.nn import attention
    from wmjax.nn.kernels import attention_gpu

    calls = []

    def recorded(name, fn):
        def call(*args):
            calls.append((name, *(x for x in args if isinstance(x, tuple) and type(x[0]) is int)))
            return fn(*args, interpret=True)

        return call

    for name in ("attend", "attend_in_place", "attend_and_keep", "gradient_in_place"):
        monkeypatch.setattr(attention_gpu, name, recorded(name, getattr(attention_gpu, name)))
    monkeypatch.setattr(attention, "TABLE", jnp.float32)
    return calls


NAMES = (
    *("HF_TOKEN", "WANDB_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN"),
    *("AWS_SESSION_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS", "MY_DATABASE_URL", "WMJAX_WHATEVER"),
)
SECRETS = {name: f"canary-{i}-{name.lower()}" for i, name in enumerate(NAMES)}


@pytest.fixture(scope="session")
def micro_run(tmp_path_factory):
    """Workdir of a micro run of three steps, to be read only; what it printed is beside it, .txt.

    It ran with SECRETS in the environment.
    """
    import micro

    workdir = tmp_path_factory.mktemp("micro_run")
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        workdir.with_suffix(".txt").open("w") as output,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        for name, secret in SECRETS.items():
            monkeypatch.setenv(name, secret)
        assert micro.train(micro.config("train.num_steps=3"), workdir) == 0
    return workdir
