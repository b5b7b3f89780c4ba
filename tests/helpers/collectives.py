"""Print the communication of one training step as JSON, recorded by torch's profiler. Run it as a rank of torchrun.

ARCHITECTURE PRECISION ZERO_STAGE -> [[operation, [shape], type], ...] in order
"""

import json
import os
import sys

import torch

from mura_dist.core import config
from mura_dist.data.loaders.loader import Batch
from mura_dist.distributed import process_group
from mura_dist.models import densenet
from mura_dist.training.engine import Engine


def main() -> None:
    architecture, precision, stage = sys.argv[1:]
    torch.set_num_threads(1)
    with process_group.join(120) as world:
        values = {
            "shards": "",
            "run": "",
            "architecture": architecture,
            "precision": precision,
            "zero_stage": int(stage),
        }
        settings = config.check(values | {"global_batch": 4 * world.size, "micro_batch": 2}, "test")
        engine, weight = Engine(densenet.build(architecture), settings, world), torch.ones(2)
        image = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
        two = [Batch(image, weight, weight, weight.long(), weight.bool())] * 2
        engine.step(two, 1e-4)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            assert engine.step(two, 1e-4).applied
        events = profile.profiler.kineto_results.events()
        sent = [
            [event.name(), event.shapes()[0], event.dtypes()[0]] for event in events if event.name().startswith("gloo:")
        ]
        calls = sum(event.name().startswith("c10d::") for event in events)
        if world.is_first:
            print(json.dumps({"sent": sent, "calls": calls}), flush=True)
        world.barrier()
    os._exit(0)


main()
