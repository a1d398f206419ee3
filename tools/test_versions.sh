#!/usr/bin/env bash
# The core of the suite over several versions of vLLM, each in a venv that is kept.
#   tools/test_versions.sh VERSION...
set -uo pipefail
cd "$(dirname "$0")/.."
logs=out/versions
mkdir -p "$logs"

lines=()
failed=0
for version in "$@"; do
    python=.venv-$version/bin/python
    # A version that cannot be installed is a line like the others.
    ready=.venv-$version/.ready
    if ! [[ $ready -nt pyproject.toml && $ready -nt tools/make_venv.sh ]] && ! tools/make_venv.sh "$version"; then
        lines+=("$version  not installed")
        failed=1
        continue
    fi
    echo "vLLM $version"
    "$python" -m pytest -q -m "core and not gpu" -n 2 --dist worksteal 2>&1 | tee "$logs/$version.log" || failed=1
    torch=$("$python" -c 'from importlib.metadata import version; print(version("torch"))')
    # pytest's own last line: "3 passed, 1 failed in 200.00s (0:03:20)"
    lines+=("$version  torch $torch  $(tail -n 1 "$logs/$version.log" | tr -d =)")
done
printf '%s\n' "" "${lines[@]}"
exit "$failed"
