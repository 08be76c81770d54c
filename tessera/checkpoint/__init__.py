"""Saving and loading of training state; and `@ts.checkpoint`, which recomputes activations.

The package itself is the decorator, which `tessera.function.recompute` defines: both uses have the same name.
"""

from __future__ import annotations

from tessera.callable import make_callable
from tessera.function.recompute import checkpoint as _checkpoint

make_callable(__name__, _checkpoint)
