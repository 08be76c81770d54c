"""`ts.op`: the words that the documents write transformer blocks with.

In and out: as the functions say. All of `ops`, and what a block needs of `dist`: a facade like tessera/__init__.py.
"""

from tessera.dist import reduce_scatter
from tessera.ops import *  # noqa: F403
from tessera.ops import __all__ as _operations

__all__ = [*_operations, "reduce_scatter"]
