#!/bin/bash
# Called by the scripts in slurm/ on the batch host: find a Python that can run the host side, and become it.
# MOE_PYTHON, else .host (`make host`), else .venv (`make setup`), else python3.
set -u
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd) || exit 66
python=${MOE_PYTHON:-}
for candidate in "$root/.host/bin/python" "$root/.venv/bin/python"; do
  if [[ -z $python && -x $candidate ]]; then python=$candidate; fi
done
python=${python:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  version=$("$python" --version 2>&1 | head -n 1) || true
  echo "moe-recipes: error: $python on $(hostname) is no Python 3.11 or newer (${version:-not found}):" \
    "run \`make host PYTHON=python3.11\` in $root, or set MOE_PYTHON" >&2
  exit 78
fi
look='import importlib.util as u, sys; sys.exit(any(u.find_spec(name) is None for name in ("submitit", "yaml")))'
if ! "$python" -c "$look"; then
  echo "moe-recipes: error: $python on $(hostname) has no submitit or no PyYAML: run \`make host\` in $root, or set" \
    "MOE_PYTHON to a Python that has both" >&2
  exit 78
fi
# Slurm may have loaded a login environment, and sbatch --export=ALL a whole shell: keys in them end here.
kept=()
for name in PATH LD_LIBRARY_PATH HOME USER LOGNAME LANG TMPDIR "${!SLURM@}" "${!MOE_@}"; do
  if [[ -v $name ]]; then kept+=("$name=${!name}"); fi
done
cd "$root" || exit 66
exec env -i "${kept[@]}" "$python" -u -m moe_recipes.launch.slurm.inside "$@"
