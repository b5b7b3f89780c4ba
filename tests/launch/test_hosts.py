"""Several hosts, each with a network, names and processes of its own: they train as one does; what is cut ends, or goes on.

Real launchers over real links (hosts.py): torchrun by its page, static and c10d; `deepspeed` over ssh; a shared disk over ssh.
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
LIMIT_S = 150  # for what takes 30 s on a quiet machine


@pytest.fixture(scope="module")
def whole(whole: Callable[..., Path]) -> Callable[[int], Path]:
    """A run of so many ranks on one host, that nobody disturbed."""
    return lambda ranks: whole(ranks, *LONGER)


@pytest.fixture
def site(shard_folder: Path, tmp_path: Path) -> Callable[..., "contextlib.AbstractContextManager[Site]"]:
    @contextlib.contextmanager
    def of(num: int, **how: object) -> Iterator[Site]:
        with hosts(num, **how) as net:  # type: ignore[arg-type]
            yield Site(net, tmp_path, shard_folder)

    return of


class Site:
    """Hosts that train one run, their outputs in a file each."""

    def __init__(self, net: Hosts, folder: Path, shards: Path) -> None:
        self.net, self.folder, self.shards, self.run = net, folder, shards, folder / "run"

    def log(self, number: int) -> Path:
        return self.folder / f"log{number}"

    def told(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("log*")))

    def words(self, *more: str) -> list[str]:
        return [*TINY, *LONGER, f"shards={self.shards}", f"run={self.run}", *more]

    def static(self, *more: str, first: dict[int, str] | None = None) -> list[subprocess.Popen[str]]:
        """launch/torchrun.sh on each host, numbered."""
        size = str(len(self.net.numbers))
        return [
            self.net.start(
                number,
                *("bash", PAGE, *self.words(*more)),
                log=self.log(number),
                env={"NNODES": size, "NODE_RANK": str(number - 1), "MASTER": "host1", "RANKS": "1"},
                first=(first or {}).get(number, ""),
            )
            for number in self.net.numbers
        ]

    def elastic(self, nodes: str, master: str) -> dict[int, subprocess.Popen[str]]:
        """The same, elastic."""
        env = {"NNODES": nodes, "MASTER": master, "RANKS": "1", "PATIENCE": "20"}
        return {
            number: self.net.start(number, "bash", PAGE, *self.words(), log=self.log(number), env=env)
            for number in self.net.numbers
        }

    def steps(self) -> int:
        return sum(line["kind"] == "step" for line in metrics_log.read(self.run / "metrics.jsonl"))

    def until_it_trains(self, processes: Sequence[subprocess.Popen[str]], more_than: int = 4) -> None:
        end = time.monotonic() + LIMIT_S
        while self.steps() <= more_than:
            assert all(process.poll() is None for process in processes), self.told()
            assert time.monotonic() < end, self.told()
            time.sleep(0.05)

    def end(self, processes: Sequence[subprocess.Popen[str]], limit_s: float = LIMIT_S) -> list[int]:
        end = time.monotonic() + limit_s
        with contextlib.suppress(subprocess.TimeoutExpired):
            return [process.wait(max(0.1, end - time.monotonic())) for process in processes]
        raise AssertionError(f"still running after {limit_s} s:\n{self.told()}")

    def is_sound(self) -> None:
        """No half-written file: what is there of checkpoints can be read, its digests right."""
        for folder in checkpoint.list_folders(self.run / "checkpoints"):
            checkpoint.read(folder)


# ---- as one host


@pytest.mark.parametrize(
    ("num", "slow"), [(2, {}), (3, {}), (2, {2: SLOW})], ids=["two", "three", "one of two is slow"]
)
def test_hosts_train_as_one_host_with_as_many_ranks(
    num: int, slow: dict[int, Sequence[object]], site: Callable[..., "contextlib.AbstractContextManager[Site]"], whole
) -> None:
    """The same losses, checkpoints and metrics to the bit; also over a link with 3 ms of delay that loses 1 % of its frames."""
    with site(num, slow=slow) as here:
        assert here.end(here.static()) == [0] * num, here.told()
        assert losses(here.run) == losses(whole(num))
        assert chaos.differences(whole(num), here.run) == []


@pytest.mark.parametrize("num", [2, 3])
def test_deepspeed_starts_hosts_over_ssh(num: int, site, whole) -> None:
    """launch/deepspeed.sh on the first host, sshd on all."""
    if not shutil.which("sshd", path="/usr/sbin:/usr/bin") or not shutil.which("pdsh"):
        pytest.skip("needs sshd and pdsh: apt-get install openssh-server pdsh")
    with site(num) as here:
        serve_ssh(here)
        hostfile = here.folder / "hostfile"
        hostfile.write_text("".join(f"host{number} slots=1\n" for number in here.net.numbers))
        words = ("bash", ROOT / "launch/deepspeed.sh", hostfile, *here.words())
        done = here.net.start(1, *words, log=here.log(1), env={"MASTER": f"{NETWORK}.1"})
        assert here.end([done]) == [0], here.told()
        assert chaos.differences(whole(num), here.run) == []


def serve_ssh(here: Site) -> None:
    """An sshd on each host that lets this test's key in; its files are the host's /etc/ssh."""
    key = here.folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    for number in here.net.numbers:
        folder = here.net.etc(number) / "ssh"
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
        here.net.start(number, "/usr/sbin/sshd", "-D", "-e", "-f", "/etc/ssh/sshd_config", log=here.log(10 + number))
    end = time.monotonic() + 20
    while not all("Server listening on ::" in here.log(10 + number).read_text() for number in here.net.numbers):
        assert time.monotonic() < end, here.told()
        time.sleep(0.1)


def signal_all(here: Site, number: int, name: bytes, what: signal.Signals) -> None:
    """The programs of that name on a host."""
    found = subprocess.run(["ip", "netns", "pids", here.net.space(number)], capture_output=True, text=True, check=True)
    for process in map(int, found.stdout.split()):
        if name in Path(f"/proc/{process}/cmdline").read_bytes().partition(b"\0")[0]:
            os.kill(process, what)


# ---- cut and killed


def test_a_cut_link_ends_both_sides_and_mended_they_go_on(site, whole) -> None:
    """Static: within the collective timeout, each side with one line; the same words finish with the bits of the whole."""
    with site(2) as here:
        started = here.static()
        here.until_it_trains(started)
        here.net.cut(2)
        begin = time.monotonic()
        assert all(here.end(started, 10 + 40)), here.told()
        assert time.monotonic() - begin < 10 + 40
        for number in here.net.numbers:
            said = here.log(number).read_text()
            assert (
                len(
                    re.findall(rf"mura-dist: rank {number - 1} lost another rank \(.*[Tt]he same command resumes", said)
                )
                == 1
            ), said
        here.is_sound()
        here.net.mend(2)
        assert here.end(here.static()) == [0, 0], here.told()
        assert chaos.differences(whole(2), here.run) == []


@pytest.mark.parametrize("victim", [1, 3], ids=["the first rank's", "another"])
def test_a_lost_host_is_done_without(victim: int, site, whole) -> None:
    """c10d: the others start again on two hosts from the last checkpoint, and finish as the law of resumption says."""
    with site(3) as here:
        started = here.elastic("2:3", "host2")
        here.until_it_trains(list(started.values()))
        here.net.power_off(victim)
        before = losses(whole(3))
        left = [process for number, process in started.items() if number != victim]
        end = time.monotonic() + LIMIT_S
        while (again := re.findall(r"2 ranks.*from step (\d+)", here.told())) == []:
            assert time.monotonic() < end, here.told()
            assert all(process.poll() is None for process in left), here.told()
            age_the_lock(here.run)
            time.sleep(0.2)
        assert here.end(left) == [0, 0], here.told()
        ours, step = losses(here.run), int(again[0])
        assert len(ours) == len(before)
        assert 0 < step < len(ours) - 8
        assert ours[:step] == before[:step]
        assert ours[step] == pytest.approx(before[step], rel=1e-6)
        assert ours[step : step + 8] == pytest.approx(before[step : step + 8], rel=1e-3)


def age_the_lock(run: Path) -> None:
    """A host that lost its power beats no more; the two minutes until its lock counts as stale are not waited for."""
    path = run / "lock"
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime > 15:
            os.utime(path, (0, 0))


def test_without_the_host_they_meet_at_all_end(site) -> None:
    with site(2) as here:
        started = here.elastic("1:2", "host1")
        here.until_it_trains(list(started.values()))
        here.net.power_off(1)
        begin = time.monotonic()
        status = here.end([started[2]], 120)
        assert status not in ([0], [3]), here.told()
        assert time.monotonic() - begin < 90
        said = here.log(2).read_text()
        assert "launch/torchrun.sh: no answer of host1:29500 for 20 s, exiting. Repeat the command on all nodes" in said
        assert re.search(
            r"mura-dist: rank 1 lost another rank \(.*[Tt]he same command resumes from the last checkpoint", said
        ), said
        here.is_sound()


# ---- a shared disk


def test_a_disk_that_is_read_only_on_one_host(site, whole) -> None:
    """On the first rank's it is one line on that host and the end of all; on another's nobody needs to write."""
    with site(2) as here:
        read_only = f"mount --bind {here.folder} {here.folder} && mount -o remount,bind,ro {here.folder}"
        begin = time.monotonic()
        assert all(here.end(here.static(first={1: read_only})))
        assert time.monotonic() - begin < 90
        said = here.log(1).read_text()
        assert f"mura-dist: run={here.run} cannot be written (" in said, said
        assert (
            "could not meet the other ranks" in here.log(2).read_text()
            or "lost another rank" in here.log(2).read_text()
        ), here.told()
        assert here.end(here.static(first={2: read_only})) == [0, 0], here.told()
        assert chaos.differences(whole(2), here.run) == []


def test_a_disk_that_stands_still_on_one_host_is_named(site) -> None:
    """Shards that the second host reads from the first one's sshd, which stops answering."""
    if not shutil.which("sshfs"):
        pytest.skip("needs sshfs: apt-get install sshfs openssh-server")
    with site(2) as here:
        serve_ssh(here)
        far = here.folder / "far"
        far.mkdir()
        mount = f"sshfs -o direct_io,cache=no host1:{here.shards} {far} && mount --bind {far} {here.shards}"
        started = here.static("prefetch=1", first={2: mount})
        here.until_it_trains(started)
        signal_all(here, 1, b"sshd", signal.SIGSTOP)  # it answers nobody any more, and does not say so
        assert all(here.end(started[:1], 60)), here.told()
        said = here.log(2).read_text()
        signal_all(here, 2, b"sshfs", signal.SIGKILL)  # until then the kernel keeps who reads from it
        assert all(here.end(started[1:], 60)), here.told()
        assert (
            f"rank 1 waited 10 s (collective_timeout_s) for radiographs from {here.shards}: the disk is slow, or gone"
            in said
        ), said
        assert "mura-dist: rank 0 lost another rank" in here.log(1).read_text()
        here.is_sound()
