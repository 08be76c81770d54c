"""`@ts.distributed` on real ranks, against the whole tensors in one process."""

import torch

import tessera as ts
from tests.dist import ranks


def test_the_documents_norm():
    results = ts.dist.spawn(ranks.norms, 2, 3)
    parts = [ranks.inputs(3, r, (2, 3, 4)) for r in range(2)]
    x = torch.cat(parts, -1).double().requires_grad_()
    weight = torch.cat([ranks.inputs(4, r, (4,)) for r in range(2)]).double().requires_grad_()
    y = torch.nn.functional.rms_norm(x, (8,), weight, 1e-6)
    (y * torch.cat([ranks.inputs(5, r, (2, 3, 4)) for r in range(2)], -1)).sum().backward()
    for name, whole in (("y", y.detach()), ("x", x.grad), ("weight", weight.grad)):
        found = torch.cat([result[name] for result in results], -1)
        torch.testing.assert_close(found.double(), whole, rtol=1e-5, atol=1e-5)
    for result in results:
        assert torch.equal(result["total"], sum(parts)) and torch.equal(result["by_name"], sum(parts))
