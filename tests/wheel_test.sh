#!/usr/bin/env bash
# Build the sdist, and the wheel from it, install that in an empty environment outside the checkout,
# generate one token by the C++ kernels; then the same without a compiler, by the jnp ops.
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
"$work/venv/bin/python" -m build -q --outdir "$work/dist" "$work/source"
CXX=/nonexistent/c++ "$work/venv/bin/python" -m build -q --wheel --outdir "$work/plain" "$work/source"
"$1" -m venv --clear "$work/venv"
export QUIRE_CACHE_DIR="$work/cache"

# Installs a wheel and generates a token: install_and_generate ATTENTION LINEAR PIP_ARGUMENTS...
install_and_generate() {
  local ops="op paged_attention $1;op linear $2;" text
  shift 2
  "$work/venv/bin/python" -m pip install -q --disable-pip-version-check "$@"
  cd "$work"
  test "$("$work/venv/bin/quire" env | grep '^op ' | tr -s ' ' | tr '\n' ';')" = "$ops" ||
    { echo "quire env of $* does not say $ops:"; "$work/venv/bin/quire" env; exit 1; }
  text=$("$work/venv/bin/quire" generate --prompt "Hello" --max-tokens 1 --temperature 0 --ignore-eos \
    --token-buckets 8,64 --max-num-batched-tokens 64 --max-num-seqs 2)
  test -n "$text" || { echo "the wheel generated nothing"; exit 1; }
  echo "$(basename "${*: -1}") generates: $text"
}

install_and_generate native native "$work"/dist/*-linux_*.whl
install_and_generate jnp xla --no-deps --force-reinstall "$work"/plain/*-none-any.whl
