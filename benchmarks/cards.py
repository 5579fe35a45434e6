"""The sizes of the model cards that benchmarks measure."""

SIZES = {
    "gpt2.mini": {"n_embd": 256, "n_layer": 6, "n_head": 8},
    "gpt2.sm": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2.md": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2.lg": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
}
