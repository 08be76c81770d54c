"""Put a conversation into the form that a chat model was trained on, and let it answer."""

import tessera as ts

path = ts.hub.smollm2()
tokenizer = ts.load_tokenizer(path)

messages = [
    {"role": "system", "content": "Answer in one sentence."},
    {"role": "user", "content": "What color is the sky?"},
]
print(tokenizer.apply_chat_template(messages, tokenize=False))

engine = ts.GPTInference(ts.load_model(path))
ids = tokenizer.apply_chat_template(messages)
for piece in engine.stream(ids, 12, do_sample=False, tokenizer=tokenizer):
    print(piece, end="", flush=True)
print()
