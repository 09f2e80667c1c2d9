#!/usr/bin/env bash
# Sets everything up and runs the tests; arguments go to pytest.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
extra=test source "$here/.ci/environment"
cd "$here"
exec .venv/bin/python -m pytest "$@"
