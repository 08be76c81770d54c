"""Continue two prompts of different lengths in one batch, then stream a third."""

import tessera as ts

path = ts.hub.smollm2()  # or a folder with config.json and safetensors, or any GGUF file
model = ts.load_model(path, dtype="f32")
tokenizer = ts.load_tokenizer(path)
engine = ts.GPTInference(model)

prompts = tokenizer.batch(["The capital of France is", "Water is made of hydrogen and"])  # padded on the left
result = engine.generate_detailed(**prompts, max_new_tokens=8, do_sample=False, tokenizer=tokenizer)
for text, reason in zip(result.texts, result.finish_reasons):
    print(repr(text), f"(ended by {reason})")

for piece in engine.stream("One, two, three,", 8, do_sample=False, tokenizer=tokenizer):
    print(piece, end="", flush=True)
print()
