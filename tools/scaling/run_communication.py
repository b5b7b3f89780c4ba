"""Measure the communication cost of a step, against the same processes without communication and a bare all-reduce.

python tools/scaling/run_communication.py [--ranks 2,4,8] [--rounds 9] [--size 64] [--micro-batch 2] [--precision auto]
                                           [--json FILE]

The command starts that many processes on this machine, each a rank with the real engine. They use gloo over the loopback, or
NCCL if each has a GPU. Each round runs a step, the same step with 4 bytes instead of each all-reduce, the same step with nothing
sent ("alone"), and a bare all-reduce of a buffer like the gradient. The command prints the bytes sent, medians and spread of the
rounds, (step - alone) / bare (limit 1.2), and how much of it is waiting for slower ranks. On a GPU a ratio below 1 means that
part of the all-reduce overlaps with the backward pass.
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
    results = [int(item) if item.isdigit() else 0 for item in text.split(",")]
    if min(results) < 2:
        raise UserError(f"--ranks {text}: must be numbers of at least 2, with commas; write for example --ranks 2,4,8")
    return results


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
    results = communication.measure(job, ranks, rounds=options.rounds, log=lambda line: print(line, flush=True))
    for row in results:
        sizes = f"{row['gradient_bytes'] / 1e6:.1f} MB ({row['gradient_type']}), {row['vector_bytes'] / 1e6:.2f} MB"
        comparison = "at most" if row["ratio"]["median"] <= communication.MOST else "MORE THAN"
        print(f"{row['ranks']} ranks: {sizes}; {comparison} {communication.MOST} of a bare all-reduce")
    if options.json:
        what = {"job": job.__dict__, "rounds": options.rounds, "hardware": hardware, "versions": versions}
        options.json.write_text(json.dumps(what | {"by_ranks": results}, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ranks", default="2,4,8", help="numbers of ranks to measure, one after the other (default 2,4,8)"
    )
    parser.add_argument("--rounds", type=int, default=9, help="number of rounds (default 9)")
    parser.add_argument("--size", type=int, default=64, help="image size in pixels (default 64)")
    parser.add_argument("--micro-batch", type=int, default=2, help="radiographs per rank (default 2)")
    parser.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="precision of training, as in a recipe (default auto)",
    )
    parser.add_argument(
        "--architecture", default="densenet169", help="densenet169, densenet121 or tiny (default densenet169)"
    )
    parser.add_argument("--json", type=Path, help="write the numbers to this JSON file")
    try:
        measure(parser.parse_args())
    except (UserError, RunError) as error:
        print(f"run_communication.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
