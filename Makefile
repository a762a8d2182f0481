# Every target but clean sets up what it needs on its first run: an environment in .venv (some GB, minutes) and,
# unless COMFYUI_PATH or the place of this checkout names a ComfyUI, a copy of one in .comfyui.
# COMFYUI=0.24 takes a copy of that release instead, with an environment of its own over .venv.
PYTHON ?= python3
ARGS ?=
COMFYUI ?=
BOOTSTRAP = $(PYTHON) raylight/dev/setup/bootstrap.py $(if $(COMFYUI),--comfyui $(COMFYUI))

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-gpu smoke lint format models versions workflows screenshots clean

help:
	@echo "make demo                   sample a small model in a real ComfyUI, by stock nodes and by Ray workers"
	@echo "make test                   run the tests but the slow ones (15 minutes at most, on 2 cores)"
	@echo "make test ARGS=\"-k parity\"  run those that a path in tests/, -k or -m chooses, slow or not"
	@echo "make test-all               run all tests, some of them in a browser if there is Chromium"
	@echo "make smoke                  run the few tests that say whether a release of ComfyUI works at all"
	@echo "make test-gpu               run the tests that need GPUs, on all that PyTorch sees (CUDA_VISIBLE_DEVICES chooses)"
	@echo "make lint                   check style (ruff), layout (ruff format) and types (pyright)"
	@echo "make format                 lay the code out with ruff format"
	@echo "make models                 write docs/models.md from what the parity matrix measures"
	@echo "make versions               write tests/versions.txt from what is installed, once all tests have passed with it"
	@echo "make workflows              write example_workflows anew from raylight/dev/workflows"
	@echo "make screenshots            run the browser test and keep what it saw in screenshots/ (needs Chromium)"
	@echo "make setup                  only set up what the others need"
	@echo "make clean                  remove .venv, .comfyui, demo_output, screenshots and caches"
	@echo
	@echo "make test COMFYUI=0.24                with that release of ComfyUI: 0.24, 0.27 or 0.30"
	@echo "COMFYUI_PATH=/my/ComfyUI make demo    with a ComfyUI of yours"
	@echo "make demo ARGS=\"--help\"               what the demo can do"

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

test-gpu:
	@$(BOOTSTRAP) test-gpu $(ARGS)

lint:
	@$(BOOTSTRAP) lint $(ARGS)
	@$(BOOTSTRAP) format --check
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
