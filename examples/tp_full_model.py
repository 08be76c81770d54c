"""Generate with a model that several ranks share; each loads only its own part.

Run: tessera launch --nproc 2 examples/tp_full_model.py [PATH]    (a model folder or a GGUF file; default SmolLM2)
"""

import sys

import tessera as ts


def main(path: str) -> None:
    ts.init()
    mesh = ts.dist.mesh()
    model = ts.dist.load_model(path, mesh=mesh)
    generator = ts.SPMDGeneration.build(
        model, ts.load_tokenizer(path), {"do_sample": False, "max_new_tokens": 12}, batch_size=1, max_length=512)
    for piece in generator.stream("The capital of France is"):
        if mesh.rank == 0:  # every rank has the text; one prints it
            print(piece, end="", flush=True)
    if mesh.rank == 0:
        held = sum(p.nbytes for p in model.parameters())
        print(f"\n{mesh}: rank 0 holds {held / 4 / model.config.n_params:.0%} of the weights")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(ts.hub.smollm2()))
