"""Names that libraries do not publish: used in wmjax/run/private.py only, and still there."""

import ast
import re
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import pytest

from wmjax import door
from wmjax.run import cluster, private

ROOT = Path(__file__).parent.parent
FENCE = "wmjax/run/private.py"
# Of os and of named tuples; a module of Python; of stable-worldmodel's protocol of evaluation.
PUBLISHED = {"_exit", "_fields", "_replace", "_asdict", "_thread", "_set_state"}


def private_names(source):
    """Yield (line, name) of every private module, and attribute of another object, that is used."""
    for node in ast.walk(ast.parse(source)):
        names = []
        match node:
            case ast.Import(names=aliases):
                names = [alias.name for alias in aliases]
            case ast.ImportFrom(module=module, names=aliases):
                names = [f"{module}.{alias.name}" for alias in aliases]
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                pass
            case ast.Attribute(attr=attr) if attr not in PUBLISHED:
                names = [attr]
        for name in names:
            parts = [p for p in name.split(".") if not (p.startswith("__") and p.endswith("__"))]
            if any(part.startswith("_") and part not in PUBLISHED for part in parts):
                yield node.lineno, name


@pytest.mark.parametrize(
    "path",
    sorted(str(p.relative_to(ROOT)) for p in (ROOT / "wmjax").rglob("*.py")),
)
def test_private_names_are_used_in_one_module_only(path):
    found = list(private_names((ROOT / path).read_text()))
    assert path == FENCE or not found, f"move to {FENCE}: {found}"


@pytest.mark.parametrize(
    "source",
    [
        "from jax._src import core",
        "import orbax.checkpoint._src.path",
        "parser._option_string_actions",
        "def f(self):\n  self._orbax._handler",
    ],
)
def test_a_private_name_is_found(source):
    assert list(private_names(source))
    assert not list(private_names("self._x\nos._exit(1)\nx.__dict__\nfrom a.b import c"))


def test_equations_of_a_jaxpr_are_read_in_one_module_only():
    """jax publishes neither the names of their parameters nor what they hold."""
    sources = (ROOT / "wmjax").rglob("*.py")
    readers = [path for path in sources if re.search(r"\.eqns\b", path.read_text())]
    assert readers == [ROOT / "wmjax/run/jaxprs.py"]


def need(thing, *names, used_by):
    absent = [name for name in names if not hasattr(thing, name)]
    version = f"jax {jax.__version__}, orbax {ocp.__version__}"
    assert not absent, f"{version}: {thing} has no {', '.join(absent)}: change {used_by}"


def test_jax_has_its_coordination_service():
    from jax._src import distributed

    need(distributed.global_state, "client", used_by=FENCE)
    need(
        distributed._jax.DistributedRuntimeClient,
        *("key_value_set", "key_value_try_get", "blocking_key_value_get", "wait_at_barrier"),
        used_by="wmjax/run/coordination.py",
    )
    assert private.coordination_client() is None  # as this process is not distributed
    need(jax.distributed, "is_initialized", "initialize", used_by="wmjax/run/coordination.py")


def test_jax_detects_clusters(monkeypatch):
    from jax._src.clusters import ClusterEnv

    need(ClusterEnv, "_cluster_types", used_by=FENCE)
    need(
        ClusterEnv,
        *("name", "opt_in_only_method", "is_env_present", "get_coordinator_address"),
        *("get_process_count", "get_process_id"),
        used_by=f"{FENCE} and wmjax/run/cluster.py",
    )
    for name in ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID"):
        monkeypatch.setenv(f"SLURM_{name}", "1")
    found = private.detected_cluster()
    assert found.name == "slurm"  # cluster.py waits longer for the others, which run containers
    assert "ompi" in {kind.name for kind in ClusterEnv._cluster_types}


def test_jax_has_the_cache_key_that_tests_of_several_processes_replace():
    from jax._src import cache_key

    need(cache_key, "_hash_accelerator_config", "_hash_devices", used_by="tests/member.py")


def test_orbax_has_the_hooks_of_a_save(tmp_path):
    """These are public; what is checked is that they work as wmjax/run/checkpoint.py expects."""
    seen = []

    def list_the_folder():
        seen.append([path.name for path in tmp_path.iterdir()])

    options = ocp.options.AsyncOptions(post_finalization_callback=list_the_folder)
    with ocp.AsyncCheckpointer(ocp.JsonCheckpointHandler(), async_options=options) as saver:
        saver.save(tmp_path / "7", args=ocp.args.JsonSave({"a": 1}))
        saver.wait_until_finished()
    ((name,),) = seen
    assert name.startswith(f"7{ocp.utils.TMP_DIR_SUFFIX}")  # the folder has no final name yet
    assert [path.name for path in tmp_path.iterdir()] == ["7"]


def test_the_parser_knows_its_flags_without_argparses_insides():
    parser = door.parser("prog", "")
    door.add_config(parser)
    cluster.add_flags(parser)
    parser.add_argument("--work-dir", metavar="DIR", required=True)
    known = {"--help", "--config", "--trust", "--coordinator", "--processes", "--process"}
    assert set(door.known_flags(parser)) == known | {"--work-dir", "--version"}
