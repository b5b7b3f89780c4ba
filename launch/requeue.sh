# shellcheck shell=bash
# Sourced by the pages for Slurm, after outcome.sh: its signals, and when a job goes back into the queue.

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # from 22.05 on srun does not know by itself what sbatch was told

# USR2, Slurm's warning before the time limit (--signal=B:USR2@120), reaches this script alone: all tasks are sent a TERM, which
# they save on. TERM (scancel, preemption) they hear from Slurm itself; a second one would end torchrun before its ranks.
pass() {
  if [ "$1" = USR2 ]; then scancel --signal=TERM "$SLURM_JOB_ID"; fi
}

requeue() { # requeue STATUS: 3, where Slurm wanted it so, puts the job back into the queue; and ends the script, with STATUS
  local job
  if [ "$1" -eq 3 ]; then
    job=$(scontrol --oneliner show job "$SLURM_JOB_ID")
    # Running still, so nobody cancelled it; and warned, or chosen for preemption. Else somebody asked the ranks to stop.
    if [ -n "${still:-}" ]; then
      echo "stopped where it had begun, not requeued: it would be so again; give the job more time (--time)" >&2
    elif [[ $job == *" JobState=RUNNING "* ]] && { [ "${asked:-}" = USR2 ] || [[ $job != *" PreemptTime=None "* ]]; }; then
      echo "stopped on Slurm's wish; requeued, to go on"
      scontrol requeue "$SLURM_JOB_ID" || true
    fi
  fi
  exit "$1"
}
