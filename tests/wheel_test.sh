#!/usr/bin/env bash
# Build the wheel, install it in an empty environment outside the checkout, generate one token.
# usage: wheel_test.sh PYTHON
set -euo pipefail
checkout=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# From a copy of what git knows: a build leaves nothing in the checkout and sees nothing of it.
mkdir "$work/source"
git -C "$checkout" ls-files -z | (cd "$checkout" && xargs -0 cp --parents -t "$work/source")
"$1" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check build
"$work/venv/bin/python" -m build -q --wheel --outdir "$work/dist" "$work/source"
"$1" -m venv --clear "$work/venv"
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check "$work"/dist/*.whl
cd "$work"
export QUIRE_CACHE_DIR="$work/cache"
text=$("$work/venv/bin/quire" generate --prompt "Hello" --max-tokens 1 --temperature 0 --ignore-eos \
  --token-buckets 8,64 --max-num-batched-tokens 64 --max-num-seqs 2)
test -n "$text" || { echo "the wheel generated nothing"; exit 1; }
echo "the wheel generates: $text"
