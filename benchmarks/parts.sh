# Parts of a long run: each has a limit, all end before a deadline, and what is there so far comes
# back in few files. Sourced by gpu.sh, which sets
#
#   OUT        where $OUT/gpu.tar.gz, $OUT/summary.csv and $OUT/table.txt are kept up to date: after
#              each part, and when the run is ended from outside
#   DEADLINE   seconds for everything
#   CHOSEN     names or patterns of the parts to run, or of the group they are in; empty for all
#   GROUP      that of the parts declared next
#   LISTING    not empty: parts are not run, and their names are printed
#
# and may define short_table, which prints table.txt. Parts find
#
#   RESULTS    a folder of this run: what they write there goes into the archive
#   SCRATCH    another, which does not
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
    [[ $1 == $pattern || $GROUP == $pattern ]] && return 0
  done
  return 1
}

# record NAME RESULT SECONDS
record() {
  result_of[$1]=$2
  echo "$1,$2,$3" | tee -a "$RESULTS/summary.csv"
}

# What is there so far, as few files; each is replaced at once.
collect() {
  if declare -F short_table >/dev/null; then
    short_table >"$RESULTS/table.txt" 2>&1
    cp "$RESULTS/table.txt" "$SCRATCH/table.txt" && mv "$SCRATCH/table.txt" "$OUT/table.txt"
  fi
  cp "$RESULTS/summary.csv" "$SCRATCH/summary.csv" && mv "$SCRATCH/summary.csv" "$OUT/summary.csv"
  tar czf "$SCRATCH/gpu.tar.gz" -C "$RESULTS" . && mv "$SCRATCH/gpu.tar.gz" "$OUT/gpu.tar.gz"
}

# start NAME LIMIT COMMAND...: in the background, as a process group of its own, for no longer than
# LIMIT seconds nor past the deadline. COMMAND may be an exported function. TAIL lines of what it
# printed are shown when it ends well.
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

# Waits for all parts that were started.
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

# stop REASON: what is declared from here on is left out.
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

# The last lines of the run; fails if a part did not end well.
conclude() {
  local bad
  [[ -e $OUT/table.txt ]] && cat "$OUT/table.txt"
  [[ $reason_to_stop ]] && echo "stopped: $reason_to_stop"
  bad=$(grep -vE '^#|^part,|,ok,' "$RESULTS/summary.csv") && echo "$bad" && return 1
  echo "all is well"
}
