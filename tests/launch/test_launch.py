"""The launch scripts: arguments, environment, exit status, requeueing, and the files for Kubernetes and containers.

Slurm's commands are replaced by short shell scripts. What they start is real. The Kubernetes documents are validated if the
package kubernetes-validate is installed.
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
def test_script_passes_bash_and_shellcheck(page: Path) -> None:
    assert subprocess.run(["bash", "-n", page], check=False).returncode == 0
    if shutil.which("shellcheck"):
        exclude = ["--exclude", "SC2154"] if page.name == "demo.sh" else []  # variables that demo.sh sets by eval
        command = ["shellcheck", "-x", *exclude, page]
        checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("page", WITH_WORDS, ids=name_of)
def test_script_without_arguments_prints_its_usage(page: Path) -> None:
    completed = subprocess.run(
        ["bash", page], cwd="/", capture_output=True, text=True, check=False, env=without_slurm()
    )
    assert completed.returncode == 2
    assert completed.stdout == ""
    [line] = completed.stderr.splitlines()
    assert line.startswith(f"launch/{page.name}: ")
    assert f"launch/{page.name} " in line.partition(": ")[2], "the command to give"


@pytest.mark.parametrize("page", WITH_WORDS, ids=name_of)
def test_script_header_states_usage_and_exit_status(page: Path) -> None:
    """The header precedes `set -euo pipefail`."""
    lines = page.read_text().splitlines()
    header = lines[: lines.index("set -euo pipefail")]
    assert any(page.name in line for line in header)
    assert any("Exit status: 0" in line for line in header)
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 130


def test_unknown_setting_is_refused_before_the_launcher_starts(tmp_path: Path) -> None:
    completed = run_page("local.sh", "2", "epochz=5", f"run={tmp_path / 'run'}", "shards=none")
    assert completed.returncode == 2
    [line] = completed.stderr.splitlines()
    assert "epochz" in line
    assert "epochs" in line


def test_missing_hostfile_is_refused(tmp_path: Path) -> None:
    completed = run_page("deepspeed.sh", str(tmp_path / "hosts"), "launch/recipes/mura.toml")
    assert (completed.returncode, len(completed.stderr.splitlines())) == (2, 1)
    assert "no hostfile" in completed.stderr


def test_several_hosts_without_pdsh_are_refused(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# two\none slots=8\ntwo slots=8\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "grep"):
        (tools / name).symlink_to(shutil.which(name) or "")
    completed = run_page("deepspeed.sh", str(tmp_path / "hosts"), "launch/recipes/mura.toml", PATH=str(tools))
    assert (completed.returncode, len(completed.stderr.splitlines())) == (2, 1), completed.stderr
    assert "apt-get install pdsh" in completed.stderr


def without_slurm(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | more


def run_page(page: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [shutil.which("bash") or "bash", str(LAUNCH / page), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=without_slurm(**env), timeout=60)


# ---- env.sh

LIBRARIES = Path(str(importlib.util.find_spec("torch").origin)).parent / "lib"  # type: ignore[union-attr]
READERS = {  # variable -> an installed file that reads it
    "OMP_NUM_THREADS": LIBRARIES / "libtorch_cpu.so",
    "GLOO_SOCKET_IFNAME": LIBRARIES / "libtorch_cpu.so",
    "NCCL_SOCKET_IFNAME": LIBRARIES.parents[1] / "nvidia" / "nccl" / "lib" / "libnccl.so.2",
    "NCCL_DEBUG": LIBRARIES.parents[1] / "nvidia" / "nccl" / "lib" / "libnccl.so.2",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": LIBRARIES.parent / "distributed/elastic/rendezvous/dynamic_rendezvous.py",
    "TORCHELASTIC_SIGNALS_TO_HANDLE": LIBRARIES.parent / "distributed" / "elastic" / "multiprocessing" / "api.py",
}


def environment(before: dict[str, str], ranks: int = 1) -> dict[str, str]:
    """Return the variables that env.sh sets, given those of `before`."""
    show = "; ".join(f'echo "{name}=${{{name}-}}"' for name in READERS)
    base = {"PATH": os.environ["PATH"]} | before
    line = f"set -euo pipefail; ranks={ranks}; source launch/env.sh; {show}"
    completed = subprocess.run(["bash", "-c", line], cwd=ROOT, env=base, capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in completed.stdout.splitlines())


def test_environment_keeps_variables_that_are_set() -> None:
    before = dict.fromkeys(READERS, "7")
    assert environment(before | {"INTERFACE": "eth1"}, ranks=2) == before


def test_environment_sets_missing_variables() -> None:
    cores = len(os.sched_getaffinity(0))
    alone = environment({}, ranks=cores)
    assert alone["OMP_NUM_THREADS"] == "1"
    assert environment({}, ranks=1)["OMP_NUM_THREADS"] == str(cores)
    assert environment({}, ranks=cores + 1)["OMP_NUM_THREADS"] == "1", "at least 1"
    assert alone["GLOO_SOCKET_IFNAME"] == alone["NCCL_SOCKET_IFNAME"] == ""
    network = environment({"INTERFACE": "eth1"})
    assert (network["GLOO_SOCKET_IFNAME"], network["NCCL_SOCKET_IFNAME"]) == ("eth1", "=eth1")


def test_every_variable_is_read_by_a_library() -> None:
    text = (LAUNCH / "env.sh").read_text()
    assert set(re.findall(r'"\$\{(\w+):=', text)) == set(READERS)
    for name, reader in READERS.items():
        if not reader.is_file():  # torch without CUDA has no NCCL
            continue
        with open(reader, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            assert content.find(name.encode()) >= 0 or content.find(name.partition("_")[2].encode()) >= 0, (
                name,
                reader,
            )


# ---- how a run stands


def test_run_state_prints_a_setting_and_the_status(tmp_path: Path) -> None:
    arguments = ("tools/run_state.py", "--setting")
    assert run("python", *arguments, "run", "launch/recipes/mura.toml", "run=r", "--quiet", cwd=ROOT).stdout == "r\n"
    wrong = run("python", *arguments, "rum", "launch/recipes/mura.toml", cwd=ROOT)
    assert (wrong.returncode, wrong.stderr) == (2, "tools/run_state.py: no setting 'rum' (did you mean run?)\n")
    training_run = Run(tmp_path, config.load(LAUNCH / "recipes" / "mura.toml", [f"run={tmp_path}"]))
    training_run.write_status("stopped", step=3)
    shown_status = run(
        "python", "tools/run_state.py", "--whole", "launch/recipes/mura.toml", f"run={tmp_path}", cwd=ROOT
    )
    assert json.loads(shown_status.stdout) == training_run.status()


@pytest.mark.parametrize(("launcher", "status"), [("exit 1", 1), ("exit 0", 0), ("write", 3)])
def test_exit_status_ignores_an_earlier_start(launcher: str, status: int, tmp_path: Path) -> None:
    """A run that was stopped yesterday and whose launcher fails today has failed."""
    training_run = Run(tmp_path, config.load(LAUNCH / "recipes" / "mura.toml", [f"run={tmp_path}"]))
    training_run.write_status("stopped", reason="yesterday")
    if launcher == "write":
        launcher = f"""echo '{{"state": "stopped", "reason": "today"}}' > '{tmp_path}/status.json'; exit 1"""
    script = 'source launch/outcome.sh; run_training bash -c "$0" -- launch/recipes/mura.toml "$@"'
    completed = subprocess.run(["bash", "-c", script, launcher, f"run={tmp_path}"], cwd=ROOT, timeout=60, check=False)
    assert completed.returncode == status


# ---- Slurm's pages, without Slurm

RUNNING = " JobState=RUNNING PreemptTime=None "
REQUEUED = "requeue 7\n"


class Slurm:
    """Slurm's commands as shell scripts on PATH, in `folder`. The file `job` holds what scontrol prints of the job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "job").write_text(RUNNING)
        self.command("sbatch", 'echo "STAGE=${STAGE:-} $*" >> calls; echo 7')
        self.command(
            "scontrol",
            'case "$*" in *"show job"*) cat job ;; *hostnames*) echo localhost ;; *) echo "$*" >> calls ;; esac',
        )
        self.command("scancel", 'echo "scancel $*" >> calls; kill -TERM "$(cat step)"')
        self.command(  # starts a process per task; scancel signals the first
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
        variables = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NNODES": "1", "SLURM_NTASKS": "1"}
        variables |= {"SLURM_JOB_NODELIST": "localhost", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        variables |= {"PYTHON_EXEC": warm_python()}  # the command with which torchrun starts its ranks
        return without_slurm(PATH=f"{self.folder}:{os.environ['PATH']}", **(variables | more))

    def start(self, page: str, *arguments: object, log: Path, **more: str) -> subprocess.Popen[str]:
        command = ["bash", str(LAUNCH / page), *map(str, arguments)]
        with open(log, "a") as file:
            return subprocess.Popen(command, env=self.environment(**more), stdout=file, stderr=file, text=True)


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    folder = tmp_path / "slurm"
    folder.mkdir()
    return Slurm(folder)


@pytest.mark.parametrize(
    ("status", "received", "job", "expected_calls"),
    [
        (3, "USR2", RUNNING, REQUEUED),  # the time limit approaches
        (3, "", " JobState=RUNNING PreemptTime=2026-11-26T04:02:50 ", REQUEUED),
        (3, "", RUNNING, ""),  # a user stopped the ranks
        (3, "TERM", " JobState=COMPLETING PreemptTime=None ", ""),  # scancel
        (3, "USR2", " JobState=COMPLETING PreemptTime=None ", ""),  # scancel, after the warning
        (0, "USR2", RUNNING, ""),  # done
        (1, "USR2", RUNNING, ""),
    ],
)
def test_job_is_requeued_only_if_slurm_stopped_it(
    status: int, received: str, job: str, expected_calls: str, slurm: Slurm
) -> None:
    (slurm.folder / "job").write_text(job)
    script = f"source launch/outcome.sh; source launch/requeue.sh; received={received}; requeue {status}; echo not here"
    completed = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=slurm.environment(), capture_output=True, text=True, check=False
    )
    assert completed.returncode == status, completed.stderr
    assert slurm.calls() == expected_calls
    assert "not here" not in completed.stdout


def test_job_without_progress_is_not_requeued(slurm: Slurm, tmp_path: Path) -> None:
    training_run = Run(tmp_path, config.load(LAUNCH / "recipes" / "mura.toml", [f"run={tmp_path}"]))
    training_run.write_status("stopped", reason="stopped at step 3 of 10")
    again = f"""echo '{{"state": "stopped", "time": "later", "reason": "stopped at step 3 of 10"}}' > '{tmp_path}/status.json'"""
    script = """source launch/outcome.sh; source launch/requeue.sh; status=0
    run_training bash -c "$0; exit 1" -- "$@" || status=$?; received=USR2; requeue "$status" """
    arguments = ["bash", "-c", script, again, "launch/recipes/mura.toml", f"run={tmp_path}"]
    completed = subprocess.run(
        arguments, cwd=ROOT, env=slurm.environment(), capture_output=True, text=True, check=False
    )
    assert completed.returncode == 3, completed.stderr
    assert "Give the job more time" in completed.stderr
    assert slurm.calls() == ""


@pytest.mark.slow
def test_job_saves_before_its_time_limit_and_resumes(slurm: Slurm, shard_folder: Path, tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    arguments = (*TINY, f"shards={shard_folder}", f"run={folder}", "--quiet")
    first = slurm.start("slurm.sbatch", *arguments, "epochs=5000", log=log)
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
    again = slurm.start("slurm.sbatch", *arguments, f"epochs={epochs}", log=log)
    assert again.wait(120) == 0, log.read_text()
    assert Run.load(folder).status()["state"] == "done"
    assert slurm.calls().count(REQUEUED) == 1


@pytest.mark.slow
def test_array_writes_the_bytes_of_one_process(
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
    arguments = ("shards", phantoms, out, "--size", 64, "--workers", 1, "--quiet")
    jobs = [
        slurm.start("array.sbatch", *arguments, log=log, **array, SLURM_ARRAY_TASK_ID=number) for number in ("4", "6")
    ]
    assert [job.wait(120) for job in jobs] == [0, 0], log.read_text()
    assert log.read_text().count(f"{out}: 64 px") == 1, "the first rank prints the summary"
    assert json.loads((out / "conversion.json").read_bytes())["ranks"] == 4
    laws.same_bytes(shard_folder, out, leave_out=DIFFERS)


def catches(process: int, what: signal.Signals) -> bool:
    """Return whether a process handles a signal. bash sets its trap after it has started the step."""
    mask = re.search(r"^SigCgt:\t(\w+)$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return mask is not None and bool(int(mask[1], 16) >> (what - 1) & 1)


def test_array_is_requeued_after_the_warning(slurm: Slurm, tmp_path: Path) -> None:
    """A task that has not started dies of TERM. The same command resumes."""
    slurm.command("srun", "trap 'exit 143' TERM; echo $$ > step; while kill -0 $PPID; do sleep 0.05; done")
    job = slurm.start("array.sbatch", "shards", "here", "there", log=tmp_path / "log")
    while not (slurm.folder / "step").exists() or not catches(job.pid, signal.SIGUSR2):
        assert job.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR2)
    assert job.wait(30) == 3, (tmp_path / "log").read_text()
    assert slurm.calls() == f"scancel --signal=TERM 7\n{REQUEUED}"


def test_plain_array_jobs_are_single_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of an array may have different folders."""
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    assert launcher.launch_env() == launcher.LaunchEnv("RANK and WORLD_SIZE", 0, 1, 0, 1)


def test_ensemble_submits_seeds_and_a_dependent_job(slurm: Slurm, tmp_path: Path) -> None:
    arguments = ("launch/recipes/mura.toml", "epochs=3")
    job = slurm.start("ensemble.sbatch", *arguments, log=tmp_path / "log", SEEDS="3", OPTIONS="--time 60  -p gpu")
    assert job.wait(30) == 0, (tmp_path / "log").read_text()
    page = f"launch/ensemble.sbatch {' '.join(arguments)}"
    assert slurm.calls().splitlines() == [
        f"STAGE=train --parsable --time 60 -p gpu --array 0-2 {page}",
        f"STAGE=together --parsable --time 60 -p gpu --dependency afterok:7 --kill-on-invalid-dep=yes {page}",
    ]


def test_over_runs_prints_mean_deviation_and_ensemble(tmp_path: Path) -> None:
    interval = {"kappa_low": 0.5, "kappa_high": 0.9, "auroc_low": 0.8, "auroc_high": None, "num_studies": 13}
    alike = {"split": "valid", "manifest_sha256": "a", "operating_point": "paper", "selected_on": "tune"}
    for name, kappa in {"one": 0.6, "two": 0.8, "together": 0.85}.items():
        group = {"kappa": kappa, "auroc": 0.9, "sensitivity": 0.5, "specificity": None} | interval
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps({"overall": group, "by_study_type": {}} | alike))
    completed = run(
        "python",
        "tools/over_runs.py",
        tmp_path / "one",
        tmp_path / "two",
        "--together",
        tmp_path / "together",
        cwd=ROOT,
    )
    assert completed.returncode == 0, completed.stderr
    heading, overall, _, together = completed.stdout.splitlines()
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
    """Return the pod specification by kind of job."""
    jobs = {each["kind"]: each["spec"] for each in documents() if each["kind"].endswith("Job")}
    worker = jobs["PyTorchJob"]["pytorchReplicaSpecs"]["Worker"]
    return {"Job": jobs["Job"]["template"]["spec"], "PyTorchJob": worker["template"]["spec"]}


def test_kubernetes_schemas_accept_the_documents() -> None:
    schemas = pytest.importorskip("kubernetes_validate")
    for document in documents():
        if document["apiVersion"] != "kubeflow.org/v1":
            schemas.validate(document, schemas.latest_version(), strict=True)


def test_documents_refer_to_each_other() -> None:
    kinds = [each["kind"] for each in documents()]
    assert kinds == ["PersistentVolumeClaim", "Service", "Job", "PyTorchJob", "NetworkPolicy", "NetworkPolicy"]
    volume_claim, service, job, *_ = documents()
    assert volume_claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert service["spec"]["clusterIP"] == "None"
    assert list(service["spec"]["selector"].values()) == [job["metadata"]["name"]]
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    header = (LAUNCH / "kubernetes.yaml").read_text().split("apiVersion")[0]
    assert {each["metadata"]["labels"]["part"] for each in documents()} == set(re.findall(r"-l part=(\w+)", header))


@pytest.mark.parametrize("kind", ["Job", "PyTorchJob"])
def test_pod_has_volumes_user_and_gpus_for_training(kind: str) -> None:
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
    recipe, *arguments = container["args"]
    settings = config.load(ROOT / recipe, arguments)
    assert settings.shards.startswith("/data/")
    assert settings.run.startswith("/data/")


@pytest.mark.parametrize("kind", ["Job", "PyTorchJob"])
def test_pod_is_unprivileged(kind: str) -> None:
    """The pod has no token and no privileges, and writes to its volumes only, caches included."""
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
def test_network_policy_admits_only_the_pods_of_the_job(kind: str, label: str) -> None:
    [job] = [each["metadata"] for each in documents() if each["kind"] == kind]
    policies = [each for each in documents() if each["kind"] == "NetworkPolicy"]
    [policy] = [each["spec"] for each in policies if each["metadata"]["labels"] == job["labels"]]
    own = {"matchLabels": {label: job["name"]}}  # the labels that Kubernetes and the operator set
    assert policy == {"podSelector": own, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": own}]}]}


@pytest.mark.parametrize("kind", ["Job", "PyTorchJob"])
def test_every_job_size_divides_the_global_batch(kind: str) -> None:
    nodes, a_node = ranks_of(kind)
    [container] = pods()[kind]["containers"]
    settings = config.load(ROOT / container["args"][0], container["args"][1:])
    for num in nodes:
        assert settings.global_batch % (settings.micro_batch * num * a_node) == 0


def ranks_of(kind: str) -> tuple[range, int]:
    """Return the possible numbers of nodes, and the ranks in each."""
    spec = next(each["spec"] for each in documents() if each["kind"] == kind)
    [container] = pods()[kind]["containers"]
    if kind == "Job":
        env = {variable["name"]: variable.get("value", "") for variable in container["env"]}
        assert spec["completions"] == spec["parallelism"] == int(env["NNODES"])
        host, _, port = env["MASTER"].partition(":")
        service = documents()[1]["spec"]["ports"][0]["port"]
        assert (host, int(port)) == ("mura-train-0.mura-train", service)
        return range(spec["completions"], spec["completions"] + 1), int(env["RANKS"])
    elastic = spec["elasticPolicy"]
    assert spec["pytorchReplicaSpecs"]["Worker"]["replicas"] == elastic["maxReplicas"]
    return range(elastic["minReplicas"], elastic["maxReplicas"] + 1), int(spec["nprocPerNode"])


def test_pods_start_existing_commands() -> None:
    job, elastic = (pods()[kind]["containers"][0] for kind in ("Job", "PyTorchJob"))
    assert job["command"] == ["bash", "launch/torchrun.sh"]
    assert set(re.findall(r"^# (\w+)=", (LAUNCH / "torchrun.sh").read_text(), re.MULTILINE)) >= {"RANKS"}
    program, *options = elastic["command"]
    assert program == ".venv/bin/torchrun"
    assert options == ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR2", "-m", "mura_dist.train"]
    assert job["image"] == elastic["image"]


def test_pod_failure_policy_by_exit_status() -> None:
    job = documents()[2]["spec"]
    by_status = {
        rule["onExitCodes"]["values"][0]: rule["action"]
        for rule in job["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    assert by_status == {2: "FailJob", 3: "Ignore"}
    assert job["template"]["spec"]["restartPolicy"] == "Never", "required by podFailurePolicy"


@pytest.mark.parametrize("drawn", [None, "--studies 1400 --size 192 --seed 1"])
def test_demo_refuses_drawings_of_another_seed(drawn: str | None, tmp_path: Path) -> None:
    """Drawings of another version or another seed are refused before anything starts. The message says what to remove."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    (tmp_path / "launch/setup.sh").write_text("")
    (tmp_path / "data/phantoms").mkdir(parents=True)
    if drawn is not None:
        (tmp_path / "runs/demo.steps").mkdir(parents=True)
        (tmp_path / "runs/demo.steps/drawn").write_text(f"{drawn}\n")
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


def test_containerfile_copies_existing_files_and_runs_a_command() -> None:
    steps = trying.steps((LAUNCH / "Containerfile").read_text())
    for word, rest in steps:
        if word == "COPY":
            *sources, _ = (each for each in rest.split() if not each.startswith("--"))
            assert all(trying.files_of(source) for source in sources), rest
    instructions = dict(steps)
    assert json.loads(instructions["ENTRYPOINT"]) == ["mura-dist"]
    assert instructions["USER"] == "mura"
    assert [word for word, _ in steps].index("USER") < [word for word, _ in steps].index("COPY"), "nothing runs as root"


def test_image_contains_no_data_and_no_runs() -> None:
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


def test_containerfile_parser_joins_lines_and_refuses_unknown_steps(tmp_path: Path) -> None:
    assert trying.steps("# no\nRUN one \\\n  two\n\nUSER me\n") == [("RUN", "one    two"), ("USER", "me")]
    with pytest.raises(ValueError, match="HEALTHCHECK"):
        trying.Container(tmp_path, [], {}).execute("HEALTHCHECK", "CMD true")
    container = trying.Container(tmp_path, [], {})
    for word, rest in (("ENV", "PATH=/mura/.venv/bin:$PATH"), ("WORKDIR", "/mura"), ("COPY", "LICENSE ./")):
        container.execute(word, rest)
    assert container.env["PATH"] == f"/mura/.venv/bin:{trying.PATH}"
    assert (tmp_path / "mura" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
