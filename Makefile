# The first run of any target except clean sets up an environment in .venv (about 7 GB, minutes) and, unless
# COMFYUI_PATH names a ComfyUI or the checkout is in the custom_nodes of one, a copy of ComfyUI in .comfyui.
# COMFYUI=0.24 uses a copy of that release instead, with its own environment over .venv.
PYTHON ?= python3
ARGS ?=
COMFYUI ?=
BOOTSTRAP = $(PYTHON) raylight/dev/setup/bootstrap.py $(if $(COMFYUI),--comfyui $(COMFYUI))

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-gpu smoke check lint format types models versions workflows screenshots clean

help:
	@echo "make demo                   draw with a small model in a real ComfyUI, by stock nodes and by Ray workers"
	@echo "make test                   run all but the slow tests (about 28 minutes on 2 cores)"
	@echo "make test ARGS=\"-k parity\"  run the tests that a path in tests/, -k or -m selects, slow or not"
	@echo "make test-all               run all tests; some need Chromium"
	@echo "make smoke                  run a few tests that show whether a release of ComfyUI works at all"
	@echo "make check                  say what of ComfyUI is gone that Raylight stands on, in less than a minute"
	@echo "make test-gpu               run the tests that need GPUs, on all GPUs (CUDA_VISIBLE_DEVICES selects)"
	@echo "make lint                   check style (ruff), formatting (ruff format) and types (pyright)"
	@echo "make format                 format the code with ruff format"
	@echo "make models                 run the parity matrix and write docs/models.md"
	@echo "make versions               write the installed versions to tests/versions.txt, if all tests have passed with them"
	@echo "make workflows              write example_workflows from raylight/dev/workflows"
	@echo "make screenshots            run the browser tests and keep screenshots in screenshots/ (needs Chromium)"
	@echo "make setup                  set up only"
	@echo "make clean                  remove .venv, .comfyui, demo_output, screenshots and caches"
	@echo
	@echo "make test COMFYUI=0.24                use that release of ComfyUI: 0.24, 0.27 or 0.30"
	@echo "COMFYUI_PATH=/my/ComfyUI make demo    use your ComfyUI"
	@echo "make check COMFYUI_PATH=/my/ComfyUI   check yours, of whatever release, after an update"
	@echo "make demo ARGS=\"--help\"               list the options of the demo"

setup:
	@$(BOOTSTRAP) setup

demo:
	@$(BOOTSTRAP) demo $(ARGS)

test:
	@$(BOOTSTRAP) test $(ARGS)

test-all:
	@$(BOOTSTRAP) test-all $(ARGS)

smoke:
	@$(BOOTSTRAP) smoke $(ARGS)

check:
	@$(BOOTSTRAP) check

test-gpu:
	@$(BOOTSTRAP) test-gpu $(ARGS)

lint:
	@$(BOOTSTRAP) lint $(ARGS)
	@$(BOOTSTRAP) format --check
	@$(BOOTSTRAP) types

types:
	@$(BOOTSTRAP) types

format:
	@$(BOOTSTRAP) format

models:
	@$(BOOTSTRAP) test tests/zoo --write-docs

versions:
	@$(BOOTSTRAP) versions

workflows:
	@$(BOOTSTRAP) workflows $(ARGS)

screenshots:
	@$(BOOTSTRAP) test tests/browser --screenshots=screenshots $(ARGS)

clean:
	rm -rf .venv .venv-* .comfyui demo_output screenshots .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
