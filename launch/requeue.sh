# shellcheck shell=bash
# Sourced by the Slurm scripts after outcome.sh: Slurm's signals, and when a job is requeued.

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # from Slurm 22.05 on srun does not inherit it from sbatch

# USR2, Slurm's warning before the time limit (--signal=B:USR2@120), reaches this script alone, so it sends all tasks a TERM, on
# which they save. TERM (scancel, preemption) reaches them from Slurm itself. A second one would end torchrun before its ranks.
forward_signal() {
  if [ "$1" = USR2 ]; then scancel --signal=TERM "$SLURM_JOB_ID"; fi
}

requeue() { # requeue STATUS: exit with STATUS; requeue the job first if it is 3 and Slurm caused the stop
  local job
  if [ "$1" -eq 3 ]; then
    job=$(scontrol --oneliner show job "$SLURM_JOB_ID")
    # Requeue if the job still runs (it was not canceled) and was warned or preempted. Else a user stopped the ranks.
    if [ -n "${no_progress:-}" ]; then
      echo "not requeued: the job stopped at the step where it began. Give the job more time (--time)." >&2
    elif [[ $job == *" JobState=RUNNING "* ]] && { [ "${received:-}" = USR2 ] || [[ $job != *" PreemptTime=None "* ]]; }; then
      echo "stopped by Slurm, requeued"
      scontrol requeue "$SLURM_JOB_ID" || true
    fi
  fi
  exit "$1"
}
