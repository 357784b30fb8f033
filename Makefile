# `make demo` and `make test` need nothing but make and a Python >= 3.12.

PYTHON := $(shell for p in python3.13 python3.12 python3; do \
  if $$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then echo $$p; break; fi; done)
BIN := .venv/bin
WORKERS ?= 2
OLDEST_JAX := 0.11.2

.PHONY: protos demo examples clients node test test-slow check check-deploy check-cpu-kernels check-gpu-compile check-jax-range format wheel-test bench clean

demo: .venv/installed
	@printf '%s\n' '/set temperature 0' 'Hello!' 'What is 23 + 58?' \
	  'What is the capital of France?' 'Name: Ann, age: 30' '안녕하세요' /clear 'Tell me a story.' /stats \
	  | $(BIN)/quire chat

# As a reader of examples/*/README.md does it; quire's own environment only runs the server.
examples: node .venv/installed .venv-examples/installed examples/typescript/node_modules/.package-lock.json
	cd examples/python && ../../.venv-examples/bin/python -m grpc_tools.protoc -I ../../protos/quire/v1 \
	  --python_out=. --pyi_out=. --grpc_python_out=. inference.proto
	cd examples/typescript && npm run --silent build
	$(BIN)/python examples/run.py

# Programs that others wrote, in front of `quire serve`; their packages are not quire's.
clients: node .venv/installed .venv-clients/installed examples/clients/node_modules/.package-lock.json
	$(BIN)/python examples/run_clients.py
	$(BIN)/python examples/run_schema.py

node:
	@node -e 'process.exit(parseInt(process.versions.node) < 20 ? 1 : 0)' 2>/dev/null && npm --version >/dev/null 2>&1 || \
	  { echo "make examples and make clients need Node >= 20 with npm: install them and run make again"; exit 1; }

test: .venv/installed-test
	$(BIN)/python -m pytest -q -m "not slow and not gpu and not gpu_compile" -n $(WORKERS) --dist loadfile

test-slow: .venv/installed-test
	$(BIN)/python -m pytest -q -m "slow and not gpu and not gpu_compile"

check: .venv/installed-lint .venv-protos/installed check-deploy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python tests/run_mypy.py
	cd .venv && bin/lint-imports --config ../.importlinter
	$(BIN)/python protos/lint.py
	.venv-protos/bin/python protos/generate.py --check

check-deploy: .venv/installed-lint
	$(BIN)/python deploy/lint.py

# What the library is made of, without Python: sanitizers, and another processor in an emulator.
check-cpu-kernels: .venv/installed
	$(BIN)/python tests/run_kernel_driver.py

# The GPU's programs and kernels, compiled for an H200 without one.
check-gpu-compile: .venv-gpu/installed
	.venv-gpu/bin/python -m pytest -q -m gpu_compile tests/gpu_compile

# The oldest jax that quire takes; the newest is what everything else runs with. Without the C++ kernels,
# which are built for the newest.
check-jax-range: .venv-jax-$(OLDEST_JAX)/installed
	.venv-jax-$(OLDEST_JAX)/bin/python -m pytest -q -m gpu_compile tests/gpu_compile
	.venv-jax-$(OLDEST_JAX)/bin/python -m pytest -q -m "not slow and not gpu and not gpu_compile" \
	  tests/kernels tests/layers --ignore-glob 'tests/kernels/test_native*.py' --ignore tests/layers/test_sharded.py

format: .venv/installed-lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: .venv-protos/installed
	.venv-protos/bin/python protos/generate.py

wheel-test:
	bash tests/wheel_test.sh $(PYTHON)

bench: .venv/installed
	for b in roofline startup step_host programs; do $(BIN)/python -m quire.bench.$$b || exit 1; done

.venv/installed: pyproject.toml cpu_kernels/build.py $(wildcard cpu_kernels/csrc/*.*)
	@test -n "$(PYTHON)" || { echo "quire needs Python >= 3.12: install python3.12 and run make again"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	@touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test]'
	@touch $@

.venv/installed-lint: .venv/installed-test
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test,lint]'
	@touch $@

# Apart: this protoc needs an older protobuf than sentencepiece does. What it generates runs with both.
.venv-protos/installed:
	test -x .venv-protos/bin/python || $(PYTHON) -m venv .venv-protos
	.venv-protos/bin/python -m pip install -q --disable-pip-version-check grpcio-tools==1.76.0 setuptools
	@touch $@

# jax's plugin and ptxas without the libraries that only a GPU needs: 400 MB instead of 4 GB.
GPU_COMPILER = --no-deps jax-cuda13-plugin==$$v jax-cuda13-pjrt==$$v 'nvidia-cuda-nvcc==13.0.*' 'nvidia-nvvm==13.0.*'

# After .venv: the C++ kernels in this folder are built for the jaxlib of the environment that needs
# them first, and are to be those of .venv.
.venv-gpu/installed .venv-jax-$(OLDEST_JAX)/installed: pyproject.toml | .venv/installed
	@test -n "$(PYTHON)" || { echo "quire needs Python >= 3.12: install python3.12 and run make again"; exit 1; }
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q --disable-pip-version-check -e '.[test]' $(patsubst .venv-jax-%,jax==%,$(filter .venv-jax-%,$(@D)))
	v=$$($(@D)/bin/python -c 'import jax; print(jax.__version__)') && \
	  $(@D)/bin/python -m pip install -q --disable-pip-version-check $(GPU_COMPILER)
	@touch $@

.venv-examples/installed: examples/python/requirements.txt
.venv-clients/installed: examples/clients/requirements.txt

.venv-examples/installed .venv-clients/installed:
	@test -n "$(PYTHON)" || { echo "quire needs Python >= 3.12: install python3.12 and run make again"; exit 1; }
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q --disable-pip-version-check -r $<
	@touch $@

examples/%/node_modules/.package-lock.json: examples/%/package-lock.json
	cd examples/$* && npm ci --loglevel=error
	@touch $@

clean:
	rm -rf .venv .venv-* build dist *.egg-info
	rm -rf examples/python/inference_pb2* examples/*/node_modules examples/typescript/dist examples/typescript/src/generated
