# Sourced by the other scripts of this folder: makes the virtual environment and installs m3jax.
#
# prepare_environment EXTRAS sets `python` to the environment's interpreter. EXTRAS is empty or a
# list such as "test" or "dev,parity". The environment is .venv of the repository, or M3JAX_VENV.
# Returns at once where the same versions were installed before.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

find_python() {
  local candidate
  for candidate in python3.13 python3.12 python3.11 python3; do
    # A name on the PATH may be a shim without an interpreter behind it: run it.
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 or newer found (tried python3.13, python3.12, python3.11, python3);" \
    "install one from https://www.python.org or your package manager, and put it on the PATH" >&2
  return 1
}

prepare_environment() {
  local extras="$1" target found stamp wanted
  local venv="${M3JAX_VENV:-$root/.venv}"
  target="$root${extras:+[$extras]}"
  python="$venv/bin/python"
  if ! "$python" -c '' >/dev/null 2>&1; then
    found="$(find_python)"
    echo "making a virtual environment in $venv with $("$found" --version)" >&2
    if ! "$found" -m venv "$venv"; then
      echo "error: $found cannot make a virtual environment in $venv; check that the folder can be" \
        "written and that Python's venv module is installed (Debian, Ubuntu: apt install python3-venv)" >&2
      return 1
    fi
  fi
  stamp="$venv/.m3jax-${extras:-core}"
  wanted="$root $(cat "$root/setup.py" "$root/constraints.txt" | cksum)"
  if [[ ! -f "$stamp" || "$(cat "$stamp")" != "$wanted" ]]; then
    echo "installing m3jax${extras:+[$extras]} into $venv (a few minutes the first time)" >&2
    if ! "$python" -m pip install -q --disable-pip-version-check --progress-bar off \
      -c "$root/constraints.txt" -e "$target"; then
      echo "error: the installation failed, see above; run the command again to retry" >&2
      return 1
    fi
    echo "$wanted" >"$stamp"
  fi
}

# Large arrays in large pages, where glibc knows this: half of the time in the kernel, about a tenth.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
