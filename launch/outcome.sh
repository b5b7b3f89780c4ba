# Sourced by the pages beside it. Launchers hide how a training ended; RUN/status.json says it.

outcome() { # outcome LAUNCHER ... -- RECIPE.toml [key=value ...]: 0 done; 3 stopped, the same command goes on; else the launcher's
  local launcher=() status=0
  while [ "$1" != -- ]; do launcher+=("$1"); shift; done
  shift
  "${launcher[@]}" "$@" &
  local child=$!
  trap "kill -TERM $child" TERM # passed on, so that ranks save; a terminal's Ctrl-C reaches the launcher by itself
  trap "kill -USR2 $child" USR2
  trap : INT
  wait "$child" || status=$?
  while kill -0 "$child" 2> /dev/null; do # a signal ended the waiting, not the launcher
    status=0
    wait "$child" || status=$?
  done
  if [ "$status" -ne 0 ]; then
    local state waits=0
    state=$(.venv/bin/python tools/run_state.py "$@") || return "$status"
    # deepspeed passes no signal on and dies of it: its ranks notice, and may take 15 s (workers.ORDERLY_S) to save and say so.
    while [ "$status" -gt 128 ] && [ "$state" = running ] && [ "$waits" -lt 20 ]; do
      sleep 1
      waits=$((waits + 1))
      state=$(.venv/bin/python tools/run_state.py "$@") || return "$status"
    done
    if [ "$state" = stopped ]; then status=3; fi
  fi
  return "$status"
}
