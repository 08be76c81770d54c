"""The sampling options, and that a seed fixes the text whatever else is in the batch."""

import torch

import tessera as ts

path = ts.hub.smollm2()
tokenizer = ts.load_tokenizer(path)
engine = ts.GPTInference(ts.load_model(path))
ids = torch.tensor([tokenizer.encode("My favourite animal is the")])


def show(name: str, **options: object) -> list[int]:
    result = engine.generate_detailed(ids, 6, tokenizer=tokenizer, **options)
    print(f"{name:28} {result.texts[0]!r}")
    return result.new_tokens[0]


show("greedy", do_sample=False)
first = show("top_p=0.9, seed=1", top_k=None, top_p=0.9, seed=1)
again = show("the same", top_k=None, top_p=0.9, seed=1)
show("min_p=0.1, temperature=1.5", top_k=None, top_p=None, min_p=0.1, temperature=1.5, seed=1)
show("four beams", num_beams=4, do_sample=False)

batch = engine.generate_detailed(ids.repeat(3, 1), 6, top_k=None, top_p=0.9, seed=1)
print("same seed, same text:", first == again == batch.new_tokens[0])
