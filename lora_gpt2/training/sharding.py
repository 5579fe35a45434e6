"""A frozen base in parts, one on each device; what trains is on all of them."""

from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from lora_gpt2.errors import UserError
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.training.module import LanguageModeling


class ShardedBase(DDPStrategy):
    """DDP for an adapter, over blocks that FSDP2 keeps in parts: one is whole only while it runs.

    Each device holds its part of the frozen blocks, the tables and the adapter. The numbers are DDP's.
    """

    def model_to_device(self) -> None:
        """Block by block, so that no device ever holds the whole. Raises UserError without a frozen base."""
        module = self.lightning_module
        if module is not None and module.trainer.state.fn is TrainerFn.FITTING:
            if not isinstance(module, LanguageModeling) or not module.model.lora_layers():
                what = "shards the frozen base of one adapter, and this run has none or several"
                raise UserError("trainer.strategy", what, "use trainer=ddp")
            shard(module.model, self.root_device.type, self.world_size)
        super().model_to_device()

    def configure_ddp(self) -> None:
        module = self.lightning_module
        assert module is not None
        frozen = [name for name, one in module.named_parameters() if not one.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
            module, frozen
        )
        super().configure_ddp()


def shard(model: GPT2LMModel, device: str, devices: int) -> None:
    """Splits the frozen weights of each block over all processes, `devices` of a type."""
    mesh, body = init_device_mesh(device, (devices,)), model.transformer
    for block in body.h:
        fully_shard(block, mesh=mesh, ignored_params=_trained(block))
    tables: set[nn.Parameter] = {one for name, one in body.named_parameters() if not name.startswith("h.")}
    fully_shard(body, mesh=mesh, ignored_params=tables | _trained(body))
    register_fsdp_forward_method(body, "hidden_states")  # no-one calls forward
    model.sharded = True


def _trained(module: nn.Module) -> set[nn.Parameter]:
    return {one for one in module.parameters() if one.requires_grad}
