"""`lora-gpt2 serve`: a local page on which adapters are tried by hand."""
