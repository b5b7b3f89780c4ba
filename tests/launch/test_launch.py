"""launch/: the pages say what they need, keep what is set, and tell Slurm what became of a run; what they name is there.

Slurm is not here: its commands are stood in for by a few lines each, what they start is real. Kubernetes' own schemas are asked
where the package kubernetes-validate is installed.
"""

import importlib.util
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import laws
from helpers.commands import ROOT, TINY, run, warm_python
from helpers.ranks import DIFFERS
from helpers.tools import tool

from mura_dist.core import config
from mura_dist.distributed import environment as launcher
from mura_dist.training import metrics_log
from mura_dist.training.run import Run

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
SOURCED = {"env.sh", "outcome.sh", "requeue.sh"}
WITH_WORDS = sorted(path for path in SCRIPTS if path.name not in SOURCED | {"setup.sh", "demo.sh"})


def name_of(path: Path) -> str:
    return path.name


# ---- every page


@pytest.mark.parametrize("page", SCRIPTS, ids=name_of)
def test_bash_can_read_it(page: Path) -> None:
    assert subprocess.run(["bash", "-n", page], check=False).returncode == 0
    if shutil.which("shellcheck"):
        ours = ["--exclude", "SC2154"] if page.name == "demo.sh" else []  # what a tool's answer sets by eval
        found = subprocess.run(["shellcheck", "-x", *ours, page], cwd=ROOT, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("page", WITH_WORDS, ids=name_of)
def test_without_words_a_page_says_in_one_line_which_it_wants(page: Path) -> None:
    told = subprocess.run(["bash", page], cwd="/", capture_output=True, text=True, check=False, env=without_slurm())
    assert told.returncode == 2
    assert told.stdout == ""
    [line] = told.stderr.splitlines()
    assert line.startswith(f"launch/{page.name}: ")
    assert f"launch/{page.name} " in line.partition(": ")[2], "the command to give"


@pytest.mark.parametrize("page", WITH_WORDS, ids=name_of)
def test_a_page_can_be_read_top_to_bottom(page: Path) -> None:
    """Usage and exit status first; then nothing goes wrong unnoticed."""
    lines = page.read_text().splitlines()
    header = lines[: lines.index("set -euo pipefail")]
    assert any(page.name in line for line in header)
    assert any("Exit status: 0" in line for line in header)
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 130


def test_a_wrong_word_is_one_line_before_anything_starts(tmp_path: Path) -> None:
    told = run_page("local.sh", "2", "epochz=5", f"run={tmp_path / 'run'}", "shards=none")
    assert told.returncode == 2
    [line] = told.stderr.splitlines()
    assert "epochz" in line
    assert "epochs" in line


def test_a_hostfile_that_is_not_there_is_named(tmp_path: Path) -> None:
    told = run_page("deepspeed.sh", str(tmp_path / "hosts"), "launch/recipes/mura.toml")
    assert (told.returncode, len(told.stderr.splitlines())) == (2, 1)
    assert "no hostfile" in told.stderr


def test_several_hosts_without_pdsh_are_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# two\none slots=8\ntwo slots=8\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "grep"):
        (tools / name).symlink_to(shutil.which(name) or "")
    told = run_page("deepspeed.sh", str(tmp_path / "hosts"), "launch/recipes/mura.toml", PATH=str(tools))
    assert (told.returncode, len(told.stderr.splitlines())) == (2, 1), told.stderr
    assert "apt-get install pdsh" in told.stderr


def without_slurm(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | more


def run_page(page: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [shutil.which("bash") or "bash", str(LAUNCH / page), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=without_slurm(**env), timeout=60)


# ---- env.sh

LIBRARIES = Path(str(importlib.util.find_spec("torch").origin)).parent / "lib"  # type: ignore[union-attr]
READERS = {  # who reads a variable, of what is installed
    "OMP_NUM_THREADS": LIBRARIES / "libtorch_cpu.so",
    "GLOO_SOCKET_IFNAME": LIBRARIES / "libtorch_cpu.so",
    "NCCL_SOCKET_IFNAME": LIBRARIES.parents[1] / "nvidia" / "nccl" / "lib" / "libnccl.so.2",
    "NCCL_DEBUG": LIBRARIES.parents[1] / "nvidia" / "nccl" / "lib" / "libnccl.so.2",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": LIBRARIES.parent / "distributed/elastic/rendezvous/dynamic_rendezvous.py",
    "TORCHELASTIC_SIGNALS_TO_HANDLE": LIBRARIES.parent / "distributed" / "elastic" / "multiprocessing" / "api.py",
}


def environment(before: dict[str, str], ranks: int = 1) -> dict[str, str]:
    """What env.sh makes of it."""
    show = "; ".join(f'echo "{name}=${{{name}-}}"' for name in READERS)
    base = {"PATH": os.environ["PATH"]} | before
    line = f"set -euo pipefail; ranks={ranks}; source launch/env.sh; {show}"
    told = subprocess.run(["bash", "-c", line], cwd=ROOT, env=base, capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in told.stdout.splitlines())


def test_the_environment_keeps_what_is_set() -> None:
    before = dict.fromkeys(READERS, "7")
    assert environment(before | {"INTERFACE": "eth1"}, ranks=2) == before


def test_the_environment_sets_what_is_not() -> None:
    cores = len(os.sched_getaffinity(0))
    alone = environment({}, ranks=cores)
    assert alone["OMP_NUM_THREADS"] == "1"
    assert environment({}, ranks=1)["OMP_NUM_THREADS"] == str(cores)
    assert environment({}, ranks=cores + 1)["OMP_NUM_THREADS"] == "1", "never none"
    assert alone["GLOO_SOCKET_IFNAME"] == alone["NCCL_SOCKET_IFNAME"] == ""
    network = environment({"INTERFACE": "eth1"})
    assert (network["GLOO_SOCKET_IFNAME"], network["NCCL_SOCKET_IFNAME"]) == ("eth1", "=eth1")


def test_every_variable_it_sets_is_one_that_somebody_reads() -> None:
    text = (LAUNCH / "env.sh").read_text()
    assert set(re.findall(r'"\$\{(\w+):=', text)) == set(READERS)
    for name, reader in READERS.items():
        if not reader.is_file():  # torch without CUDA has no NCCL
            continue
        with open(reader, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            assert whole.find(name.encode()) >= 0 or whole.find(name.partition("_")[2].encode()) >= 0, (name, reader)


# ---- how a run stands


def test_a_setting_and_the_whole_status_can_be_asked_for(tmp_path: Path) -> None:
    words = ("tools/run_state.py", "--setting")
    assert run("python", *words, "run", "launch/recipes/mura.toml", "run=r", "--quiet", cwd=ROOT).stdout == "r\n"
    wrong = run("python", *words, "rum", "launch/recipes/mura.toml", cwd=ROOT)
    assert (wrong.returncode, wrong.stderr) == (2, "tools/run_state.py: no setting 'rum' (did you mean run?)\n")
    made = Run(tmp_path, config.load(LAUNCH / "recipes" / "mura.toml", [f"run={tmp_path}"]))
    made.write_status("stopped", step=3)
    whole = run("python", "tools/run_state.py", "--whole", "launch/recipes/mura.toml", f"run={tmp_path}", cwd=ROOT)
    assert json.loads(whole.stdout) == made.status()


@pytest.mark.parametrize(("launcher", "status"), [("exit 1", 1), ("exit 0", 0), ("write", 3)])
def test_only_what_this_start_wrote_says_that_it_was_stopped(launcher: str, status: int, tmp_path: Path) -> None:
    """A run stopped yesterday, whose launcher fails today, failed."""
    made = Run(tmp_path, config.load(LAUNCH / "recipes" / "mura.toml", [f"run={tmp_path}"]))
    made.write_status("stopped", reason="yesterday")
    if launcher == "write":
        launcher = f"""echo '{{"state": "stopped", "reason": "today"}}' > '{tmp_path}/status.json'; exit 1"""
    script = 'source launch/outcome.sh; run_training bash -c "$0" -- launch/recipes/mura.toml "$@"'
    told = subprocess.run(["bash", "-c", script, launcher, f"run={tmp_path}"], cwd=ROOT, timeout=60, check=False)
    assert told.returncode == status


# ---- Slurm's pages, without Slurm

RUNNING = " JobState=RUNNING PreemptTime=None "
REQUEUED = "requeue 7\n"


class Slurm:
    """Slurm's commands as a few lines of shell on PATH, in `folder`; `job`: what scontrol says of the job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "job").write_text(RUNNING)
        self.command("sbatch", 'echo "STAGE=${STAGE:-} $*" >> calls; echo 7')
        self.command(
            "scontrol",
            'case "$*" in *"show job"*) cat job ;; *hostnames*) echo localhost ;; *) echo "$*" >> calls ;; esac',
        )
        self.command("scancel", 'echo "scancel $*" >> calls; kill -TERM "$(cat step)"')
        self.command(  # every task a process; the first one is what scancel is told of
            "srun",
            """
            cd "$SLURM_SUBMIT_DIR"
            while [[ $1 == -* ]]; do shift 2; done # --wait 60
            for ((task = SLURM_NTASKS - 1; task >= 0; task--)); do
              SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_STEP_NUM_TASKS=$SLURM_NTASKS "$@" &
            done
            echo $! > "$folder/step"
            status=0
            for task in $(jobs -p); do wait "$task" || { last=$?; [ "$last" -le "$status" ] || status=$last; }; done
            exit "$status"
            """,
        )

    def command(self, name: str, lines: str) -> None:
        path = self.folder / name
        path.write_text(f'#!/usr/bin/env bash\nfolder={self.folder}\ncd "$folder"\n{lines}\n')
        path.chmod(0o755)

    def calls(self) -> str:
        path = self.folder / "calls"
        return path.read_text() if path.exists() else ""

    def environment(self, **more: str) -> dict[str, str]:
        ours = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NNODES": "1", "SLURM_NTASKS": "1"}
        ours |= {"SLURM_JOB_NODELIST": "localhost", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        ours |= {"PYTHON_EXEC": warm_python()}  # torchrun's: what starts its ranks
        return without_slurm(PATH=f"{self.folder}:{os.environ['PATH']}", **(ours | more))

    def start(self, page: str, *words: object, log: Path, **more: str) -> subprocess.Popen[str]:
        command = ["bash", str(LAUNCH / page), *map(str, words)]
        with open(log, "a") as file:
            return subprocess.Popen(command, env=self.environment(**more), stdout=file, stderr=file, text=True)


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    folder = tmp_path / "slurm"
    folder.mkdir()
    return Slurm(folder)


@pytest.mark.parametrize(
    ("status", "asked", "job", "wanted"),
    [
        (3, "USR2", RUNNING, REQUEUED),  # the time limit comes
        (3, "", " JobState=RUNNING PreemptTime=2026-11-26T04:02:50 ", REQUEUED),
        (3, "", RUNNING, ""),  # somebody asked the ranks to stop
        (3, "TERM", " JobState=COMPLETING PreemptTime=None ", ""),  # scancel
        (3, "USR2", " JobState=COMPLETING PreemptTime=None ", ""),  # scancel, after the warning
        (0, "USR2", RUNNING, ""),  # done, all the same
        (1, "USR2", RUNNING, ""),
    ],
)
def test_a_job_goes_back_into_the_queue_where_slurm_wanted_it_to_stop(
    status: int, asked: str, job: str, wanted: str, slurm: Slurm
) -> None:
    (slurm.folder / "job").write_text(job)
    script = f"source launch/outcome.sh; source launch/requeue.sh; received={asked}; requeue {status}; echo not here"
    told = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=slurm.environment(), capture_output=True, text=True, check=False
    )
    assert told.returncode == status, told.stderr
    assert slurm.calls() == wanted
    assert "not here" not in told.stdout


def test_a_job_that_has_no_time_to_get_anywhere_is_not_requeued_for_ever(slurm: Slurm, tmp_path: Path) -> None:
    made = Run(tmp_path, config.load(LAUNCH / "recipes" / "mura.toml", [f"run={tmp_path}"]))
    made.write_status("stopped", reason="stopped at step 3 of 10")
    again = f"""echo '{{"state": "stopped", "time": "later", "reason": "stopped at step 3 of 10"}}' > '{tmp_path}/status.json'"""
    script = """source launch/outcome.sh; source launch/requeue.sh; status=0
    run_training bash -c "$0; exit 1" -- "$@" || status=$?; received=USR2; requeue "$status" """
    words = ["bash", "-c", script, again, "launch/recipes/mura.toml", f"run={tmp_path}"]
    told = subprocess.run(words, cwd=ROOT, env=slurm.environment(), capture_output=True, text=True, check=False)
    assert told.returncode == 3, told.stderr
    assert "Give the job more time" in told.stderr
    assert slurm.calls() == ""


@pytest.mark.slow
def test_warned_of_its_time_limit_a_job_saves_is_requeued_and_goes_on(
    slurm: Slurm, shard_folder: Path, tmp_path: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    words = (*TINY, f"shards={shard_folder}", f"run={folder}", "--quiet")
    first = slurm.start("slurm.sbatch", *words, "epochs=5000", log=log)
    try:
        while not any(line["kind"] == "step" for line in metrics_log.read(folder / "metrics.jsonl")):
            assert first.poll() is None, log.read_text()
            time.sleep(0.05)
        first.send_signal(signal.SIGUSR2)
        assert first.wait(60) == 3, log.read_text()
    finally:
        first.kill()
    assert slurm.calls() == f"scancel --signal=TERM 7\n{REQUEUED}"
    stopped = Run.load(folder).status()
    assert stopped["state"] == "stopped", log.read_text()
    last = max(line["step"] for line in metrics_log.read(folder / "metrics.jsonl"))
    epochs = -(-last // 8) + 1
    again = slurm.start("slurm.sbatch", *words, f"epochs={epochs}", log=log)
    assert again.wait(120) == 0, log.read_text()
    assert Run.load(folder).status()["state"] == "done"
    assert slurm.calls().count(REQUEUED) == 1


@pytest.mark.slow
def test_an_array_and_its_tasks_make_the_bytes_of_one_process(
    slurm: Slurm, phantoms: Path, shard_folder: Path, tmp_path: Path
) -> None:
    """Two jobs, numbered 4 and 6, of two tasks each: ranks 0 to 3."""
    out, log = tmp_path / "out", tmp_path / "log"
    array = {
        "SLURM_ARRAY_TASK_MIN": "4",
        "SLURM_ARRAY_TASK_STEP": "2",
        "SLURM_ARRAY_TASK_COUNT": "2",
        "SLURM_NTASKS": "2",
    }
    words = ("shards", phantoms, out, "--size", 64, "--workers", 1, "--quiet")
    jobs = [slurm.start("array.sbatch", *words, log=log, **array, SLURM_ARRAY_TASK_ID=number) for number in ("4", "6")]
    assert [job.wait(120) for job in jobs] == [0, 0], log.read_text()
    assert log.read_text().count(f"{out}: 64 px") == 1, "the first rank speaks"
    assert json.loads((out / "conversion.json").read_bytes())["ranks"] == 4
    laws.same_bytes(shard_folder, out, leave_out=DIFFERS)


def catches(process: int, what: signal.Signals) -> bool:
    """Whether a process has a handler of its own: bash sets its trap after it has started the step."""
    mask = re.search(r"^SigCgt:\t(\w+)$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return mask is not None and bool(int(mask[1], 16) >> (what - 1) & 1)


def test_an_array_that_ends_of_the_warning_is_requeued(slurm: Slurm, tmp_path: Path) -> None:
    """A task that has not begun dies of a TERM; the same command goes on."""
    slurm.command("srun", "trap 'exit 143' TERM; echo $$ > step; while kill -0 $PPID; do sleep 0.05; done")
    job = slurm.start("array.sbatch", "shards", "here", "there", log=tmp_path / "log")
    while not (slurm.folder / "step").exists() or not catches(job.pid, signal.SIGUSR2):
        assert job.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR2)
    assert job.wait(30) == 3, (tmp_path / "log").read_text()
    assert slurm.calls() == f"scancel --signal=TERM 7\n{REQUEUED}"


def test_an_array_shares_nothing_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its jobs may have different folders."""
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    assert launcher.launch_env() == launcher.LaunchEnv("RANK and WORLD_SIZE", 0, 1, 0, 1)


def test_an_ensemble_submits_its_seeds_and_what_comes_after_them(slurm: Slurm, tmp_path: Path) -> None:
    words = ("launch/recipes/mura.toml", "epochs=3")
    job = slurm.start("ensemble.sbatch", *words, log=tmp_path / "log", SEEDS="3", OPTIONS="--time 60  -p gpu")
    assert job.wait(30) == 0, (tmp_path / "log").read_text()
    page = f"launch/ensemble.sbatch {' '.join(words)}"
    assert slurm.calls().splitlines() == [
        f"STAGE=train --parsable --time 60 -p gpu --array 0-2 {page}",
        f"STAGE=together --parsable --time 60 -p gpu --dependency afterok:7 --kill-on-invalid-dep=yes {page}",
    ]


def test_the_seeds_mean_and_deviation_are_told_and_their_ensemble_beside(tmp_path: Path) -> None:
    interval = {"kappa_low": 0.5, "kappa_high": 0.9, "auroc_low": 0.8, "auroc_high": None, "num_studies": 13}
    alike = {"split": "valid", "manifest_sha256": "a", "operating_point": "paper", "selected_on": "tune"}
    for name, kappa in {"one": 0.6, "two": 0.8, "together": 0.85}.items():
        group = {"kappa": kappa, "auroc": 0.9, "sensitivity": 0.5, "specificity": None} | interval
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps({"overall": group, "by_study_type": {}} | alike))
    told = run(
        "python",
        "tools/over_runs.py",
        tmp_path / "one",
        tmp_path / "two",
        "--together",
        tmp_path / "together",
        cwd=ROOT,
    )
    assert told.returncode == 0, told.stderr
    heading, overall, _, together = told.stdout.splitlines()
    assert heading.startswith("2 runs")
    assert overall.split(maxsplit=1)[1].startswith("0.700 +- 0.141   0.900 +- 0.000   0.500 +- 0.000   - +- -")
    assert "kappa 0.850 [0.500, 0.900], auroc 0.900 (13 studies)" in together
    wrong = run("python", "tools/over_runs.py", tmp_path / "three", cwd=ROOT)
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)
    assert "mura-dist evaluate" in wrong.stderr


# ---- kubernetes.yaml


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))


def pods() -> dict[str, dict[str, Any]]:
    """By kind, what a pod of it is made from."""
    jobs = {each["kind"]: each["spec"] for each in documents() if each["kind"].endswith("Job")}
    worker = jobs["PyTorchJob"]["pytorchReplicaSpecs"]["Worker"]
    return {"Job": jobs["Job"]["template"]["spec"], "PyTorchJob": worker["template"]["spec"]}


def test_kubernetes_own_schemas_take_it() -> None:
    schemas = pytest.importorskip("kubernetes_validate")
    for document in documents():
        if document["apiVersion"] != "kubeflow.org/v1":
            schemas.validate(document, schemas.latest_version(), strict=True)


def test_the_documents_name_each_other() -> None:
    kinds = [each["kind"] for each in documents()]
    assert kinds == ["PersistentVolumeClaim", "Service", "Job", "PyTorchJob", "NetworkPolicy", "NetworkPolicy"]
    claim, service, job, *_ = documents()
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert service["spec"]["clusterIP"] == "None"
    assert list(service["spec"]["selector"].values()) == [job["metadata"]["name"]]
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    header = (LAUNCH / "kubernetes.yaml").read_text().split("apiVersion")[0]
    assert {each["metadata"]["labels"]["part"] for each in documents()} == set(re.findall(r"-l part=(\w+)", header))


@pytest.mark.parametrize("kind", ["Job", "PyTorchJob"])
def test_a_pod_has_what_training_needs(kind: str) -> None:
    pod = pods()[kind]
    [container] = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert len(volumes) == len(mounts) == 3
    assert mounts["/data"]["persistentVolumeClaim"]["claimName"] == documents()[0]["metadata"]["name"]
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert "emptyDir" in mounts["/tmp"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 1000, "the image's user"
    assert pod["terminationGracePeriodSeconds"] >= 45, "15 s to save, torchrun waits up to 30 s"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == ranks_of(kind)[1]
    recipe, *words = container["args"]
    settings = config.load(ROOT / recipe, words)
    assert settings.shards.startswith("/data/")
    assert settings.run.startswith("/data/")


@pytest.mark.parametrize("kind", ["Job", "PyTorchJob"])
def test_a_pod_can_do_no_more_than_train(kind: str) -> None:
    """No token of the cluster, no rights, no file but on its volumes, where its caches lie too."""
    pod = pods()[kind]
    [container] = pod["containers"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC"))
    rights = container["securityContext"]
    assert rights["readOnlyRootFilesystem"] is True
    assert rights["allowPrivilegeEscalation"] is False
    assert rights["capabilities"] == {"drop": ["ALL"]}
    volumes = tuple(mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly"))
    env = {each["name"]: each.get("value") for each in container["env"]}
    for name in ("HOME", "TORCH_HOME"):
        assert env[name].startswith(volumes), name


@pytest.mark.parametrize(
    ("kind", "label"),
    [("Job", "batch.kubernetes.io/job-name"), ("PyTorchJob", "training.kubeflow.org/job-name")],
)
def test_no_pod_but_a_jobs_own_reaches_where_its_ranks_meet(kind: str, label: str) -> None:
    [job] = [each["metadata"] for each in documents() if each["kind"] == kind]
    policies = [each for each in documents() if each["kind"] == "NetworkPolicy"]
    [policy] = [each["spec"] for each in policies if each["metadata"]["labels"] == job["labels"]]
    own = {"matchLabels": {label: job["name"]}}  # as Kubernetes and the operator label them
    assert policy == {"podSelector": own, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": own}]}]}


@pytest.mark.parametrize("kind", ["Job", "PyTorchJob"])
def test_every_size_a_job_can_have_divides_the_recipes_batch(kind: str) -> None:
    nodes, a_node = ranks_of(kind)
    [container] = pods()[kind]["containers"]
    settings = config.load(ROOT / container["args"][0], container["args"][1:])
    for num in nodes:
        assert settings.global_batch % (settings.micro_batch * num * a_node) == 0


def ranks_of(kind: str) -> tuple[range, int]:
    """How many nodes there may be, how many ranks in each."""
    spec = next(each["spec"] for each in documents() if each["kind"] == kind)
    [container] = pods()[kind]["containers"]
    if kind == "Job":
        env = {one["name"]: one.get("value", "") for one in container["env"]}
        assert spec["completions"] == spec["parallelism"] == int(env["NNODES"])
        host, _, port = env["MASTER"].partition(":")
        service = documents()[1]["spec"]["ports"][0]["port"]
        assert (host, int(port)) == ("mura-train-0.mura-train", service)
        return range(spec["completions"], spec["completions"] + 1), int(env["RANKS"])
    elastic = spec["elasticPolicy"]
    assert spec["pytorchReplicaSpecs"]["Worker"]["replicas"] == elastic["maxReplicas"]
    return range(elastic["minReplicas"], elastic["maxReplicas"] + 1), int(spec["nprocPerNode"])


def test_pods_start_what_is_there() -> None:
    job, elastic = (pods()[kind]["containers"][0] for kind in ("Job", "PyTorchJob"))
    assert job["command"] == ["bash", "launch/torchrun.sh"]
    assert set(re.findall(r"^# (\w+)=", (LAUNCH / "torchrun.sh").read_text(), re.MULTILINE)) >= {"RANKS"}
    program, *options = elastic["command"]
    assert program == ".venv/bin/torchrun"
    assert options == ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR2", "-m", "mura_dist.train"]
    assert job["image"] == elastic["image"]


def test_a_pod_that_says_wrong_words_ends_its_job_and_one_that_saved_begins_anew() -> None:
    job = documents()[2]["spec"]
    by_status = {
        rule["onExitCodes"]["values"][0]: rule["action"]
        for rule in job["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    assert by_status == {2: "FailJob", 3: "Ignore"}
    assert job["template"]["spec"]["restartPolicy"] == "Never", "the policy wants it so"


@pytest.mark.parametrize("left", [None, "--studies 1400 --size 192 --seed 1"])
def test_demo_mixes_no_two_sets_of_drawings(left: str | None, tmp_path: Path) -> None:
    """An older version's drawings, and those of another seed: refused with what to remove, before anything starts."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    (tmp_path / "launch/setup.sh").write_text("")
    (tmp_path / "data/phantoms").mkdir(parents=True)
    if left is not None:
        (tmp_path / "runs/demo.steps").mkdir(parents=True)
        (tmp_path / "runs/demo.steps/drawn").write_text(f"{left}\n")
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(["bash", tmp_path / "launch/demo.sh"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "launch/demo.sh: data/phantoms holds other drawings than those of --studies 1400 --size 192 --seed 0. "
        "To draw and train again: rm -r data/phantoms shards/demo runs/demo*\n"
    )
    assert sorted(tmp_path.rglob("*")) == before


# ---- Containerfile

trying = tool("robustness/try_containerfile")


def test_what_the_containerfile_copies_is_there_and_its_entry_is_a_command() -> None:
    steps = trying.steps((LAUNCH / "Containerfile").read_text())
    for word, rest in steps:
        if word == "COPY":
            *sources, _ = (each for each in rest.split() if not each.startswith("--"))
            assert all(trying.files_of(source) for source in sources), rest
    words = dict(steps)
    assert json.loads(words["ENTRYPOINT"]) == ["mura-dist"]
    assert words["USER"] == "mura"
    assert [word for word, _ in steps].index("USER") < [word for word, _ in steps].index("COPY"), (
        "nothing of ours runs as root"
    )


def test_an_image_holds_no_data_and_no_runs() -> None:
    inside = {path.relative_to(ROOT).parts[0] for path in trying.files_of(".")}
    assert inside == {
        "LICENSE",
        "README.md",
        "launch",
        "mura_dist",
        "pyproject.toml",
        "requirements.lock",
        "shards",
        "tools",
    }
    assert [path.name for path in trying.files_of("shards")] == ["README.md"]


def test_lines_that_go_on_are_one_step_and_what_is_not_known_is_refused(tmp_path: Path) -> None:
    assert trying.steps("# no\nRUN one \\\n  two\n\nUSER me\n") == [("RUN", "one    two"), ("USER", "me")]
    with pytest.raises(ValueError, match="HEALTHCHECK"):
        trying.Container(tmp_path, [], {}).do("HEALTHCHECK", "CMD true")
    container = trying.Container(tmp_path, [], {})
    for word, rest in (("ENV", "PATH=/mura/.venv/bin:$PATH"), ("WORKDIR", "/mura"), ("COPY", "LICENSE ./")):
        container.do(word, rest)
    assert container.env["PATH"] == f"/mura/.venv/bin:{trying.PATH}"
    assert (tmp_path / "mura" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
