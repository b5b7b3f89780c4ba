# shellcheck shell=bash disable=SC2034 # requeue.sh reads no_progress
# Sourced by the launch scripts: run a launcher to its end, forward signals, and return an exit status. Launchers hide how a
# training ended, so the status comes from RUN/status.json.

forward_signal() { # a signal of this script goes to its child; a script may define another way
  kill "-$1" "$child"
}

received= # the last signal that this script received
record_signals() { # while there is no child to forward them to
  trap 'received=INT' INT QUIT HUP
  trap 'received=TERM' TERM
  trap 'received=USR2' USR2
}
record_signals

monitor_child() { :; } # runs in the background while process $child runs; a script may define it

run_to_end() { # run_to_end COMMAND ...: run it to its end, whatever signals arrive; return its exit status
  local status=0 monitor early
  # In a process group of its own, so that a terminal's Ctrl-C reaches this script alone. The child gets TERM instead: on INT
  # Python prints a traceback while it starts.
  set -m
  "$@" &
  child=$!
  set +m
  monitor_child &
  monitor=$! early=$received
  trap 'received=TERM; forward_signal TERM' TERM # so that the ranks save
  trap 'received=USR2; forward_signal USR2' USR2
  trap 'received=INT; forward_signal TERM' INT QUIT HUP # of a terminal
  [ -z "$early" ] || forward_signal "${early/INT/TERM}"
  wait "$child" || status=$?
  while kill -0 "$child" 2> /dev/null; do # a signal interrupted wait, the command still runs
    status=0
    wait "$child" || status=$?
  done
  record_signals
  kill "$monitor" 2> /dev/null || true
  return "$status"
}

stop_before_start() { # a signal came before the run began: nothing has changed
  echo "$0: stopped before the run began. The same command starts it." >&2
  return 3
}

# run_training LAUNCHER ... -- RECIPE.toml [key=value ...]
# Returns 0: done; 2: invalid arguments; 3: stopped, the same command resumes; else the launcher's exit status.
run_training() {
  local launcher=() status=0 before now state end
  while [ "$1" != -- ]; do launcher+=("$1"); shift; done
  shift
  before=$(.venv/bin/python tools/run_state.py --whole "$@") || status=$? # one error line here instead of one per rank
  if [ -n "$received" ]; then stop_before_start; return; fi
  if [ "$status" -ne 0 ]; then return "$status"; fi
  run_to_end "${launcher[@]}" "$@" || status=$?
  if [ "$status" -eq 0 ]; then return; fi
  end=$((SECONDS + 20))
  while :; do
    now=$(.venv/bin/python tools/run_state.py --whole "$@") || return "$status"
    state=${now#*\"state\": \"}
    state=${state%%\"*}
    # On a signal deepspeed exits before its ranks, which may take 15 s to save.
    if [ "$state" != running ] || [ "$SECONDS" -ge "$end" ] || { [ "$status" -le 128 ] && [ -z "$received" ]; }; then break; fi
    sleep 1
  done
  if [ "$state" = stopped ] && [ "$now" != "$before" ]; then # else an earlier start was stopped, and this one failed
    status=3
    if [ "${now#*\"reason\"}" = "${before#*\"reason\"}" ]; then no_progress=yes; fi # stopped at the step where it began
  elif [ -n "$received" ] && [ "$now" = "$before" ]; then
    stop_before_start || status=$?
  fi
  return "$status"
}
