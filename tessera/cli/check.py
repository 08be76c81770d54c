"""`tessera check`: the shapes of every ts.function and ts.kernel in files and modules, without data.

In: paths and module names; their code is imported and run on tensors without data. Out: errors as a compiler prints
them, or JSON, on stdout; exit code 1 when there is an error. Called by cli.app.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence

from tessera.function.checker import Finding, Report, check


def run(targets: Sequence[str], *, as_json: bool) -> int:
    """Check and print.

    Returns:
        1 when there is an error, else 0.

    Raises:
        NotFoundError: a target is neither a file nor a module.
    """
    with contextlib.redirect_stdout(sys.stderr):  # what the code itself prints
        reports = [check(target) for target in targets]
    report = Report(functions=sum(r.functions for r in reports), kernels=sum(r.kernels for r in reports),
                    findings=[f for r in reports for f in r.findings])
    if as_json:
        print(json.dumps({
            "functions": report.functions, "kernels": report.kernels,
            "errors": [_as_json(f) for f in report.errors],
            "notes": [_as_json(f) for f in report.findings if not f.is_error]}))
    else:
        for finding in report.findings:
            print("\n".join(_lines(finding)))
        print(f"checked {_count(report.functions, 'function')} and {_count(report.kernels, 'kernel')}: "
              f"{_count(len(report.errors), 'error')}")
    return 1 if report.errors else 0


def _lines(finding: Finding) -> list[str]:
    place = f"{finding.file}:{finding.line}" + (f":{finding.column}" if finding.column else "")
    if not finding.is_error:
        return [f"{place}: note: {finding.message}"]
    lines = [f"{place}: error: {finding.message}"]
    source = finding.source
    if source.strip():
        lead = len(source) - len(source.lstrip())
        lines.append(f"    {source[lead:]}")
        if finding.column:
            width = max(1, min(finding.end_column, len(source) + 1) - finding.column)
            lines.append("    " + " " * (finding.column - 1 - lead) + "^" * width)
    return lines + [f"    note: {note}" for note in finding.notes]


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _as_json(finding: Finding) -> dict[str, object]:
    return {"file": finding.file, "line": finding.line, "column": finding.column, "end_column": finding.end_column,
            "message": finding.message, "source": finding.source, "notes": list(finding.notes)}
