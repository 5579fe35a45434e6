"""Generate: decode a split with beam search and score it, composed by Hydra from configs/."""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from lora_gpt2 import gate
from lora_gpt2.files import first_process, locked
from lora_gpt2.settings import GenerateSettings
from lora_gpt2.signals import end_together

gate.register()


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="generate")
def main(cfg: DictConfig) -> None:
    """Runs the experiment."""
    here = HydraConfig.get()
    with gate.refused(in_sweep=here.mode is RunMode.MULTIRUN):
        resolved = gate.resolve(cfg, GenerateSettings)
        from lora_gpt2 import experiment  # here, so that a wrong setting is reported before torch is loaded

        folder = Path(here.runtime.output_dir)
        with locked(folder):
            experiment.generate(resolved, folder)


if __name__ == "__main__":
    end_together(first_process())
    with gate.told_in_a_line("generate"):
        main()
