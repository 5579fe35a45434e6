"""Train: one experiment, composed by Hydra from configs/ and conf_presets/."""

import hydra
from omegaconf import DictConfig

from lora_gpt2 import jobs, settings

settings.register()


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Runs the experiment; its lowest validation loss is what a sweep compares."""
    return jobs.launch(cfg)


if __name__ == "__main__":
    main()
