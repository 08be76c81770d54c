"""`tessera env`: the settings in force.

In: the environment. Out: a table or JSON on stdout. Called by cli.app.
"""

from __future__ import annotations

import json

from tessera import env


def run(*, as_json: bool) -> None:
    """List the variables of tessera.env: name, value in force, and meaning.

    Raises:
        InputError: a variable's text cannot be read.
    """
    values = {name: str(env.get(name)) for name in env.VARIABLES}
    if as_json:
        print(json.dumps(values))
    else:
        print_rows([(name, f"{value or '(empty)':28} {env.VARIABLES[name].doc}") for name, value in values.items()])


def print_rows(rows: list[tuple[str, str]]) -> None:
    """Names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")
