# Parts of a long run: each has a limit, all end before a deadline, and the results so far are kept in
# three files. Sourced by gpu.sh, which sets
#
#   OUT        folder of gpu.tar.gz, summary.csv and table.txt, which are updated after each part and
#              when a signal ends the run
#   DEADLINE   seconds for all parts
#   CHOSEN     names, patterns or groups of the parts to run; empty for all
#   GROUP      group of the parts declared next
#   LISTING    if not empty, the names of parts are printed, and no part runs
#
# and may define short_table, which prints table.txt. Parts may use
#
#   RESULTS    a folder whose content goes into the archive
#   SCRATCH    a folder whose content does not
#
# Needs bash 4.4 and GNU timeout.

SHORTEST=${SHORTEST:-10} # a part is left out where fewer seconds remain
RESULTS="" SCRATCH=""

declare -A pid_of=() begin_of=() limit_of=() tail_of=()
running=() # names, in the order in which they were started
declare -A result_of=() # by name of part: ok, failed (status), timed out, stopped or left out
reason_to_stop=""

begin() {
  OUT=$(realpath -m "$OUT")
  RESULTS=$(mktemp -d)
  SCRATCH=$(mktemp -d)
  mkdir -p "$OUT"
  echo "part,result,seconds" >"$RESULTS/summary.csv"
  trap on_signal TERM INT
  trap on_exit EXIT
}

chosen() {
  local pattern
  ((${#CHOSEN[@]})) || return 0
  for pattern in "${CHOSEN[@]}"; do
    # shellcheck disable=SC2053 # patterns
    [[ $1 == $pattern || $GROUP == $pattern ]] && return 0
  done
  return 1
}

# record NAME RESULT SECONDS
record() {
  result_of[$1]=$2
  echo "$1,$2,$3" | tee -a "$RESULTS/summary.csv"
}

# Updates the three files, each in one step.
collect() {
  if declare -F short_table >/dev/null; then
    short_table >"$RESULTS/table.txt" 2>&1
    cp "$RESULTS/table.txt" "$SCRATCH/table.txt" && mv "$SCRATCH/table.txt" "$OUT/table.txt"
  fi
  cp "$RESULTS/summary.csv" "$SCRATCH/summary.csv" && mv "$SCRATCH/summary.csv" "$OUT/summary.csv"
  tar czf "$SCRATCH/gpu.tar.gz" -C "$RESULTS" . && mv "$SCRATCH/gpu.tar.gz" "$OUT/gpu.tar.gz"
}

# start NAME LIMIT COMMAND...: runs a part in the background in a process group of its own, until
# LIMIT seconds or the deadline. COMMAND may be an exported function. If it succeeds, the last TAIL
# lines of its output are shown.
start() {
  local name=$1 limit=$2 left=$((DEADLINE - SECONDS))
  shift 2
  if [[ ${LISTING:-} ]]; then echo "$name"; fi
  if [[ ${LISTING:-} ]] || ! chosen "$name"; then return 0; fi
  ((limit = limit < left ? limit : left))
  if [[ $reason_to_stop ]] || ((limit < SHORTEST)); then
    record "$name" "left out" 0
    return 0
  fi
  echo "== $name, at $SECONDS s: $*"
  timeout --kill-after=5 "$limit" bash -c '"$@"; status=$?; echo $SECONDS >"$0"; exit $status' \
    "$SCRATCH/$name.seconds" "$@" >"$RESULTS/$name.log" 2>&1 </dev/null &
  pid_of[$name]=$! begin_of[$name]=$SECONDS limit_of[$name]=$limit tail_of[$name]=${TAIL:-3}
  running+=("$name")
}

# Waits for all started parts.
finish() {
  local status name seconds
  while ((${#running[@]})); do
    name=${running[0]}
    wait "${pid_of[$name]}"
    status=$?
    running=("${running[@]:1}")
    seconds=$(cat "$SCRATCH/$name.seconds" 2>/dev/null || echo $((SECONDS - begin_of[$name])))
    if ((status == 0)); then
      record "$name" ok "$seconds"
    elif ((status == 124 || status == 137 && seconds >= limit_of[$name])); then
      record "$name" "timed out" "$seconds"
    else
      record "$name" "failed ($status)" "$seconds"
    fi
    tail -n "$((status == 0 ? tail_of[$name] : 15))" "$RESULTS/$name.log"
    collect
  done
}

part() {
  start "$@"
  finish
}

ok() { [[ ${result_of[$1]:-} == ok ]]; }

# stop REASON: leaves out all parts declared from here on.
stop() { reason_to_stop=$1; }

on_signal() {
  local name
  trap '' TERM INT
  for name in "${running[@]}"; do kill -TERM "${pid_of[$name]}"; done
  sleep 1
  for name in "${running[@]}"; do
    kill -KILL -- "-${pid_of[$name]}"
    record "$name" stopped "$((SECONDS - begin_of[$name]))"
  done 2>/dev/null
  exit 143
}

on_exit() {
  collect
  rm -rf "$RESULTS" "$SCRATCH"
}

# Prints the last lines of the run; fails if a part failed.
conclude() {
  local bad
  [[ -e $OUT/table.txt ]] && cat "$OUT/table.txt"
  [[ $reason_to_stop ]] && echo "stopped: $reason_to_stop"
  bad=$(grep -vE '^#|^part,|,ok,' "$RESULTS/summary.csv") && echo "$bad" && return 1
  echo "all is well"
}
