"""Train: one experiment, composed by Hydra from configs/ and conf_presets/."""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lora_gpt2 import settings

settings.register()


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Runs the experiment; its lowest validation loss is what a sweep compares."""
    resolved = settings.resolve(cfg, settings.TrainSettings)
    from lora_gpt2 import experiment  # here, so that a wrong setting is reported before torch is loaded

    with settings.user_errors():
        return experiment.train(resolved, Path(HydraConfig.get().runtime.output_dir))


if __name__ == "__main__":
    main()
