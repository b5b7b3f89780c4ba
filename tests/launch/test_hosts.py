"""Training on several hosts, each with a network, host names and processes of its own, also with cut links and lost hosts.

Real launchers run over real links (hosts.py): torchrun by launch/torchrun.sh, static and c10d; `deepspeed` over ssh; a shared
disk over ssh.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from helpers.commands import ROOT, TINY
from helpers.hosts import NETWORK, Hosts, hosts
from helpers.runs import losses
from helpers.tools import tool

from mura_dist.training import checkpoint, metrics_log

chaos = tool("robustness/chaos_train")
pytestmark = pytest.mark.nightly(part="hosts")

LONGER = ("micro_batch=2", "epochs=8", "checkpoint_every=3", "collective_timeout_s=10")
SLOW = ("--delay-ms", 3, "--loss", 0.01)
PAGE = ROOT / "launch/torchrun.sh"
LIMIT_S = 150  # for what takes 30 s on an idle machine


@pytest.fixture(scope="module")
def reference_run(reference_run: Callable[..., Path]) -> Callable[[int], Path]:
    """Return the folder of an uninterrupted run on one host, by its number of ranks."""
    return lambda ranks: reference_run(ranks, *LONGER)


@pytest.fixture
def site(shard_folder: Path, tmp_path: Path) -> Callable[..., "contextlib.AbstractContextManager[Site]"]:
    @contextlib.contextmanager
    def of(num: int, **how: object) -> Iterator[Site]:
        with hosts(num, **how) as net:  # type: ignore[arg-type]
            yield Site(net, tmp_path, shard_folder)

    return of


class Site:
    """Hosts that train one run, with a log file each."""

    def __init__(self, net: Hosts, folder: Path, shards: Path) -> None:
        self.net, self.folder, self.shards, self.run = net, folder, shards, folder / "run"

    def log(self, number: int) -> Path:
        return self.folder / f"log{number}"

    def output(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("log*")))

    def arguments(self, *more: str) -> list[str]:
        return [*TINY, *LONGER, f"shards={self.shards}", f"run={self.run}", *more]

    def static(self, *more: str, first: dict[int, str] | None = None) -> list[subprocess.Popen[str]]:
        """Start launch/torchrun.sh on each host, with static rendezvous."""
        size = str(len(self.net.numbers))
        return [
            self.net.start(
                number,
                *("bash", PAGE, *self.arguments(*more)),
                log=self.log(number),
                env={"NNODES": size, "NODE_RANK": str(number - 1), "MASTER": "host1", "RANKS": "1"},
                first=(first or {}).get(number, ""),
            )
            for number in self.net.numbers
        ]

    def elastic(self, nodes: str, master: str) -> dict[int, subprocess.Popen[str]]:
        """Start launch/torchrun.sh on each host, with elastic rendezvous."""
        env = {"NNODES": nodes, "MASTER": master, "RANKS": "1", "PATIENCE": "20"}
        return {
            number: self.net.start(number, "bash", PAGE, *self.arguments(), log=self.log(number), env=env)
            for number in self.net.numbers
        }

    def steps(self) -> int:
        return sum(line["kind"] == "step" for line in metrics_log.read(self.run / "metrics.jsonl"))

    def until_it_trains(self, processes: Sequence[subprocess.Popen[str]], more_than: int = 4) -> None:
        end = time.monotonic() + LIMIT_S
        while self.steps() <= more_than:
            assert all(process.poll() is None for process in processes), self.output()
            assert time.monotonic() < end, self.output()
            time.sleep(0.05)

    def end(self, processes: Sequence[subprocess.Popen[str]], limit_s: float = LIMIT_S) -> list[int]:
        end = time.monotonic() + limit_s
        with contextlib.suppress(subprocess.TimeoutExpired):
            return [process.wait(max(0.1, end - time.monotonic())) for process in processes]
        raise AssertionError(f"still running after {limit_s} s:\n{self.told()}")

    def is_sound(self) -> None:
        """Check that every checkpoint can be read and has the right digests."""
        for folder in checkpoint.list_folders(self.run / "checkpoints"):
            checkpoint.read(folder)


# ---- like one host


@pytest.mark.parametrize(
    ("num", "slow"), [(2, {}), (3, {}), (2, {2: SLOW})], ids=["two", "three", "one of two is slow"]
)
def test_hosts_train_like_one_host_with_as_many_ranks(
    num: int,
    slow: dict[int, Sequence[object]],
    site: Callable[..., "contextlib.AbstractContextManager[Site]"],
    reference_run,
) -> None:
    """Losses, checkpoints and metrics are equal to the bit, also over a link with 3 ms of delay that loses 1 % of its frames."""
    with site(num, slow=slow) as cluster:
        assert cluster.end(cluster.static()) == [0] * num, cluster.output()
        assert losses(cluster.run) == losses(reference_run(num))
        assert chaos.differences(reference_run(num), cluster.run) == []


@pytest.mark.parametrize("num", [2, 3])
def test_deepspeed_starts_hosts_over_ssh(num: int, site, reference_run) -> None:
    """launch/deepspeed.sh runs on the first host, sshd on all."""
    if not shutil.which("sshd", path="/usr/sbin:/usr/bin") or not shutil.which("pdsh"):
        pytest.skip("needs sshd and pdsh: apt-get install openssh-server pdsh")
    with site(num) as cluster:
        serve_ssh(cluster)
        hostfile = cluster.folder / "hostfile"
        hostfile.write_text("".join(f"host{number} slots=1\n" for number in cluster.net.numbers))
        arguments = ("bash", ROOT / "launch/deepspeed.sh", hostfile, *cluster.arguments())
        done = cluster.net.start(1, *arguments, log=cluster.log(1), env={"MASTER": f"{NETWORK}.1"})
        assert cluster.end([done]) == [0], cluster.output()
        assert chaos.differences(reference_run(num), cluster.run) == []


def serve_ssh(cluster: Site) -> None:
    """Start an sshd on each host that accepts this test's key. Its files are the host's /etc/ssh."""
    key = cluster.folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    for number in cluster.net.numbers:
        folder = cluster.net.etc(number) / "ssh"
        folder.mkdir()
        shutil.copy(key, folder / "host_key")
        (folder / "host_key").chmod(0o600)
        (folder / "sshd_config").write_text(
            f"HostKey /etc/ssh/host_key\nAuthorizedKeysFile {key}.pub\nStrictModes no\nUsePAM no\nPermitRootLogin yes\n"
            "PidFile none\nSubsystem sftp internal-sftp\n"
        )
        (folder / "ssh_config").write_text(
            f"IdentityFile {key}\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
        )
        cluster.net.start(
            number, "/usr/sbin/sshd", "-D", "-e", "-f", "/etc/ssh/sshd_config", log=cluster.log(10 + number)
        )
    end = time.monotonic() + 20
    while not all("Server listening on ::" in cluster.log(10 + number).read_text() for number in cluster.net.numbers):
        assert time.monotonic() < end, cluster.output()
        time.sleep(0.1)


def signal_all(cluster: Site, number: int, name: bytes, what: signal.Signals) -> None:
    """Send a signal to the programs of that name on a host."""
    listed = subprocess.run(
        ["ip", "netns", "pids", cluster.net.space(number)], capture_output=True, text=True, check=True
    )
    for process in map(int, listed.stdout.split()):
        if name in Path(f"/proc/{process}/cmdline").read_bytes().partition(b"\0")[0]:
            os.kill(process, what)


# ---- cut and killed


def test_run_resumes_after_a_cut_link(site, reference_run) -> None:
    """Static: each side exits with one line within the collective timeout. The same command ends with the same bits."""
    with site(2) as cluster:
        started = cluster.static()
        cluster.until_it_trains(started)
        cluster.net.disconnect(2)
        begin = time.monotonic()
        assert all(cluster.end(started, 10 + 40)), cluster.output()
        assert time.monotonic() - begin < 10 + 40
        for number in cluster.net.numbers:
            log = cluster.log(number).read_text()
            assert (
                len(re.findall(rf"mura-dist: rank {number - 1} lost another rank \(.*[Tt]he same command resumes", log))
                == 1
            ), log
        cluster.is_sound()
        cluster.net.reconnect(2)
        assert cluster.end(cluster.static()) == [0, 0], cluster.output()
        assert chaos.differences(reference_run(2), cluster.run) == []


@pytest.mark.parametrize("victim", [1, 3], ids=["the first rank's", "another"])
def test_elastic_run_continues_without_a_lost_host(victim: int, site, reference_run) -> None:
    """c10d: the ranks restart on two hosts from the last checkpoint and finish within the tolerances of resumption."""
    with site(3) as cluster:
        started = cluster.elastic("2:3", "host2")
        cluster.until_it_trains(list(started.values()))
        cluster.net.power_off(victim)
        before = losses(reference_run(3))
        survivors = [process for number, process in started.items() if number != victim]
        end = time.monotonic() + LIMIT_S
        while (again := re.findall(r"2 ranks.*from step (\d+)", cluster.output())) == []:
            assert time.monotonic() < end, cluster.output()
            assert all(process.poll() is None for process in survivors), cluster.output()
            age_the_lock(cluster.run)
            time.sleep(0.2)
        assert cluster.end(survivors) == [0, 0], cluster.output()
        resumed_losses, step = losses(cluster.run), int(again[0])
        assert len(resumed_losses) == len(before)
        assert 0 < step < len(resumed_losses) - 8
        assert resumed_losses[:step] == before[:step]
        assert resumed_losses[step] == pytest.approx(before[step], rel=1e-6)
        assert resumed_losses[step : step + 8] == pytest.approx(before[step : step + 8], rel=1e-3)


def age_the_lock(run: Path) -> None:
    """Age the lock of a host without power, in place of waiting two minutes until it counts as stale."""
    path = run / "lock"
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime > 15:
            os.utime(path, (0, 0))


def test_all_hosts_exit_without_the_rendezvous_host(site) -> None:
    with site(2) as cluster:
        started = cluster.elastic("1:2", "host1")
        cluster.until_it_trains(list(started.values()))
        cluster.net.power_off(1)
        begin = time.monotonic()
        status = cluster.end([started[2]], 120)
        assert status not in ([0], [3]), cluster.output()
        assert time.monotonic() - begin < 90
        log = cluster.log(2).read_text()
        assert "launch/torchrun.sh: no answer of host1:29500 for 20 s, exiting. Repeat the command on all nodes." in log
        assert re.search(
            r"mura-dist: rank 1 lost another rank \(.*[Tt]he same command resumes from the last checkpoint", log
        ), log
        cluster.is_sound()


# ---- a shared disk


def test_read_only_disk_on_one_host(site, reference_run) -> None:
    """On the first rank's host it fails the run on all hosts. On another host nothing is written."""
    with site(2) as cluster:
        read_only = f"mount --bind {cluster.folder} {cluster.folder} && mount -o remount,bind,ro {cluster.folder}"
        begin = time.monotonic()
        assert all(cluster.end(cluster.static(first={1: read_only})))
        assert time.monotonic() - begin < 90
        log = cluster.log(1).read_text()
        assert f"mura-dist: run={cluster.run} cannot be written (" in log, log
        assert (
            "could not meet the other ranks" in cluster.log(2).read_text()
            or "lost another rank" in cluster.log(2).read_text()
        ), cluster.output()
        assert cluster.end(cluster.static(first={2: read_only})) == [0, 0], cluster.output()
        assert chaos.differences(reference_run(2), cluster.run) == []


def test_stalled_disk_on_one_host_is_named(site) -> None:
    """The second host reads shards through the first one's sshd, which stops answering."""
    if not shutil.which("sshfs"):
        pytest.skip("needs sshfs: apt-get install sshfs openssh-server")
    with site(2) as cluster:
        serve_ssh(cluster)
        far = cluster.folder / "far"
        far.mkdir()
        mount = f"sshfs -o direct_io,cache=no host1:{cluster.shards} {far} && mount --bind {far} {cluster.shards}"
        started = cluster.static("prefetch=1", first={2: mount})
        cluster.until_it_trains(started)
        signal_all(cluster, 1, b"sshd", signal.SIGSTOP)  # it stops answering but closes no connection
        assert all(cluster.end(started[:1], 60)), cluster.output()
        log = cluster.log(2).read_text()
        signal_all(cluster, 2, b"sshfs", signal.SIGKILL)  # until then the kernel blocks its readers
        assert all(cluster.end(started[1:], 60)), cluster.output()
        assert (
            f"rank 1 waited 10 s (collective_timeout_s) for radiographs from {cluster.shards}: the disk is slow or gone"
            in log
        ), log
        assert "mura-dist: rank 0 lost another rank" in cluster.log(1).read_text()
        cluster.is_sound()
