"""The compiler's middle: what happens to a function between the frontend and a backend.

    frontend -> verify -> [ simplify -> parallelize -> remove dead ] -> cpu or cuda lowering

Each pass is one file and rewrites a private copy in place; the function is verified after each.
The interpreter runs what the frontend made.
"""

from __future__ import annotations

import copy
import sys

from tessera import env
from tessera.kernel.ir import Function
from tessera.kernel.passes.parallelize import BlockSizes, parallelize
from tessera.kernel.passes.simplify import remove_dead, simplify


def prepare(function: Function, choose: BlockSizes) -> Function:
    """A rewritten copy, ready for lowering: grids only, no dead code.

    Args:
        choose: the backend's block sizes for the parallel dims of a kernel without a grid.
    """
    function = copy.deepcopy(function)
    dump = "passes" in env.get("TESSERA_DUMP").split(",")
    for name, run in (("simplify", simplify), ("parallelize", lambda f: parallelize(f, choose)),
                      ("remove_dead", remove_dead)):
        run(function)
        if dump:
            print(f"; after {name}\n{function}", file=sys.stderr)
    return function
