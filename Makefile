# Clotline. `make help` lists the targets. All that is installed lies in .venv and .triton.
SHELL := /bin/bash
.ONESHELL:
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= $(shell command -v python3.11 || command -v python3)
DATA ?=
OUT ?= runs/demo
MLFLOW_URI ?= sqlite:///runs/mlflow.db
MLFLOW_PORT ?= 5000
PY := .venv/bin/python
unexport PYTHONPATH
unexport PYTHONHOME
# What zig makes of the system's libraries, once for all that it compiles.
export ZIG_GLOBAL_CACHE_DIR ?= $(CURDIR)/.venv/.zig

.PHONY: help install demo test lint pytest format bench dashboards preview mlflow-ui up down status clean \
  deploy-local deploy-docker shutdown logs

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

install: .venv/.installed ## set up .venv (training, clients) and .triton (the embedded tritonserver)
	@$(MAKE) --silent --jobs 2 .venv/.native .triton/installed.json
	echo "installed: .venv ($$($(PY) --version)), .triton (tritonserver)"

# --no-compile: Python compiles a module when it is first imported; compiling all of them would take a minute or two. PyTorch is
# imported here, because stubs of tritonserver, which import it too, write no bytecode.
# uv installs in seconds what takes pip a minute or two. It knows PyPI alone: where pip is told another index, or uv fails, pip does it.
.venv/.installed: pyproject.toml constraints.txt
	@echo "installing Clotline and the versions of constraints.txt into .venv (PyTorch is large: this takes minutes)"
	test -x .venv/bin/python || "$(PYTHON)" -m venv .venv
	pip=($(PY) -m pip --disable-pip-version-check --quiet)
	what=(--no-compile --constraint constraints.txt)
	"$${pip[@]}" install "$${what[@]}" torch torchvision
	if $(PY) -m pip config list 2>/dev/null | grep '\.index-url=' >/dev/null || ! "$${pip[@]}" install "$${what[@]}" uv ||
	  ! .venv/bin/uv pip install --quiet --system-certs --cache-dir .venv/.uv --python $(PY) --constraint constraints.txt --editable '.[dev]'; then
	  "$${pip[@]}" install "$${what[@]}" --editable '.[dev]'
	fi
	rm -rf .venv/.uv
	$(PY) -c 'import torch'
	touch $@

# Without them tiles are decoded by libjpeg-turbo: the same pixels, a third slower; bad JSON is answered 500, not 400, and tritonserver keeps the memory of large requests.
.venv/.native: .venv/.installed $(wildcard $(addprefix slides/native/*.,c h py) $(addprefix serving/native/*.,c py))
	@$(PY) -m slides.native || true
	$(PY) -m serving.native || true
	touch $@

.triton/installed.json: .venv/.installed serving/server-requirements.txt serving/embedded.py
	@$(PY) -m serving install
	touch $@

demo: install ## slides -> training -> export -> parity -> tritonserver -> predictions, report in runs/demo (DATA=DIR for your own slides)
	@PATH="$$PWD/.venv/bin:$$PATH" $(PY) -m demo --out "$(OUT)" $(if $(DATA),--data "$(DATA)")

test: install lint pytest ## lint, types, and all tests (a real tritonserver is started)

lint: install ## ruff (lint, format), mypy, bandit
	@echo "lint: ruff, mypy, bandit"
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --num-workers 2 slides training exporters serving clients perf deploy demo
	$(PY) -m bandit --quiet --severity-level medium --recursive slides training exporters serving clients perf deploy demo --configfile pyproject.toml

pytest: install ## the tests alone, several files at a time (ARGS="-k serving" to choose, ARGS="-n 0" one by one)
	@PATH="$$PWD/.venv/bin:$$PATH" $(PY) -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

format: install ## rewrite the code with ruff
	@$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: install ## speed of the served models against this machine's limit, report in runs/perf (ten minutes, leave the machine idle)
	@$(PY) -m perf install
	$(PY) -m perf report --out runs/perf

mlflow-ui: install ## MLflow on the runs tracked here, http://127.0.0.1:5000 (MLFLOW_PORT=, MLFLOW_URI=)
	@mkdir -p runs
	echo "http://127.0.0.1:$(MLFLOW_PORT) (Ctrl-C ends it)"
	export MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
	exec $(PY) -m mlflow server --host 127.0.0.1 --port "$(MLFLOW_PORT)" --workers 1 \
	  --backend-store-uri "$(MLFLOW_URI)" --artifacts-destination runs/mlflow-artifacts

up: install ## serve ./model_repository on ports 8000-8003 until Ctrl-C
	@$(PY) -m serving up --repository model_repository

deploy-local: install ## the guarded service on this machine: server, gateway, metrics, alerts (ARGS="--release DIR ...")
	@$(PY) -m deploy up $(ARGS)

deploy-docker: install ## the same in containers (PROFILE=cpu|gpu|dev; fill in docker/.env first)
	@$(PY) -m deploy docker up --profile "$(or $(PROFILE),cpu)"

shutdown: install ## stop the servers of this checkout and what guards them, containers too
	@$(PY) -m deploy down
	$(PY) -m serving down
	test ! -f docker/.env || $(PY) -m deploy docker down

down: shutdown ## the same

logs: install ## logs of the guarded service (NAME=gateway, ARGS=--follow)
	@$(PY) -m deploy logs $(NAME) $(ARGS)

status: install ## the guarded service, and the servers of this checkout
	@$(PY) -m deploy status || true
	$(PY) -m serving status

dashboards: install ## write Grafana's dashboards from deploy/dashboards*.py
	@$(PY) -m deploy dashboards

preview: install ## the dashboards as a page, from a running Prometheus (PROMETHEUS=URL)
	@$(PY) -m deploy preview --prometheus "$(or $(PROMETHEUS),http://127.0.0.1:9090)" --out runs/dashboards.html

clean: ## remove runs/, .venv and .triton
	@test ! -d .triton/deploy || $(PY) -m deploy down || true
	test ! -d .triton/run || $(PY) -m serving down || true
	rm -rf runs .venv .triton
