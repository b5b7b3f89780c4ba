"""What a step pays for being one of many, against the same processes without communication and a bare all-reduce.

python tools/scaling/run_communication.py [--ranks 2,4,8] [--rounds 9] [--size 64] [--micro-batch 2] [--precision auto]
                                           [--json FILE]

Starts that many processes on this machine (gloo over its own loopback; NCCL where each has a GPU), each a rank with the real
engine and DenseNet-169; in turn a step, the same with 4 bytes instead of each all-reduce, the same with nothing sent, a bare
all-reduce of a buffer like the gradient. Prints the bytes that travel, medians and spread of the rounds, and
(step - alone) / bare, which is to be at most 1.2, and what of it is waiting for the slower ones. What it is less than 1 on a
GPU is what hides behind the backward pass.
"""

import argparse
import json
import sys
from pathlib import Path

import communication
from fleet import Job

from mura_dist.bench import runner
from mura_dist.core.errors import RunError, UserError


def numbers(text: str) -> list[int]:
    found = [int(part) if part.isdigit() else 0 for part in text.split(",")]
    if min(found) < 2:
        raise UserError(f"--ranks {text}: must be numbers of at least 2, with commas; write for example --ranks 2,4,8")
    return found


def measure(options: argparse.Namespace) -> None:
    ranks = numbers(options.ranks)
    for name, least in (("rounds", 1), ("size", 32), ("micro_batch", 2)):
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least {least}")
    from mura_dist.distributed import process_group  # torch, which takes seconds to import

    precision = (
        ("bf16" if process_group.supports_bf16() else "fp32") if options.precision == "auto" else options.precision
    )
    job = Job(options.architecture, options.size, options.micro_batch, 1, precision)
    hardware, versions = runner.hardware(), runner.versions()
    print(", ".join(f"{key} {value}" for key, value in {**hardware, **versions}.items()))
    found = communication.measure(job, ranks, rounds=options.rounds, log=lambda line: print(line, flush=True))
    for one in found:
        sizes = f"{one['gradient_bytes'] / 1e6:.1f} MB ({one['gradient_type']}), {one['vector_bytes'] / 1e6:.2f} MB"
        kept = "at most" if one["ratio"]["median"] <= communication.MOST else "MORE THAN"
        print(f"{one['ranks']} ranks: {sizes}; {kept} {communication.MOST} of a bare all-reduce")
    if options.json:
        what = {"job": job.__dict__, "rounds": options.rounds, "hardware": hardware, "versions": versions}
        options.json.write_text(json.dumps(what | {"by_ranks": found}, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,4,8", help="numbers of processes, one after the other (default 2,4,8)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each (default 9)")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side (default 64)")
    parser.add_argument("--micro-batch", type=int, default=2, help="radiographs of a rank (default 2)")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="as in a recipe")
    parser.add_argument("--architecture", default="densenet169", help="densenet169, densenet121 or tiny")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    try:
        measure(parser.parse_args())
    except (UserError, RunError) as error:
        print(f"run_communication.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
