"""Check that training in a group of one process gives the weights of training without a group.

    python benchmarks/speed/ddp.py --store STORE --copies COPIES [--device cuda] [--width 1]
        [--size 112] [--batch-size 64] [--steps 5] [--json FILE]

A smoke test of DistributedDataParallel on one device (NCCL on a GPU, gloo on a CPU): the same steps
from the same weights, with and without it, and the largest difference of a weight.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from measuring import write_json
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from training_steps import Trainer

from distinit.pipeline.common.devices import resolve_device
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.training.loop_options import LoopOptions


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", required=True)
    parser.add_argument("--copies")
    parser.add_argument("--student", default="r2plus1d_18")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    device, store = resolve_device(args.device), TargetStore.open(args.store)
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True
    options = LoopOptions(batch_size=args.batch_size, device=args.device, clip_norm=5)
    alone = Trainer(args, store, options, args.workers)
    grouped = copy.deepcopy(alone.model)
    first = {name: value.clone() for name, value in alone.model.state_dict().items()}
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": os.environ.get("MASTER_PORT", "29511"),
    }
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=0, world_size=1)
    try:
        for _ in range(args.steps):
            alone.step(alone.batch)
        trained = alone.model
        alone.model = DistributedDataParallel(
            grouped, device_ids=[device] if device.type == "cuda" else None
        )
        alone.optimizer = torch.optim.SGD(
            grouped.parameters(), lr=1e-3, momentum=0.9, nesterov=True
        )
        for _ in range(args.steps):
            alone.step(alone.batch)
    finally:
        dist.destroy_process_group()
    weights = [dict(model.named_parameters()) for model in (trained, grouped)]
    difference, change = (largest_difference(weights[0], other) for other in (weights[1], first))
    print(
        f"{backend}: {args.steps} steps change a weight by up to {change:.3g}; with and without a "
        f"group the weights differ by up to {difference:.3g}"
    )
    record = {"backend": backend, "largest_change": change, "largest_difference": difference}
    write_json(args.json, device, [record])
    if not change > 1e-6 or difference > 1e-2 * change:
        raise SystemExit("the weights with and without a group differ")


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the largest absolute difference of the weights of a from those of b by name."""
    return max(float((value - b[name]).abs().max()) for name, value in a.items())


if __name__ == "__main__":
    main()
