#!/usr/bin/env bash
# Installs m3jax and its test tools into a virtual environment where that has not been done, then
# runs all tests but the comparisons with foreign implementations.
#
#   bash launch/test.sh [arguments of pytest]
#   bash launch/test.sh -m "not slow and not parity"    # the fast ones
#   bash launch/test.sh -n 0                            # in one process, as a debugger needs it
#
# M3JAX_VENV=FOLDER puts the environment somewhere else than .venv of the repository.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment "test"
cd "$root"
exec "$python" -m pytest -m "not parity" -n auto --maxprocesses=8 --dist=worksteal "$@"
