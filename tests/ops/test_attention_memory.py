"""Memory of attention, forward and backward, is linear in the sequence: measured by the operating system."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
import tessera as ts

def step(length):
    q, k, v = (torch.randn(1, int(sys.argv[2]), length, 16, requires_grad=True) for _ in range(3))
    FUNCTION(q, k, v, is_causal=True).sum().backward()

torch.set_num_threads(2)
step(300)  # compiles
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(int(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
FUNCTIONS = {"flash": "ts.ops.flash_attention", "chunked": "ts.ops.chunked_attention", "plain":
             "lambda q, k, v, is_causal: ts.ops.attention(q, k, v, is_causal=is_causal, flash=False)"}


def growth(name: str, length: int, heads: int) -> float:
    """MiB that a step at this length needs beyond a short one."""
    script = SCRIPT.replace("FUNCTION", f"({FUNCTIONS[name]})")
    command = [sys.executable, "-c", script, str(length), str(heads)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    return int(run.stdout) / 1024


@pytest.mark.parametrize("name", ["flash", "chunked"])
def test_far_less_than_the_scores(name):
    """At 4096 tokens and 2 heads the plain expression's scores, weights and their gradients are over 256 MiB."""
    assert growth(name, 4096, 2) < 64


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flash", "chunked"])
def test_linear_to_32k(name):
    """At 32768 tokens a head's scores are 4 GiB. Twice the tokens take about twice the memory."""
    half, whole = growth(name, 16384, 1), growth(name, 32768, 1)
    assert whole < 160 and whole < 2.5 * half + 16


@pytest.mark.slow
def test_the_plain_expression_holds_the_scores():
    """What the others are compared with: the measurement does see scores."""
    assert growth("plain", 4096, 2) > 256
