"""Bounds-checked readers of files from outside: GGUF, safetensors, JSON.

Every reader checks counts, lengths and offsets against the size of the file before it allocates,
and raises FileFormatError for anything damaged. `models` and `data` build on this layer; it imports
nothing of Tessera but errors and types.
"""
