"""Generate: decode a split with beam search and score it, composed by Hydra from configs/."""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lora_gpt2 import settings
from lora_gpt2.files import locked

settings.register()


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="generate")
def main(cfg: DictConfig) -> None:
    """Runs the experiment."""
    resolved = settings.resolve(cfg, settings.GenerateSettings)
    from lora_gpt2 import experiment  # here, so that a wrong setting is reported before torch is loaded

    folder = Path(HydraConfig.get().runtime.output_dir)
    with settings.user_errors(), locked(folder):
        experiment.generate(resolved, folder)


if __name__ == "__main__":
    with settings.told_in_a_line("generate"):
        main()
