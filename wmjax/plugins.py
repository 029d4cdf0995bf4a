"""From names of the configuration to objects: short names in wmjax, package.module:Name outside.

Naming a package imports it, which runs its code. So a name that comes from a file, such as the
configuration in a workdir, resolves inside wmjax and the packages that the caller trusts only.
"""

import importlib
from collections.abc import Collection, Mapping
from typing import Any

from wmjax.errors import UserError, suggest

ANY = ("*",)  # trust: whoever typed the name trusts its package


def package_of(reference: str) -> str:
    """Return the top-level package of package.module:Name outside wmjax; "": it is none."""
    package = reference.partition(":")[0].partition(".")[0]
    return package if ":" in reference and package != "wmjax" else ""


def check_trust(key: str, reference: str, trust: Collection[str]) -> None:
    """Raise UserError for package.module:Name of a package that is not trusted."""
    package = package_of(reference)
    if package and "*" not in trust and package not in trust:
        raise UserError(
            f"{key}={reference!r}: comes from a file, and importing {package} runs its code\n"
            f"if you trust it, say so: trust=({package!r},), or --trust={package}"
        )


def resolve(key: str, value: Any, built_in: Mapping[str, str], trust: Collection[str] = ANY) -> Any:
    """Return what the value of a key names.

    built_in: short name -> package.module:Name. trust: top-level packages that may be imported
    besides wmjax. Raises UserError, which names the key, for anything that cannot be found.
    """
    reference = built_in.get(value, value) if isinstance(value, str) else ""
    module_name, colon, name = reference.partition(":")
    if not (colon and module_name and name):
        choices = ", ".join([*built_in, "package.module:Name"])
        near = suggest(str(value), list(built_in))
        raise UserError(f"{key}={value!r}: unknown{near}; choices: {choices}")
    check_trust(key, reference, trust)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and lacks one of its own imports
        raise UserError(
            f"{key}={value!r}: there is no module {error.name}; install its package, or add its "
            "folder to PYTHONPATH"
        ) from None
    try:
        return getattr(module, name)
    except AttributeError:
        public = [each for each in vars(module) if not each.startswith("_")]
        raise UserError(
            f"{key}={value!r}: {module_name} has no {name}{suggest(name, public)}"
        ) from None
