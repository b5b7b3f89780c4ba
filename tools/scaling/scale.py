"""Predict step time, epoch time, efficiency and cost of N ranks from a measured trace and a network.

    measure   measure a trace of this machine: seconds of a step with nothing sent, seconds per sent byte -> FILE
    check     compare real runs of 2, 4 and 8 ranks in network namespaces with the prediction (Linux, root)
    predict   print the table for 1 to 256 GPUs, from a trace or an assumed speed, with data volume and cost
    planning  measure time and memory to order ten million radiographs on a rank

python tools/scaling/scale.py measure --out trace.json && python tools/scaling/scale.py check --trace trace.json --plot check.png
python tools/scaling/scale.py predict --images-per-s 600 --micro-batch 16 --plot scaling.png

Exit status: 0 done; 1 failed; 2 invalid request.
"""

import argparse
import json
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

import outlook
import planning
import scaling
import scaling_plots
import trials
from fleet import Job
from scaling import Cluster, Data, Network, Trace

from mura_dist.bench import plots, runner
from mura_dist.core.config import Settings
from mura_dist.core.errors import RunError, UserError
from mura_dist.data.shards.convert import SAMPLES_PER_SHARD

NETWORKS = ["25Gb/s:20us", "100Gb/s:10us", "400Gb/s:5us"]
LIMITS = ["none", "2Gb/s", "1Gb/s", "300Mb/s", "300Mb/s:5ms"]
RELAY = Path(__file__).parents[1] / "robustness/slow_link.py"
GPUS = "1,2,4,8,16,32,64,128,256"


def log(line: str) -> None:
    print(line, flush=True)


def numbers(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(item.isdigit() and int(item) >= 1 for item in parts):
        raise UserError(
            f"{option} {text}: must be numbers of at least 1, with commas; write for example {option} 2,4,8"
        )
    return [int(item) for item in parts]


def at_least(options: argparse.Namespace, **limits: float) -> None:
    for name, least in limits.items():
        if getattr(options, name) is not None and not getattr(options, name) >= least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least {least}")


def job_of(options: argparse.Namespace) -> Job:
    from mura_dist.distributed import process_group  # torch, which takes seconds to import

    precision = (
        ("bf16" if process_group.supports_bf16() else "fp32") if options.precision == "auto" else options.precision
    )
    return Job(options.architecture, options.size, options.micro_batch, options.micros, precision)


def provenance() -> dict[str, Any]:
    return {
        "command": "python tools/scaling/scale.py " + shlex.join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": runner.hardware(),
        "versions": runner.versions(),
    }


# ---- the commands


def measure(options: argparse.Namespace) -> None:
    at_least(options, size=32, micro_batch=2, micros=1, rounds=1)
    trace = trials.measure(job_of(options), rounds=options.rounds, provenance=provenance(), log=log)
    trace.save(options.out)
    log(f"{options.out}: {trace.gradient_bytes / 1e6:.1f} MB of gradient, {trace.fixed_bytes / 1e6:.2f} MB beside it")


def check(options: argparse.Namespace) -> None:
    at_least(options, size=32, micro_batch=2, micros=1, rounds=1)
    ranks, networks = numbers("--ranks", options.ranks), [Network.parse(text) for text in options.network or LIMITS]
    if options.plot:
        plots.check(options.plot)
    job = job_of(options)
    where = provenance()
    trace = Trace.load(options.trace) if options.trace else None
    if trace is not None:
        _same(trace, job, options.trace)
    options_of_check = {"rounds": options.rounds, "relay": RELAY, "provenance": where, "log": log}
    runs = trials.check(trace, job, ranks, networks, **options_of_check)
    worst = max(runs, key=lambda run: abs(run["error"]))
    within = sum(abs(run["error"]) <= trials.WITHIN for run in runs)
    far = f"{worst['error']:+.1%} ({worst['ranks']} ranks, {worst['network']})"
    log(f"{within} of {len(runs)} within {trials.WITHIN:.0%} of the median of {options.rounds}; the farthest {far}")
    if options.json:
        options.json.write_text(json.dumps(where | {"job": job.__dict__, "runs": runs}, indent=1) + "\n")
    if options.plot:
        title = (
            f"{job.architecture}, {job.size} px, {job.micros} x {job.micro_batch} radiographs a rank, {job.precision}, gloo, "
            f"{options.rounds} steps each\n{where['hardware']['processor']}, {where['hardware']['processors']} processors"
        )
        scaling_plots.plot_check(runs, title, options.plot)


def _same(trace: Trace, job: Job, path: Path | None) -> None:
    trace_facts = (trace.architecture, trace.size_px, trace.micro_batch, trace.precision)
    job_facts = (job.architecture, job.size, job.micro_batch, job.precision)
    if trace_facts != job_facts:
        raise UserError(
            f"--trace {path} is of {trace_facts}, the runs of {job_facts}; give the same options, or measure anew"
        )


def predict(options: argparse.Namespace) -> None:
    at_least(options, gpus_per_node=1, radiographs=1, epochs=1, micro_batch=2, spread=0, global_batch=1, tune=0)
    at_least(options, disk_mb_per_s=1, store_mb_per_s=1, images_per_s=1e-3, others=0)
    if options.plot:
        plots.check(options.plot)
    gpus = numbers("--gpus", options.gpus)
    networks = [Network.parse(text) for text in options.network or NETWORKS]
    data, trace = _data(options), _trace(options)
    inside = Network.parse(options.inside)
    where: dict[Network, Network | Cluster] = {
        network: network if trace.processors else Cluster(options.gpus_per_node, inside, network)
        for network in networks
    }
    rows = {
        network: [
            scaling.epoch(trace, number, where[network], data, global_batch=options.global_batch) for number in gpus
        ]
        for network in networks
    }
    nodes = f"{options.gpus_per_node} GPUs a node, {inside} between them; {', '.join(map(str, networks))} between nodes"
    if trace.processors:
        nodes = f"ranks share this machine's {trace.processors} processors"
    size = f"{trace.gradient_bytes / 1e6:.1f} MB of gradient"
    log(f"{trace.architecture}, {trace.precision}, micro-batches of {trace.micro_batch}; {size}")
    for line in outlook.assumptions(trace, data, nodes):
        log(f"  given: {line}")
    for network in networks:
        log("\n" + "\n".join(outlook.table(network, rows[network])))
    log("\n" + "\n".join(outlook.data_tables(data, rows[networks[0]])))
    if options.plot:
        first = trace.assumed[0] if trace.assumed else f"measured on {trace.device}"
        title = f"predicted, not measured: {trace.architecture}; {first}\n{nodes}"
        scaling_plots.plot_prediction({str(network): rows[network] for network in networks}, title, options.plot)


def _trace(options: argparse.Namespace) -> Trace:
    if (options.trace is None) == (options.images_per_s is None):
        raise UserError(
            "give either --trace FILE, measured on what you would buy, or --images-per-s X, what you take it to do"
        )
    if options.trace:
        return Trace.load(options.trace)
    weights, norms = trials.sizes("densenet169")
    facts = {"micro_batch": options.micro_batch, "precision": options.precision, "weights": weights, "norms": norms}
    return scaling.assumed(options.images_per_s, options.spread, **facts)


def _data(options: argparse.Namespace) -> Data:
    if options.tune >= 1:
        raise UserError(f"--tune {options.tune}: must be less than 1, the share of radiographs that choose")
    return Data(
        radiographs=options.radiographs,
        tune=options.tune,
        num_valid=options.others,
        bytes_each=options.bytes or scaling.sample_bytes(options.encoding, options.data_size),
        per_shard=SAMPLES_PER_SHARD,
        disk_bytes_per_s=1e6 * options.disk_mb_per_s,
        store_bytes_per_s=1e6 * options.store_mb_per_s,
        dollars_per_1000_gets=options.per_1000_gets,
        dollars_per_gb=options.per_gb,
        dollars_per_gpu_hour=options.per_gpu_hour,
        epochs=options.epochs,
    )


def plan(options: argparse.Namespace) -> None:
    at_least(options, radiographs=1, micro_batch=1)
    for ranks in numbers("--ranks", options.ranks):
        if ranks * options.micro_batch > options.radiographs:
            unit = f"--ranks {ranks} x --micro-batch {options.micro_batch}"
            raise UserError(
                f"{unit}: must be at most --radiographs {options.radiographs}; give more of them, or fewer ranks"
            )
        log(planning.format_row(planning.measure(options.radiographs, ranks, options.micro_batch)))


# ---- the words


def _of_a_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--architecture", default="densenet169", help="densenet169, densenet121 or tiny (default densenet169)"
    )
    parser.add_argument("--size", type=int, default=64, help="image size in pixels (default 64)")
    parser.add_argument("--micro-batch", type=int, default=2, help="radiographs per micro-batch (default 2)")
    parser.add_argument("--micros", type=int, default=1, help="micro-batches per step on each rank (default 1)")
    parser.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="precision of training, as in a recipe (default auto)",
    )


def parser() -> argparse.ArgumentParser:
    top_parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top_parser.add_subparsers(required=True, metavar="measure, check, predict or planning")
    command = commands.add_parser("measure", help="measure a trace of this machine")
    command.add_argument("--out", type=Path, required=True, help="JSON file to write the trace to")
    command.add_argument("--rounds", type=int, default=9, help="number of steps to measure (default 9)")
    _of_a_job(command)
    command.set_defaults(run=measure)
    command = commands.add_parser("check", help="compare real runs with the prediction")
    command.add_argument(
        "--trace", type=Path, help="trace of this machine, from `measure` (default: measured in turn with the runs)"
    )
    command.add_argument("--ranks", default="2,4,8", help="numbers of ranks (default 2,4,8)")
    command.add_argument(
        "--network",
        action="append",
        help=f"rate and latency of a link, or none; repeatable (default {' '.join(LIMITS)})",
    )
    command.add_argument("--rounds", type=int, default=5, help="number of steps per run (default 5)")
    command.add_argument("--json", type=Path, help="write the numbers to this JSON file")
    command.add_argument("--plot", type=Path, help="write a PNG of measured and predicted times")
    _of_a_job(command)
    command.set_defaults(run=check)
    _of_predict(commands.add_parser("predict", help="print the table for 1 to 256 GPUs"))
    command = commands.add_parser("planning", help="measure time and memory to order an epoch")
    command.add_argument(
        "--radiographs", type=int, default=10_000_000, help="number of radiographs (default 10,000,000)"
    )
    command.add_argument("--ranks", default="8,64,256", help="numbers of ranks (default 8,64,256)")
    command.add_argument("--micro-batch", type=int, default=8, help="radiographs per micro-batch (default 8)")
    command.set_defaults(run=plan)
    return top_parser


def _of_predict(command: argparse.ArgumentParser) -> None:
    """Add the options of `predict`. Default prices of 2025: S3 Standard in us-east-1 from the same region, a rented H100."""
    command.add_argument("--trace", type=Path, help="trace from `measure` on one GPU or more; or use --images-per-s")
    command.add_argument("--images-per-s", type=float, help="assumed training speed of a GPU")
    command.add_argument(
        "--spread",
        type=float,
        default=0.05,
        help="of --images-per-s: slowest of 100 steps over the median, minus 1 (default 0.05)",
    )
    command.add_argument(
        "--micro-batch", type=int, default=16, help="of --images-per-s: radiographs per micro-batch (default 16)"
    )
    command.add_argument(
        "--precision", choices=["bf16", "fp32"], default="bf16", help="of --images-per-s: precision (default bf16)"
    )
    command.add_argument("--gpus", default=GPUS, help=f"numbers of GPUs (default {GPUS})")
    command.add_argument("--gpus-per-node", type=int, default=8, help="GPUs per node (default 8)")
    command.add_argument(
        "--inside", default="1200Gb/s:5us", help="rate and latency between GPUs of a node (default 1200Gb/s:5us)"
    )
    command.add_argument(
        "--network",
        action="append",
        help=f"rate and latency of a node's network, all cards together; repeatable (default {' '.join(NETWORKS)})",
    )
    command.add_argument(
        "--global-batch", type=int, help="global batch for every number of GPUs (default: a micro-batch per GPU)"
    )
    command.add_argument(
        "--radiographs", type=int, default=36_808, help="radiographs of the train folder (default 36808, MURA's)"
    )
    command.add_argument(
        "--others", type=int, default=3_197, help="radiographs of the valid folder, copied too (default 3197)"
    )
    command.add_argument(
        "--tune", type=float, default=0.1, help="share of the train folder that becomes tune (default 0.1)"
    )
    command.add_argument(
        "--encoding", choices=["raw", "png", "jpeg"], default="raw", help="encoding of the shards (default raw)"
    )
    command.add_argument("--data-size", type=int, default=320, help="image size of the shards in pixels (default 320)")
    command.add_argument("--bytes", type=float, help="bytes per radiograph in its tar (default: by encoding and size)")
    command.add_argument(
        "--disk-mb-per-s", type=float, default=2000, help="read speed of a node's disk in MB/s (default 2000)"
    )
    command.add_argument(
        "--store-mb-per-s",
        type=float,
        default=400,
        help="read speed from the object store per node in MB/s (default 400)",
    )
    command.add_argument(
        "--per-1000-gets",
        type=float,
        default=0.0004,
        help="price of 1,000 GETs in dollars (default 0.0004: S3 Standard, 2025)",
    )
    command.add_argument(
        "--per-gb",
        type=float,
        default=0.0,
        help="price per GB read from the store in dollars (default 0, the same region; 0.09 outside)",
    )
    command.add_argument(
        "--per-gpu-hour", type=float, default=3.0, help="price of a GPU per hour in dollars (default 3)"
    )
    epochs = Settings.model_fields["epochs"].default
    command.add_argument(
        "--epochs", type=int, default=epochs, help=f"number of epochs per copy of the shards (default {epochs})"
    )
    command.add_argument("--plot", type=Path, help="write a PNG of efficiency and epoch time")
    command.set_defaults(run=predict)


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that the namespaces are removed
    try:
        options.run(options)
    except (UserError, RunError, OSError) as error:
        print(f"scale.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
