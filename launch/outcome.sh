# shellcheck shell=bash disable=SC2034 # still: requeue.sh reads it
# Sourced by the pages beside it: run a launcher to its end, pass signals on. Launchers hide how a training ended;
# RUN/status.json says it.

pass() { # a signal to the page: the same to what it runs; a page may have another way
  kill "-$1" "$child"
}

beside() { :; } # what a page has done beside it, of process $child; ended with it

patiently() { # patiently COMMAND ...: to its end, whatever signals come; its exit status
  local status=0 watch
  asked=
  "$@" &
  child=$!
  beside &
  watch=$!
  trap 'asked=TERM; pass TERM' TERM # passed on, so that ranks save
  trap 'asked=USR2; pass USR2' USR2
  trap 'asked=INT' INT # a terminal's Ctrl-C reaches the command by itself
  wait "$child" || status=$?
  while kill -0 "$child" 2> /dev/null; do # a signal ended the waiting, not the command
    status=0
    wait "$child" || status=$?
  done
  kill "$watch" 2> /dev/null || true
  return "$status"
}

# outcome LAUNCHER ... -- RECIPE.toml [key=value ...]: 0 done; 2 wrong words; 3 stopped, the same words go on; else the launcher's
outcome() {
  local launcher=() status=0 before now state end
  while [ "$1" != -- ]; do launcher+=("$1"); shift; done
  shift
  before=$(.venv/bin/python tools/run_state.py --whole "$@") || return # said in one line here, not by every rank
  patiently "${launcher[@]}" "$@" || status=$?
  if [ "$status" -eq 0 ]; then return; fi
  end=$((SECONDS + 20))
  while :; do
    now=$(.venv/bin/python tools/run_state.py --whole "$@") || return "$status"
    state=${now#*\"state\": \"}
    state=${state%%\"*}
    # deepspeed ends at once when a signal asks it to, or dies of it: its ranks may take 15 s (workers.ORDERLY_S) to save.
    if [ "$state" != running ] || [ "$SECONDS" -ge "$end" ] || { [ "$status" -le 128 ] && [ -z "$asked" ]; }; then break; fi
    sleep 1
  done
  if [ "$state" = stopped ] && [ "$now" != "$before" ]; then # else an earlier start was stopped, this one failed
    status=3
    if [ "${now#*\"reason\"}" = "${before#*\"reason\"}" ]; then still=yes; fi # at the very step where it had begun
  fi
  return "$status"
}
