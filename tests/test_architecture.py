"""The arrows between rooms, read from the imports: who may know whom, and what is never loaded."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

EVERYTHING = None
# Room -> the rooms that it may import, besides itself, types and errors. A file belongs to the room
# with the longest name that fits; a folder's line does not include the rooms inside it.
ARROWS: dict[str, set[str] | None] = {
    "__init__": {"config", "inference", "run.exits"},
    "__main__": {"main"},
    "main": {"config", "door", "run.cluster", "run.files", "train", "commands", "assemble"},
    "door": {"config", "run.exits", "run.memory"},
    "train": EVERYTHING,
    "commands": EVERYTHING,
    "commands.hlo": set(),
    "bench": EVERYTHING,
    "assemble": {
        *("step", "models", "nn", "sharding", "optim", "data", "masking", "open_sources"),
        *("evals", "initial", "config", "run.profile", "run.console", "cache"),
    },
    "open_sources": {"data", "data.lerobot", "data.tools", "run.console"},
    "config": {"models", "data", "plugins", "run.files"},
    "plugins": set(),
    "step": {"models", "nn", "sharding"},
    "sharding": set(),
    "optim": set(),
    "types": set(),
    "arrays": set(),
    "errors": set(),
    "hub": set(),
    "initial": {"weights", "run.saved", "run.files", "step", "models"},
    "inference": {
        *("actor", "arrays", "weights", "models", "nn", "sharding", "data.media", "planning"),
        *("features", "data.lerobot"),
    },
    "actor": {"arrays", "models", "nn", "planning"},
    "serve": {"door", "inference", "envs", "data.media"},
    "encode": {"door", "inference"},
    "envs": {"plugins"},
    "run": set(),
    "run.checkpoint": {
        *("step", "run.saved", "run.manifest", "run.console", "run.coordination", "run.disk"),
        "run.files",
    },
    "features": {
        *("sharding", "step", "models", "nn", "data", "data.media", "data.tools", "run.console"),
        "run.files",
    },
    "cache": {"sharding", "data", "run.console"},
    "run.saved": {"step", "run.manifest", "run.console", "run.disk", "run.files"},
    "run.disk": set(),
    "run.exits": {"run.private"},
    "run.files": set(),
    "run.memory": {"run.jaxprs"},
    "run.jaxprs": set(),
    "run.manifest": {"run.files"},
    "run.console": {"run.exits"},
    "run.private": set(),
    "run.coordination": {"run.private"},
    "run.cluster": {"run.private", "run.peers", "run.exits"},
    "run.peers": {"run.coordination", "run.files", "run.exits"},
    "run.agree": {
        "run.console",
        "run.coordination",
        "run.files",
        "run.exits",
        "data",
        "__init__",
    },
    "run.signals": {"run.coordination", "run.console", "run.exits", "data"},
    "run.watchdog": {"run.coordination", "run.peers", "run.exits"},
    "run.clock": {"run.console", "run.files"},
    "run.guard": {"run.console"},
    "run.late": set(),
    "run.owner": {"run.agree", "run.console", "run.coordination", "run.files"},
    "run.profile": {"run.console"},
    "run.summary": {"run.console", "run.reporter", "sharding"},
    "run.metrics": set(),
    "run.reporter": {"run.metrics", "run.console", "run.exits", "run.files"},
    "nn": {"nn.kernels"},
    "nn.kernels": set(),
    "models": {"nn", "nn.kernels", "plugins"},
    "masking": {"plugins"},
    "planning": {"models", "plugins"},
    "data": {"masking", "data.media", "plugins"},
    "data.media": set(),
    "data.lerobot": {"data", "data.media", "hub"},
    "data.tools": {"data", "data.media", "data.lerobot", "envs", "run.files"},
    "evals": {
        *("actor", "envs", "data.media"),
        "arrays",
        "models",
        "planning",
        "nn",
        "step",
        "sharding",
        "optim",
        "plugins",
        "run.metrics",
        "run.console",
        "run.files",
    },
    "weights": {"models", "nn", "hub", "run.saved", "run.files"},
    "viz": {"data", "masking", "inference", "sharding", "evals", "step", "run.files"},
}
OPTIONAL = {"torch", "torchvision", "tensorflow", "transformers", "lerobot", "matplotlib"} | {
    *("stable_worldmodel", "gym_pusht", "gym_aloha", "gymnasium", "pymunk", "dm_control"),
}
LOADS_JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
SEES_CONFIG = {"main", "door", "train", "commands", "assemble", "open_sources", "config"}
RUNS_CODE = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "runpy"} | {
    *("_pickle", "pickle5", "jsonpickle", "builtins", "code", "codeop", "pty", "imp"),
}
EVALUATORS = {"eval", "exec", "compile", "__builtins__", "breakpoint"}
SHELLS = {"system", "popen", "getoutput", "getstatusoutput", "create_subprocess_shell"}
UNPICKLERS = {"read_pickle", "unsafe_load", "full_load", "UnsafeLoader", "FullLoader"}
# An argument by which a function runs no code that it finds, and the only value that it may have.
SAFE = {"allow_pickle": False, "weights_only": True, "shell": False, "trust_remote_code": False}
# Modules imported by a name that is computed: rooms of wmjax, and loggers named in the source.
IMPORTS_BY_NAME = {"wmjax/__init__.py", "wmjax/plugins.py", "wmjax/run/reporter.py"}
# All others use run.files.to_json, which is strict. A copy of a dataset keeps the JSON it had.
WRITES_JSON = {"wmjax/run/files.py", "wmjax/data/tools/transcode.py"}

FILES = [
    str(path.relative_to(ROOT))
    for folder in ("wmjax", "configs")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def imports(path, tree):
    """Yield (line, module, eager) of every import; eager ones run with the module itself."""
    package = Path(path).parent.parts

    def visit(node, eager):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, eager
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}", eager
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        for child in ast.iter_child_nodes(node):
            yield from visit(child, eager and not lazy)

    yield from visit(tree, True)


def within(module, roots):
    """Say whether a module is one of `roots` or lies in one."""
    return any(module == root or module.startswith(f"{root}.") for root in roots)


def room_of(module):
    """Return the room of a module of wmjax, "wmjax.data.media.video" say; None: it has none."""
    names = module.removeprefix("wmjax.").split(".")
    prefixes = (".".join(names[:size]) for size in range(len(names), 0, -1))
    return next((prefix for prefix in prefixes if prefix in ARROWS), None)


def module_of(path):
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def wrong_imports(path, tree):
    """Yield (line, what) of every import that crosses an arrow."""
    package, *rest = Path(path).with_suffix("").parts
    room = room_of(module_of(path) if rest != ["__init__"] else "wmjax.__init__")
    door = rest[-1] == "__main__"
    host = rest[0] in {"data", "masking"}
    for line, module, eager in imports(path, tree):
        if package == "configs":
            if not within(module, {"ml_collections", "wmjax.config"}):
                yield line, f"configs hold values only and import {module}"
            continue
        other = room_of(module) if module.startswith("wmjax.") else None
        allowed = EVERYTHING if door else ARROWS[room]
        if (other == "main" and room != "__main__") or (
            other is not None
            and allowed is not EVERYTHING
            and other not in {room, "types", "errors", *allowed}
        ):
            yield line, f"{room} may not import wmjax.{other}"
        if eager and within(module, OPTIONAL):
            yield line, f"{module} is optional: import it inside a function"
        if eager and (host or room == "__init__") and within(module, LOADS_JAX | {"wmjax.types"}):
            yield line, f"{room} may not load jax with the module, as {module} does"
        if not eager and host and rest != ["data", "pipeline"] and within(module, LOADS_JAX):
            yield line, f"in data and masking only data/pipeline.py may use {module}"
        if within(module, {"ml_collections"}) and room not in SEES_CONFIG and not door:
            yield line, f"{room} takes keyword arguments, not a ConfigDict"
        # What a worker process loads, its own parent has written: never a file.
        if within(module, RUNS_CODE) and (path, module) != ("wmjax/data/workers.py", "pickle"):
            yield line, f"{module} runs code found in data"


def wrong_calls(path, tree):
    """Yield (line, what) of every call that runs code found in data, or writes loose JSON."""
    for node in ast.walk(tree):
        match node:
            # By any name that it is given: the function itself may not be mentioned.
            case ast.Name(id=name) if name in EVALUATORS:
                yield node.lineno, f"{name}() runs code found in data"
            case ast.Name(id="__import__") | ast.Attribute(attr="import_module" | "__import__") if (
                path not in IMPORTS_BY_NAME
            ):
                yield node.lineno, "import by name: wanted a plain import"
            case ast.Attribute(value=ast.Name(id="json"), attr="dump" | "dumps") if (
                path not in WRITES_JSON
            ):
                yield node.lineno, "json writes a bare NaN: use run.files.to_json"
            case ast.Attribute(attr="exec_module") if path != "wmjax/config.py":
                yield node.lineno, "only config.py executes a file"
            case ast.Attribute(attr=name) if name in SHELLS | UNPICKLERS:
                yield node.lineno, f"{name} runs code found in data"
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=name), *_]) if (
                name in EVALUATORS | {"exec_module", "__import__"}
            ):
                yield node.lineno, f"{name!r}: a function that runs code, looked up by its name"
            case ast.keyword(arg=name, value=value) if name in SAFE:
                if not (isinstance(value, ast.Constant) and value.value is SAFE[name]):
                    yield value.lineno, f"{name}={ast.unparse(value)} may run code found in data"
            # In a dict, which ** hands on.
            case ast.Constant(value=str(name)) if name in SAFE:
                yield node.lineno, f"{name!r}: wanted as a plain argument, {name}={SAFE[name]}"
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="torch"), attr="load"), keywords=given
            ):
                if "weights_only" not in {keyword.arg for keyword in given}:
                    yield node.lineno, "torch.load: wanted weights_only=True, said"


def offences(path, source):
    """Name what a file may not do, one `file:line: what` for each."""
    tree = ast.parse(source)
    module = module_of(path)
    if module.startswith("wmjax.") and room_of(module) is None:
        return [f"{path}:1: {module} has no line in ARROWS"]
    found = [*wrong_imports(path, tree), *wrong_calls(path, tree)]
    if not ast.get_docstring(tree):
        found.append((1, "no docstring says what this room is"))
    return [f"{path}:{line}: {what}" for line, what in sorted(found)]


@pytest.mark.parametrize("path", FILES)
def test_a_file_keeps_the_arrows(path):
    assert not offences(path, (ROOT / path).read_text())


@pytest.mark.parametrize(
    ("path", "offender", "what"),
    [
        ("wmjax/models/x.py", "from wmjax.data import windows", "models may not import wmjax.data"),
        ("wmjax/models/x.py", "from wmjax import sharding", "models may not import wmjax.sharding"),
        ("wmjax/models/x.py", "from ..step import f", "models may not import wmjax.step"),
        ("wmjax/nn/x.py", "from wmjax.models import base", "nn may not import wmjax.models"),
        ("wmjax/nn/kernels/x.py", "from wmjax.nn import norm", "kernels may not import wmjax.nn"),
        (
            "wmjax/data/media/x.py",
            "from wmjax.data.lerobot import LeRobotSource",
            "data.media may not import wmjax.data.lerobot",
        ),
        ("wmjax/data/x.py", "import wmjax.data.tools", "data may not import wmjax.data.tools"),
        ("wmjax/run/manifest.py", "from wmjax import step", "manifest may not import wmjax.step"),
        ("wmjax/models/x.py", "def f():\n  import wmjax.config", "may not import wmjax.config"),
        ("wmjax/models/x.py", "import ml_collections", "not a ConfigDict"),
        ("wmjax/data/x.py", "import jax.numpy as jnp", "may not load jax"),
        ("wmjax/data/x.py", "from wmjax.types import Array", "may not load jax"),
        ("wmjax/data/x.py", "if True:\n  import jax", "may not load jax"),
        ("wmjax/data/x.py", "def f():\n  import jax", "only data/pipeline.py may use jax"),
        ("wmjax/data/pipeline.py", "import jax", "may not load jax"),
        ("wmjax/data/x.py", "from wmjax.models import base", "may not import wmjax.models"),
        ("wmjax/masking/x.py", "from wmjax.data import windows", "may not import wmjax.data"),
        ("wmjax/step.py", "from wmjax.train import f", "step may not import wmjax.train"),
        ("wmjax/train.py", "from wmjax.main import cli", "train may not import wmjax.main"),
        ("wmjax/weights/x.py", "import torch", "torch is optional"),
        ("wmjax/run/metrics.py", "try:\n  import tensorflow as tf\nexcept E: ...", "is optional"),
        ("wmjax/__init__.py", "import jax", "may not load jax"),
        ("wmjax/weights/x.py", "import pickle", "pickle runs code"),
        ("wmjax/data/x.py", "from pickle import loads", "pickle.loads runs code"),
        ("wmjax/data/workers.py", "import marshal", "marshal runs code"),
        ("wmjax/config.py", "x = eval('1')", "eval() runs code"),
        ("wmjax/train.py", "loader.exec_module(m)", "only config.py executes"),
        ("wmjax/weights/x.py", "torch.load(p, weights_only=False)", "weights_only=False may run"),
        ("wmjax/weights/x.py", "torch.load(p)", "wanted weights_only=True"),
        ("wmjax/weights/x.py", "torch.load(p, weights_only=safe)", "weights_only=safe may run"),
        (
            "wmjax/weights/x.py",
            "np.load(p, allow_pickle=not safe)",
            "allow_pickle=not safe may run",
        ),
        (
            "wmjax/weights/x.py",
            "np.load(p, **{'allow_pickle': True})",
            "wanted as a plain argument",
        ),
        ("wmjax/data/x.py", "run = exec", "exec() runs code"),
        ("wmjax/data/x.py", "getattr(x, 'eval')(t)", "looked up by its name"),
        ("wmjax/data/x.py", "from builtins import eval as e", "builtins.eval runs code"),
        ("wmjax/data/x.py", "__builtins__['ev' + 'al'](t)", "__builtins__() runs code"),
        ("wmjax/data/x.py", "__import__('pic' + 'kle')", "import by name"),
        ("wmjax/data/x.py", "importlib.import_module(n)", "import by name"),
        ("wmjax/data/x.py", "from _pickle import loads", "_pickle.loads runs code"),
        ("wmjax/data/x.py", "pd.read_pickle(p)", "read_pickle runs code"),
        ("wmjax/config.py", "yaml.load(t, yaml.UnsafeLoader)", "UnsafeLoader runs code"),
        ("wmjax/train.py", "os.system(t)", "system runs code"),
        ("wmjax/train.py", "subprocess.run(t, shell=True)", "shell=True may run"),
        ("wmjax/train.py", "json.dumps(row)", "use run.files.to_json"),
        ("wmjax/cupboard/x.py", "import os", "has no line in ARROWS"),
        ("configs/x.py", "import jax", "values only"),
        ("wmjax/step.py", None, "no docstring"),
    ],
)
def test_an_offender_is_named_with_its_line(path, offender, what):
    source = f'"""Room."""\n\n{offender}\n' if offender else "import os\n"
    (found,) = offences(path, source)
    line = 1 if offender is None or "ARROWS" in what else 3 + offender.count("\n  ")
    assert found.startswith(f"{path}:{line}: ")
    assert what in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("wmjax/data/pipeline.py", "def f():\n  import jax\n  from wmjax.types import Array"),
        ("wmjax/data/x.py", "if TYPE_CHECKING:\n  from wmjax.types import Array"),
        ("wmjax/data/workers.py", "import pickle"),
        ("wmjax/data/__main__.py", "from wmjax import config\nimport ml_collections"),
        ("wmjax/weights/x.py", "def f():\n  import torch\n  torch.load(p, weights_only=True)"),
        ("wmjax/config.py", "from wmjax import __version__\nloader.exec_module(m)"),
        ("configs/x.py", "import ml_collections\nfrom wmjax.config import load"),
    ],
)
def test_what_is_allowed_passes(path, source):
    assert not offences(path, f'"""Room."""\n{source}\n')


def test_rooms_for_worker_processes_load_no_jax():
    """Imports that are fine one by one may still load jax through a third party."""
    rooms = [
        module_of(path)
        for path in FILES
        if path.startswith(("wmjax/__init__", "wmjax/masking/", "wmjax/data/"))
        # grain itself imports jax; a door runs when it is imported.
        and not path.endswith(("data/pipeline.py", "__main__.py"))
    ]
    code = (
        f"import sys, {', '.join(rooms)}\n"
        f"print(sorted(set(sys.modules) & {OPTIONAL | LOADS_JAX!r}))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (child.stdout, child.stderr) == ("[]\n", "")
