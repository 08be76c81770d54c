"""Sizes as keys: equal ones are equal and hash alike, wherever they were made."""

import copy
import os
import pickle
import subprocess
import sys

from tessera.kernel.dims import Dim


def size() -> Dim:
    return (Dim.of("B*S+1").ceildiv(3) * Dim.of("D/2")).minimum(Dim.of("S")).maximum(Dim.atom("%12"))


def test_equal_sizes_hash_alike():
    first, second = size(), size()
    assert first is not second and first == second and hash(first) == hash(second) and str(first) == str(second)
    assert first.atoms == {"B", "S", "D/2", "%12"}
    assert first != first + 1 and len({first, second, first + 1}) == 2


def test_a_copy_is_the_size_itself():
    assert copy.deepcopy([size()])[0] == size()
    one = size()
    assert copy.deepcopy(one) is one


def test_a_size_from_another_process_hashes_as_one_made_here():
    """Texts hash differently there."""
    script = "import pickle, sys; from tests.kernel.test_dims import size; d = size(); hash(d); str(d); " \
        "sys.stdout.buffer.write(pickle.dumps(d))"
    data = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": "7"}, check=True,
                          stdout=subprocess.PIPE).stdout
    assert {size(): 1}[pickle.loads(data)] == 1
