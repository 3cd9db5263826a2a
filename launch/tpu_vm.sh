#!/usr/bin/env bash
# Rents a slice of TPU VMs and trains on it: a thin layer over gcloud. See --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
Rents a slice of TPU VMs, runs a command on all of its workers, and keeps it running.

  bash launch/tpu_vm.sh SUBCOMMAND [flags] [-- COMMAND…]

Subcommands
  create    Rent the slice and wait until it is ready: on demand, with --spot, or from the queue
            with --queued.
  install   Copy this tree (or --ref) to ~/m3jax of every worker and make ~/m3jax-venv there with
            Python 3.11 or newer and pip install -c constraints.txt -e '.[tpu,gcs]'.
  run       Start COMMAND in ~/m3jax on all workers at once, in the background: it survives the
            connection. Its output goes to ~/m3jax-runs/RUN/log of each worker.
  watch     The whole loop: create and install what is missing, run COMMAND, and look every --poll
            seconds. A slice that was preempted is deleted, rented again, and COMMAND started again,
            which resumes. Ends with the code of COMMAND. Ctrl-C ends the watching, not the run;
            the same call goes on watching. The slice stays rented in the end: delete it.
  logs      The log of --worker (0), followed until the run ends.
  status    State of the slice, and of the run on every worker.
  stop      SIGTERM to the run on all workers.
  fetch     Copy metrics.jsonl and pictures of the stages, and report/, from --workdir to --to.
  delete    Give the slice back; what is on its disks is lost.

Flags; each is also read from the environment, --name from M3JAX_TPU_NAME and so on
  --name=NAME           Name of the slice, and of its request in the queue. Required.
  --zone=ZONE           Zone, for example us-west4-a. Required.
  --project=PROJECT     Project; default: that of gcloud.
  --type=TYPE           Accelerator type, for example v5litepod-256. Required by create and watch.
  --version=VERSION     Runtime version; default: the one for JAX on that type.
  --spot                Cheaper machines that may be preempted at any time.
  --queued              Through a queued resource: waits in line for capacity.
  --valid_until=6h      With --queued: give up the place in the line after this time.
  --reserved            Capacity of a reservation.
  --network=NETWORK     Network, with --subnetwork=SUBNETWORK.
  --internal_ips        Workers without external addresses; call this from inside the network.
  --service_account=A   Account of the workers; it must be allowed to use the bucket.
  --ref=REF             Commit, branch or tag to install instead of the working tree.
  --run=RUN             Name of the run on the workers; default: train.
  --worker=all          Workers of run, status and stop (all) and of logs (0): all, 3, 0-3 or 0,2.
  --workdir=DIR         Of fetch: the --workdir of the training command, gs:// or on worker 0.
  --stages=A,B          Of fetch: default warmup,continual.
  --to=DIR              Of fetch: local folder; default runs/NAME.
  --poll=60             Seconds between two looks of create and watch.
  --retries=50          Of watch: how often to rent the slice again, or to start COMMAND again on
                        machines that lost it.
  --restarts=0          Of watch: how often to start a COMMAND again that failed on a healthy slice
                        (never after code 2, a mistake in the command).
  --dry_run             Print every command, one a line, ready to paste; execute nothing. Loops are
                        shown once, for a slice that does not exist yet and a run that succeeds.
  --help                This text.

Exit codes: that of COMMAND (watch), 2 for a mistake in the call, 1 for everything else.
TEXT
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/tpu_commands.sh
source "$root/launch/tpu_commands.sh"
remote=m3jax              # the tree in the home of a worker, as in launch/tpu_worker.sh
unreachable_limit=30      # looks in a row without an answer before a wait ends
subcommand="" user_command=()
name="${M3JAX_TPU_NAME:-}" zone="${M3JAX_TPU_ZONE:-}" project="${M3JAX_TPU_PROJECT:-}"
type="${M3JAX_TPU_TYPE:-}" version="${M3JAX_TPU_VERSION:-}" ref="${M3JAX_TPU_REF:-}"
spot="${M3JAX_TPU_SPOT:-}" queued="${M3JAX_TPU_QUEUED:-}" reserved="${M3JAX_TPU_RESERVED:-}"
valid_until="${M3JAX_TPU_VALID_UNTIL:-}" network="${M3JAX_TPU_NETWORK:-}"
subnetwork="${M3JAX_TPU_SUBNETWORK:-}" internal_ips="${M3JAX_TPU_INTERNAL_IPS:-}"
service_account="${M3JAX_TPU_SERVICE_ACCOUNT:-}" run="${M3JAX_TPU_RUN:-train}"
worker="${M3JAX_TPU_WORKER:-}" workdir="${M3JAX_TPU_WORKDIR:-}" to="${M3JAX_TPU_TO:-}"
stages="${M3JAX_TPU_STAGES:-warmup,continual}" poll="${M3JAX_TPU_POLL:-60}"
retries="${M3JAX_TPU_RETRIES:-50}" restarts="${M3JAX_TPU_RESTARTS:-0}"
dry_run="${M3JAX_TPU_DRY_RUN:-}"

refuse() { # a mistake in the call
  echo "error: $*; see bash launch/tpu_vm.sh --help" >&2
  exit 2
}

say() { [[ -n "$dry_run" ]] || echo "$(date +%H:%M:%S) $*" >&2; }

pause() { [[ -n "$dry_run" ]] || sleep "$poll"; }

# --- the call ------------------------------------------------------------------------------------

set_flag() {
  case "$1" in
    name | zone | project | type | version | ref | network | subnetwork | valid_until | run | worker | \
      service_account | workdir | stages | to | poll | retries | restarts) ;;
    spot | queued | reserved | internal_ips | dry_run) ;;
    *) refuse "unknown flag --$1" ;;
  esac
  printf -v "$1" '%s' "$2"
}

parse() {
  while (($#)); do
    case "$1" in
      --help | -h)
        usage
        exit 0
        ;;
      --)
        shift
        user_command=("$@")
        return
        ;;
      --spot | --queued | --reserved | --internal_ips | --dry_run) set_flag "${1#--}" 1 ;;
      --*=*)
        local pair="${1#--}"
        set_flag "${pair%%=*}" "${pair#*=}"
        ;;
      --*)
        (($# > 1)) || refuse "$1 needs a value"
        set_flag "${1#--}" "$2"
        shift
        ;;
      *)
        [[ -z "$subcommand" ]] || refuse "unexpected argument $1 (a command follows after --)"
        subcommand="$1"
        ;;
    esac
    shift
  done
}

switch() { # 1 or nothing for the boolean flag $1
  case "${!1}" in
    1 | true) printf -v "$1" 1 ;;
    "" | 0 | false) printf -v "$1" '' ;;
    *) refuse "--$1 is ${!1}; it takes no value, or true or false" ;;
  esac
}

check() {
  local flag
  case "$subcommand" in
    create | install | run | watch | logs | status | stop | fetch | delete) ;;
    "") refuse "no subcommand" ;;
    *) refuse "unknown subcommand $subcommand" ;;
  esac
  for flag in spot queued reserved internal_ips dry_run; do switch "$flag"; done
  [[ -n "$name" ]] || refuse "--name is missing (or M3JAX_TPU_NAME)"
  [[ "$name" =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
    refuse "--name is $name; a name has small letters, digits and dashes"
  [[ -n "$zone" ]] || refuse "--zone is missing (or M3JAX_TPU_ZONE)"
  [[ "$run" =~ ^[A-Za-z0-9_][A-Za-z0-9_.-]*$ ]] ||
    refuse "--run is $run; a run has letters, digits, dashes, dots and underscores"
  [[ "$worker" =~ ^(all|[0-9]+([-,][0-9]+)*)?$ ]] || refuse "--worker is $worker; all, 3, 0-3 or 0,2"
  for flag in poll retries restarts; do
    [[ "${!flag}" =~ ^[0-9]+$ ]] || refuse "--$flag is ${!flag}; a whole number is needed"
  done
  [[ -z "$valid_until" || -n "$queued" ]] || refuse "--valid_until needs --queued"
  case "$subcommand" in
    run | watch) ((${#user_command[@]})) || refuse "$subcommand needs a command after --" ;;
    *) ((${#user_command[@]} == 0)) || refuse "$subcommand takes no command after --" ;;
  esac
  case "$subcommand" in
    create | watch)
      [[ -n "$type" ]] || refuse "--type is missing (or M3JAX_TPU_TYPE)"
      [[ -n "$version" ]] || version="$(runtime_version)" || exit 2
      ;;
    fetch)
      [[ -n "$workdir" ]] || refuse "--workdir is missing (or M3JAX_TPU_WORKDIR)"
      [[ "$to" != *:/* ]] || refuse "--to is $to; name a local folder"
      ;;
  esac
  if [[ -z "$dry_run" ]] && ! command -v gcloud >/dev/null; then
    refuse "gcloud is not on the PATH; install it from https://cloud.google.com/sdk/docs/install," \
      "then: gcloud auth login"
  fi
}

runtime_version() { # the one Google names for JAX on the accelerator type
  case "$type" in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) refuse "no runtime version known for --type=$type; name one with --version" ;;
  esac
}

# --- the slice -----------------------------------------------------------------------------------

state="" unknown=0
look() { # state of the slice: READY, ABSENT, UNKNOWN, or what gcloud calls it
  local kind=tpu-vm format='value(state)' before="$state"
  for kind in ${queued:+queued-resources} tpu-vm; do
    [[ "$kind" == tpu-vm ]] && format='value(state)' || format='value(state.state)'
    if ask gcloud compute tpus "$kind" describe "$name" "${place[@]}" --format="$format"; then
      state="$(grep -Eo '^[A-Z_]+$' <<<"$answer" | tail -n 1)" || state=UNKNOWN
    elif [[ "$answer" == *NOT_FOUND* ]]; then
      state=ABSENT
    else
      state=UNKNOWN
      [[ "$before" == UNKNOWN ]] || say "$answer"
    fi
    [[ -n "$dry_run" ]] && state=READY
    # A request that is ACTIVE may hold a machine that is not: look at that too.
    [[ "$state" == ACTIVE || -n "$dry_run" ]] || break
  done
  [[ "$state" == "$before" ]] || say "$name is $state"
  [[ "$state" == UNKNOWN ]] && unknown=$((unknown + 1)) || unknown=0
  if ((unknown >= unreachable_limit)); then
    echo "error: no state of $name in $unknown looks. What runs there goes on; when gcloud answers" \
      "again, the same command goes on too. Its last answer: $answer" >&2
    exit 1
  fi
}

gone() { # whether the state is one that no waiting mends
  case "$state" in
    PREEMPTED | TERMINATED | STOPPED | HIDDEN | SUSPENDED | FAILED | ABSENT) return 0 ;;
    *) return 1 ;;
  esac
}

create() {
  local flags=() kind=tpu-vm
  flags+=(${spot:+--spot} ${reserved:+--reserved} ${network:+--network="$network"})
  flags+=(${subnetwork:+--subnetwork="$subnetwork"} ${internal_ips:+--internal-ips})
  flags+=(${service_account:+--service-account="$service_account"})
  if [[ -n "$queued" ]]; then
    kind="queued-resources"
    execute gcloud compute tpus "$kind" create "$name" --node-id="$name" "${place[@]}" \
      --accelerator-type="$type" --runtime-version="$version" ${flags[@]+"${flags[@]}"} \
      ${valid_until:+--valid-until-duration="$valid_until"} --quiet || return
  else
    execute gcloud compute tpus "$kind" create "$name" "${place[@]}" \
      --accelerator-type="$type" --version="$version" ${flags[@]+"${flags[@]}"} --quiet || return
  fi
  while look && [[ "$state" != READY ]]; do
    if gone; then
      echo "error: $name is $state instead of READY; the reason is in the answer of:" \
        "$(quoted gcloud compute tpus "$kind" describe "$name" "${place[@]}")" >&2
      return 1
    fi
    pause
  done
}

delete() {
  if [[ -n "$queued" ]]; then
    execute gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
  else
    execute gcloud compute tpus tpu-vm delete "$name" "${place[@]}" --quiet
  fi
}

pack() { # the tree, or --ref of it, as $1
  local index="${1%.tar.gz}.index" tree="$ref"
  execute mkdir -p "$(dirname "$1")" || return
  if [[ -z "$ref" ]]; then
    # Through an index of its own: what is changed and what is new goes too, what git ignores not.
    execute rm -f "$index" || return
    execute env GIT_INDEX_FILE="$index" git -C "$root" read-tree HEAD || return
    execute env GIT_INDEX_FILE="$index" git -C "$root" add --all || return
    if [[ -n "$dry_run" ]]; then
      echo "git -C $(quoted "$root") archive --format=tar.gz --output=$(quoted "$1")" \
        "\"\$(env GIT_INDEX_FILE=$(quoted "$index") git -C $(quoted "$root") write-tree)\""
      return
    fi
    tree="$(env GIT_INDEX_FILE="$index" git -C "$root" write-tree)" || return
  fi
  execute git -C "$root" archive --format=tar.gz --output="$1" "$tree"
}

install() {
  local archive="${XDG_CACHE_HOME:-$HOME/.cache}/m3jax/$name.tar.gz"
  pack "$archive" || return
  execute gcloud compute tpus tpu-vm scp "$archive" "$name:$remote.tar.gz" "${place[@]}" \
    --worker=all ${internal_ips:+--internal-ip} --quiet || return
  # The archive brings the script that installs it.
  on_workers execute all "mkdir -p $remote && tar -xzf $remote.tar.gz -C $remote launch &&\
 bash $remote/launch/tpu_worker.sh install $remote.tar.gz"
}

# --- the loop ------------------------------------------------------------------------------------

run_state="" run_code=""
look_at_run() { # run_state: running, other, finished, failed (with run_code), broken or silent
  local complete=1 lines mine
  mine="$(printf '%s\0' "${user_command[@]}" | cksum | cut -d' ' -f1)"
  on_run ask all status "$run" || complete=0
  lines="$(grep '^m3jax-worker ' <<<"$answer" | sort)" || lines=""
  run_code="$(awk '$3 == "exited" && $4 != 0 {print $4; exit}' <<<"$lines")"
  run_state="$(awk -v mine="$mine" -v complete="$complete" -v code="$run_code" '
    NF {n++; count[$3]++}
    $3 == "running" && $4 != mine {other = 1}
    END {
      if (!n) print "silent"
      else if (code != "") print "failed"
      else if (count["none"] + count["lost"]) print "broken"
      else if (count["running"]) print (other ? "other" : "running")
      else print (complete ? "finished" : "silent") # silent: the others do not answer
    }' <<<"$lines")"
  [[ -z "$dry_run" ]] || run_state=finished
}

outcome=""
attend() { # until the run is over. outcome: gone, broken, finished, failed or silent
  local before="" silent=0
  while :; do
    look
    if gone; then
      outcome=gone
      return
    fi
    run_state=""
    [[ "$state" == READY ]] && look_at_run
    case "$run_state" in
      running) before="" silent=0 ;;
      silent) silent=$((silent + 1)) ;;
      finished | failed | broken | other)
        # Said twice: a slice that is being preempted ends its commands (with code 0, after a
        # checkpoint) before its state says so.
        if [[ "$run_state" == "$before" || -n "$dry_run" ]]; then
          outcome="$run_state"
          return
        fi
        before="$run_state"
        say "the run $run seems $run_state; looking again"
        ;;
    esac
    if ((silent >= unreachable_limit)); then
      outcome=silent
      return
    fi
    pause
  done
}

bring_up() { # from any state of the slice to a started command
  if gone; then
    [[ "$state" == ABSENT ]] || delete || return
    create || return
  else
    while [[ "$state" != READY ]]; do
      pause
      look
      gone && return 1
    done
    on_run ask all stop "$run" || true # what is left of a run that started or ended in part
  fi
  install || return
  on_run execute all start "$run" "${user_command[@]}"
}

losses=0
again() { # counts a loss, refuses one too many; $1: what happened
  losses=$((losses + 1))
  if ((losses > retries)); then
    echo "error: $1; that was attempt $losses, and --retries=$retries. The same command goes on" \
      "from the last checkpoint. $name may still be rented: see the subcommands status, delete" >&2
    exit 1
  fi
  say "$1; trying again, $losses of $retries"
}

ensure_up() { # bring_up, repeatedly
  local code
  while :; do
    bring_up && return
    code=$?
    ((code != 2)) || exit 2 # a mistake in the call: gcloud, or a worker, has said which
    again "$name could not be brought up"
    pause
    look
  done
}

give_up() { # the command failed: the end of its log, then its code
  on_workers execute 0 "tail -n 30 m3jax-runs/$run/log" || true
  echo "error: the run $run failed with code $run_code; the end of its log on worker 0 is above." \
    "$name is still rented: give it back with the subcommand delete" >&2
  exit "$run_code"
}

watch() {
  local started=0
  look
  if [[ -n "$dry_run" ]]; then
    state=ABSENT
  elif [[ "$state" == UNKNOWN ]]; then
    echo "error: gcloud does not tell the state of $name, see above" >&2
    return 1
  elif [[ "$state" == READY ]]; then
    look_at_run
  fi
  [[ "$run_state" != other ]] ||
    refuse "the run $run on $name is another command; choose another --run, or stop it first"
  if [[ "$run_state" == running ]]; then say "the run $run goes on; watching it"; else ensure_up; fi
  while :; do
    attend
    case "$outcome" in
      finished)
        say "the run $run has finished. $name is still rented: give it back with the subcommand delete"
        return 0
        ;;
      gone) again "$name was lost ($state)" ;;
      broken) again "the machines of $name lost the run $run" ;;
      failed)
        on_run ask all stop "$run" || true # the others may wait for the one that failed
        if [[ "$run_code" == 2 ]] || ((started >= restarts)); then give_up; fi
        started=$((started + 1))
        say "the run $run failed with code $run_code: starting it again, $started of $restarts"
        ;;
      other | silent)
        echo "error: $name does not tell how the run $run goes ($outcome); it may go on there. When" \
          "the connection is back, the same command goes on watching. Last answer: $answer" >&2
        return 1
        ;;
    esac
    ensure_up
  done
}

# --- the other subcommands -----------------------------------------------------------------------

start_run() {
  local code=0
  on_run execute "${worker:-all}" start "$run" "${user_command[@]}" || code=$?
  ((code != 127)) || refuse "$remote is not on the workers; use the subcommand install first"
  return "$code"
}

show_status() {
  look
  [[ -n "$dry_run" ]] || echo "$name $state"
  case "$state" in
    READY) on_run execute "${worker:-all}" status "$run" ;;
    UNKNOWN) return 1 ;; # the reason is above
  esac
}

fetch() {
  local target="${to:-runs/$name}" source="${workdir%/}" stage file copied=0 list
  local copy=(gcloud storage cp) last=() recursive=--recursive
  target="${target/#\~\//$HOME/}" # a shell leaves the ~ of --to=~/x as it is
  if [[ "$source" != gs://* ]]; then
    case "$source" in
      /*) ;;
      "~/"*) source="${source:2}" ;; # relative to the home of a worker
      *) source="$remote/$source" ;;
    esac
    source="$name:$source"
    copy=(gcloud compute tpus tpu-vm scp)
    last=("${place[@]}" --worker=0 ${internal_ips:+--internal-ip} --quiet)
    recursive=--recurse
  fi
  IFS=, read -r -a list <<<"$stages"
  for stage in "${list[@]}"; do
    execute mkdir -p "$target/$stage"
    for file in 'metrics.jsonl*' '*.png'; do  # long metrics are in parts in a bucket
      # What a run has not written yet is no error.
      execute "${copy[@]}" "$source/$stage/$file" "$target/$stage/" ${last[@]+"${last[@]}"} &&
        copied=$((copied + 1))
    done
  done
  execute "${copy[@]}" "$recursive" "$source/report" "$target/" ${last[@]+"${last[@]}"} &&
    copied=$((copied + 1))
  if ((copied == 0)); then
    echo "error: nothing copied from $workdir; is it the --workdir of the training command?" >&2
    return 1
  fi
  say "copied to $target"
}

main() {
  (($#)) || refuse "no subcommand"
  parse "$@"
  check
  place=(--zone="$zone" ${project:+--project="$project"})
  case "$subcommand" in
    run) start_run ;;
    logs) on_run execute "${worker:-0}" logs "$run" "${worker:-0}" ;;
    stop) on_run execute "${worker:-all}" stop "$run" ;;
    status) show_status ;;
    *) "$subcommand" ;;
  esac
}

main "$@"
