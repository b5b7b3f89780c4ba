# shellcheck shell=bash disable=SC2034 # still: requeue.sh reads it
# Sourced by the pages beside it: run a launcher to its end, pass signals on. Launchers hide how a training ended;
# RUN/status.json says it.

pass() { # a signal to the page: the same to what it runs; a page may have another way
  kill "-$1" "$child"
}

asked= # the last signal that the page heard
hear() { # while nothing runs that it could be passed on to
  trap 'asked=INT' INT QUIT HUP
  trap 'asked=TERM' TERM
  trap 'asked=USR2' USR2
}
hear

beside() { :; } # what a page has done beside it, of process $child; ended with it

patiently() { # patiently COMMAND ...: to its end, whatever signals come; its exit status
  local status=0 watch early
  # In a process group of its own: a terminal's Ctrl-C reaches this page alone, which passes TERM on. Python answers an INT with a
  # traceback while it starts.
  set -m
  "$@" &
  child=$!
  set +m
  beside &
  watch=$! early=$asked
  trap 'asked=TERM; pass TERM' TERM # passed on, so that ranks save
  trap 'asked=USR2; pass USR2' USR2
  trap 'asked=INT; pass TERM' INT QUIT HUP # of a terminal
  [ -z "$early" ] || pass "${early/INT/TERM}"
  wait "$child" || status=$?
  while kill -0 "$child" 2> /dev/null; do # a signal ended the waiting, not the command
    status=0
    wait "$child" || status=$?
  done
  hear
  kill "$watch" 2> /dev/null || true
  return "$status"
}

unbegun() { # a signal came before the run began: nothing has changed
  echo "$0: stopped before it began; the same words go on" >&2
  return 3
}

# outcome LAUNCHER ... -- RECIPE.toml [key=value ...]: 0 done; 2 wrong words; 3 stopped, the same words go on; else the launcher's
outcome() {
  local launcher=() status=0 before now state end
  while [ "$1" != -- ]; do launcher+=("$1"); shift; done
  shift
  before=$(.venv/bin/python tools/run_state.py --whole "$@") || status=$? # said in one line here, not by every rank
  if [ -n "$asked" ]; then unbegun; return; fi
  if [ "$status" -ne 0 ]; then return "$status"; fi
  patiently "${launcher[@]}" "$@" || status=$?
  if [ "$status" -eq 0 ]; then return; fi
  end=$((SECONDS + 20))
  while :; do
    now=$(.venv/bin/python tools/run_state.py --whole "$@") || return "$status"
    state=${now#*\"state\": \"}
    state=${state%%\"*}
    # deepspeed ends at once when a signal asks it to, or dies of it: its ranks may take 15 s (processes.GRACE_S) to save.
    if [ "$state" != running ] || [ "$SECONDS" -ge "$end" ] || { [ "$status" -le 128 ] && [ -z "$asked" ]; }; then break; fi
    sleep 1
  done
  if [ "$state" = stopped ] && [ "$now" != "$before" ]; then # else an earlier start was stopped, this one failed
    status=3
    if [ "${now#*\"reason\"}" = "${before#*\"reason\"}" ]; then still=yes; fi # at the very step where it had begun
  elif [ -n "$asked" ] && [ "$now" = "$before" ]; then
    unbegun || status=$?
  fi
  return "$status"
}
