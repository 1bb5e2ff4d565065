"""From a model to what is trained: on its device, compiled, its gradients and statistics shared
between processes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..common.distributed import Ranks
from .loop_options import LoopOptions
from .precision import place


def wrap(model: nn.Module, options: LoopOptions, device: torch.device, ranks: Ranks) -> nn.Module:
    """`model` itself, changed in place, or the DistributedDataParallel around it where ranks train
    together.

    The model keeps its parameters' names, so checkpoints and exports are those of one process. With
    several ranks the weights of rank 0 are everybody's from here on.
    """
    place(model, device, channels_last=options.channels_last)
    if ranks.world > 1 and options.sync_batchnorm and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if options.compile != "none":
        model.compile(mode=options.compile)
    if ranks.world == 1:
        return model
    return DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )


@torch.no_grad()
def share_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Gives every rank the buffers of rank 0, whose checkpoint it is: without synchronised
    BatchNorm each has running statistics of its own share of the last batch, for
    DistributedDataParallel copies them before a step, not after."""
    if ranks.world == 1:
        return
    of_lead = ranks.on_main(lambda: [buffer.cpu() for buffer in model.buffers()])
    for buffer, value in zip(model.buffers(), of_lead, strict=True):
        buffer.copy_(value)
