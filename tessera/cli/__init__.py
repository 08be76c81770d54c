"""The command `tessera`: generate, chat, info, convert, plan, check, launch, env.

In: the command line. Out: text or JSON on stdout, one line `error: ...` on stderr, an exit code. Nothing
heavy is imported before a command runs, so that `tessera --help` is quick.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; see `cli.app.run`."""
    from tessera.cli.app import run

    return run(arguments)
