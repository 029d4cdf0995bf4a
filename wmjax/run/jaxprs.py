"""Costs of a traced program, from its jaxpr.

No other module reads the parameters of equations: jax documents them nowhere and renames them.
"""

import math
from typing import Any

from jax.extend import core


def executed_flop(jaxpr: Any) -> int:
    """Return the FLOP of the matrix products of a jaxpr, over all devices, with remat's repeats.

    A while loop has no known length, and counts once.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left, (out,) = equation.invars[0].aval.shape, equation.outvars
            total += 2 * out.aval.size * math.prod(left[axis] for axis in contracted)
            continue
        inner = [executed_flop(each) for each in _inside(equation)]
        if inner:
            total += _repeated(name, params) * (max(inner) if name == "cond" else sum(inner))
    return total


def largest_result(jaxpr: Any) -> int:
    """Return the bytes of the largest product, or of all that one scan stacks."""
    largest = 0
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, _inside(equation)
        made = [var.aval for var in equation.outvars] if name in ("dot_general", "scan") else []
        if name == "scan":  # what it stacks has another shape than in one turn
            (body,) = inner
            turns = zip(made, body.out_avals, strict=True)
            made = [whole for whole, one in turns if whole.shape != one.shape]
        size = sum(each.size * each.dtype.itemsize for each in made)
        largest = max(largest, size, *map(largest_result, inner))
    return largest


def _inside(equation: Any) -> list[Any]:
    """Return the jaxprs among an equation's parameters."""
    values = equation.params.values()
    each = [v for value in values for v in (value if isinstance(value, tuple | list) else [value])]
    return [value for value in each if isinstance(value, core.Jaxpr | core.ClosedJaxpr)]


def _repeated(name: str, params: dict[str, Any]) -> int:
    """Return how often the inner jaxprs of an equation run, over all devices."""
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        return params["mesh"].size
    return math.prod(params["grid_mapping"].grid) if name == "pallas_call" else 1
