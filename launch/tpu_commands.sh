# Sourced by launch/tpu_vm.sh: prints commands (with dry_run) or executes them, here and on workers.
#
# Reads dry_run, name, place, internal_ips and remote of that script.
# shellcheck shell=bash disable=SC2154

quoted() { # the arguments as one line for a shell
  local argument line="" single="'" escaped="'\\''"
  for argument in "$@"; do
    line+=" "
    if [[ "$argument" =~ ^--[a-z_-]+= ]]; then # --flag='a value' reads better than '--flag=a value'
      line+="${BASH_REMATCH[0]}"
      argument="${argument#*=}"
    fi
    if [[ "$argument" =~ ^[A-Za-z0-9_/.:,=@%+-]+$ ]]; then
      line+="$argument"
    elif [[ "$argument" == *[[:cntrl:]]* ]]; then
      line+="$(printf %q "$argument")" # a line break must not break the line
    else
      line+="'${argument//$single/$escaped}'"
    fi
  done
  printf '%s\n' "${line# }"
}

execute() {
  if [[ -n "$dry_run" ]]; then
    quoted "$@"
  else
    say "$(quoted "$@")"
    "$@" </dev/null # a question would wait for ever
  fi
}

answer=""
ask() { # as execute, without a word; all the command says goes to `answer`
  answer=""
  if [[ -n "$dry_run" ]]; then
    quoted "$@"
  else
    answer="$("$@" </dev/null 2>&1)"
  fi
}

on_workers() { # $1: how (execute, ask), $2: which workers, $3: a line for their shell
  "$1" gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="$2" \
    ${internal_ips:+--internal-ip} --quiet --command="$3"
}

on_run() { # $1: how, $2: which workers, then the arguments of launch/tpu_worker.sh
  local how="$1" which="$2"
  shift 2
  on_workers "$how" "$which" "$(quoted bash "$remote/launch/tpu_worker.sh" "$@")"
}
