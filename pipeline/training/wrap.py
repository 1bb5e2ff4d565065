"""From a model to what is trained: on its device, compiled, its gradients shared between processes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .device import place
from .options import LoopOptions
from .ranks import Ranks


def wrap(model: nn.Module, options: LoopOptions, device: torch.device, ranks: Ranks) -> nn.Module:
    """`model` itself, changed in place, or the DistributedDataParallel around it where ranks train together.

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
