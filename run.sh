#!/usr/bin/env bash
# Sets everything up and races: ./run.sh is the same as `speedrun run`, with all its options.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/.ci/environment"
exec "$here/.venv/bin/speedrun" run "$@"
