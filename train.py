"""Train: one experiment, composed by Hydra from configs/ and conf_presets/."""

from lora_gpt2.launch import main

if __name__ == "__main__":
    main()
