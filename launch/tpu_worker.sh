#!/usr/bin/env bash
# The part of launch/tpu_vm.sh that runs on each worker of a TPU slice; not called by hand.
#
#   bash launch/tpu_worker.sh install ARCHIVE     # unpack the tree into ~/m3jax, make ~/m3jax-venv
#   bash launch/tpu_worker.sh start RUN COMMAND…  # in the background, survives the connection
#   bash launch/tpu_worker.sh status RUN          # one line: m3jax-worker HOST STATE [NUMBER]
#   bash launch/tpu_worker.sh logs RUN WORKER     # the log as it grows, until the run ends
#   bash launch/tpu_worker.sh stop RUN            # SIGTERM to the command, SIGKILL if it stays
#
# ~/m3jax-runs/RUN holds log, pid, command (its checksum) and, once the run has ended, exit (its
# code). What runs write into ~/m3jax stays there when another version is installed.
# shellcheck disable=SC2329  # the functions are called by name, in main
set -euo pipefail

tree="$HOME/m3jax"
runs="$HOME/m3jax-runs"
export M3JAX_VENV="$HOME/m3jax-venv"
stop_seconds="${M3JAX_STOP_SECONDS:-120}" # for the checkpoint that SIGTERM asks for

alive() { # whether the run $1 is: the process must be ours, numbers come back after a reboot
  [[ -f "$runs/$1/pid" ]] &&
    ps -o args= -p "$(cat "$runs/$1/pid")" 2>/dev/null | grep -q -- " m3jax-run-$1 "
}

status() {
  local run="$1" state=none
  if [[ -f "$runs/$run/exit" ]]; then
    state="exited $(cat "$runs/$run/exit")"
  elif alive "$run"; then
    state="running $(cat "$runs/$run/command")"
  elif [[ -f "$runs/$run/pid" ]]; then
    state=lost # killed, or the machine started again
  fi
  echo "m3jax-worker $HOSTNAME $state"
}

start() {
  local run="$1" folder="$runs/$1"
  shift
  if alive "$run"; then
    echo "error: the run $run goes on on $HOSTNAME; end it with the subcommand stop, or choose" \
      "another name with --run" >&2
    return 2
  fi
  if [[ ! -x "$M3JAX_VENV/bin/python" ]]; then
    echo "error: m3jax is not installed on $HOSTNAME; use the subcommand install first" >&2
    return 2
  fi
  mkdir -p "$folder"
  rm -f "$folder/exit"
  cd "$tree"
  printf '%s\0' "$@" | cksum | cut -d' ' -f1 >"$folder/command"
  { date && printf '%q ' "$@" && echo; } >>"$folder/log"
  # The trap lets the shell outlive the SIGTERM that the command answers, to note its code.
  # shellcheck disable=SC2016
  PATH="$M3JAX_VENV/bin:$PATH" nohup setsid bash -c '
    trap : TERM
    folder="$1"
    shift
    "$@" && code=0 || code=$?
    echo "$code" >"$folder/exit.tmp" && mv "$folder/exit.tmp" "$folder/exit"
  ' "m3jax-run-$run" "$folder" "$@" >>"$folder/log" 2>&1 </dev/null &
  echo "$!" >"$folder/pid"
  status "$run"
}

stop() {
  local run="$1" second
  if alive "$run"; then
    kill -TERM -- "-$(cat "$runs/$run/pid")"
    for ((second = 0; second < stop_seconds; second++)); do
      alive "$run" || break
      sleep 1
    done
    if alive "$run"; then
      echo "$HOSTNAME: $run did not end in $stop_seconds s, killed" >&2
      kill -KILL -- "-$(cat "$runs/$run/pid")"
      sleep 1
    fi
  fi
  status "$run"
}

logs() {
  local log="$runs/$1/log"
  if [[ ! -f "$log" ]]; then
    echo "error: no run $1 on $HOSTNAME; the runs here: $(ls "$runs" 2>/dev/null)" >&2
    return 1
  fi
  if [[ "$2" == "0" ]]; then
    exec tail -n 100 -F --pid="$(cat "$runs/$1/pid")" "$log"
  fi
  tail -n 100 -F --pid="$(cat "$runs/$1/pid")" "$log" | sed -u "s/^/$HOSTNAME: /"
}

unpack() { # the archive $1 over the tree; files of the version before that are gone go, others stay
  mkdir -p "$tree" "$runs"
  tar -tzf "$1" | grep -v '/$' | sort >"$runs/.files.new"
  if [[ -f "$runs/.files" ]]; then
    comm -23 "$runs/.files" "$runs/.files.new" | (cd "$tree" && tr '\n' '\0' | xargs -0 rm -f --)
  fi
  tar -xzf "$1" -C "$tree"
  mv "$runs/.files.new" "$runs/.files"
}

install() {
  local folder
  for folder in "$runs"/*/; do
    [[ -d "$folder" ]] || continue
    if alive "$(basename "$folder")"; then
      echo "error: the run $(basename "$folder") goes on on $HOSTNAME; end it with the subcommand" \
        "stop before another version is installed" >&2
      return 2
    fi
  done
  unpack "$1"
  # shellcheck source=launch/environment.sh
  source "$tree/launch/environment.sh"
  # Images of TPU VMs come with Python 3.10, some without ensurepip: uv brings an interpreter.
  if [[ ! -x "$M3JAX_VENV/bin/python" ]] && ! find_python >/dev/null 2>&1; then
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -q --user --upgrade uv
    python3 -m uv venv --seed --python 3.13 "$M3JAX_VENV"
  fi
  prepare_environment tpu,gcs
  echo "m3jax-worker $HOSTNAME installed"
}

main() {
  case "${1:-}" in
    install | start | status | logs | stop) "$@" ;;
    *)
      echo "error: launch/tpu_worker.sh is called by launch/tpu_vm.sh; see its --help" >&2
      exit 2
      ;;
  esac
}

main "$@"
exit # the script may have been replaced by its own install
