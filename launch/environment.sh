# Sourced by the other scripts of this folder: makes the virtual environment and installs m3jax.
#
# prepare_environment EXTRAS [CONSTRAINTS] sets `python` to the environment's interpreter. EXTRAS is
# empty or a list such as "test" or "dev,parity". The environment is .venv of the repository, or
# M3JAX_VENV. Returns at once where the same versions were installed before.
#
# A new environment gets the newest Python of those that m3jax is tested with, or M3JAX_PYTHON.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# PYTHON VERSION: it runs (a name on the PATH may be a shim without an interpreter behind it), is of
# that version and can make environments.
is_python() {
  "$1" -c 'import ensurepip, sys
sys.exit(sys.version_info < (3, 11) or not sys.version.startswith(sys.argv[1]))' "$2" >/dev/null 2>&1
}

find_python() {
  local version candidate
  if [[ -n "${M3JAX_PYTHON:-}" ]]; then
    if is_python "$M3JAX_PYTHON" 3; then
      echo "$M3JAX_PYTHON"
      return
    fi
    echo "error: M3JAX_PYTHON=$M3JAX_PYTHON is no Python 3.11 or newer with the module ensurepip" >&2
    return 1
  fi
  for version in 3.13 3.12 3.11 3; do
    # pyenv's interpreters need not be on the PATH.
    for candidate in "python$version" "$(pyenv prefix "$version" 2>/dev/null || echo /none)/bin/python"; do
      if is_python "$candidate" "$version"; then
        echo "$candidate"
        return
      fi
    done
  done
  echo "error: no Python 3.11 or newer with the module ensurepip (tried python3.13, python3.12," \
    "python3.11, python3 and pyenv's); install one from https://www.python.org or your package" \
    "manager (Debian, Ubuntu: apt install python3-venv) and put it on the PATH, or name it in" \
    "M3JAX_PYTHON" >&2
  return 1
}

prepare_environment() {
  local extras="$1" constraints="$root/${2:-constraints.txt}" target base stamp versions
  local venv="${M3JAX_VENV:-$root/.venv}"
  venv="${venv/#\~\//$HOME/}" # a shell leaves ~ in quotes as it is
  local show='import sys; print(sys.version)'
  target="$root${extras:+[$extras]}"
  python="$venv/bin/python"
  if ! "$python" -c '' >/dev/null 2>&1; then
    base="$(find_python)" || return 1
    echo "making a virtual environment in $venv with $("$base" --version) ($base)" >&2
    if ! "$base" -m venv "$venv"; then
      echo "error: $base cannot make a virtual environment in $venv; check that the folder can be" \
        "written" >&2
      return 1
    fi
  elif [[ -n "${M3JAX_PYTHON:-}" && "$("$python" -c "$show")" != "$("$M3JAX_PYTHON" -c "$show")" ]]; then
    echo "error: the virtual environment in $venv has $("$python" --version), not that of" \
      "M3JAX_PYTHON=$M3JAX_PYTHON; remove the folder, or name another in M3JAX_VENV" >&2
    return 1
  fi
  stamp="$venv/.m3jax-${extras:-core}"
  versions="$root $(cat "$root/setup.py" "$constraints" | cksum)"
  if [[ ! -f "$stamp" || "$(cat "$stamp")" != "$versions" ]]; then
    echo "installing m3jax${extras:+[$extras]} into $venv (a few minutes the first time)" >&2
    if ! "$python" -m pip install -q --disable-pip-version-check --progress-bar off \
      -c "$constraints" -e "$target"; then
      echo "error: the installation failed, see above; run the command again to retry" >&2
      return 1
    fi
    echo "$versions" >"$stamp"
  fi
}

# Large arrays in large pages, where glibc knows this: half of the time in the kernel, about a tenth.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
