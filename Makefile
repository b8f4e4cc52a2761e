# The daily commands. `make` alone lists them.
# PYTHON=python3.12 chooses the interpreter; ARGS="..." goes on to the command, as in `make run ARGS="-P epochs=3"`.

PYTHON ?= python3
ARGS ?=
BACKUP ?=
FORCE ?=
URI = $${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}
# With Docker alone there is no .venv, and none is needed.
SERVICES_PYTHON = $$(test -e .venv/installed-services && echo .venv/bin/python || echo "$(PYTHON)")
IN_VENV = PATH="$(CURDIR)/.venv/bin:$$PATH"

# Nothing here reports to anyone: MLflow would send usage data.
export MLFLOW_DISABLE_TELEMETRY ?= true

.PHONY: help run test lint lock scan ui bench services services-local services-stop backup restore upgrade clean

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

run: .venv/installed  ## train on the embedded data set with `mlflow run`, making .venv first
	@$(IN_VENV) MLFLOW_TRACKING_URI="$(URI)" mlflow run --env-manager local . $(ARGS)
	@echo "Look at the run: make ui"

test: .venv/installed-dev  ## run the tests, the quick ones first
	@$(IN_VENV) pytest $(ARGS)

lint: .venv/installed-dev  ## check style, types and file hygiene
	@$(IN_VENV) pre-commit run --all-files $(ARGS)

lock: .venv/installed-dev  ## remake the locks and conda.yaml (ARGS=--upgrade: newest releases)
	@$(IN_VENV) python .ci/lock.py $(ARGS)

scan: .venv/installed-dev  ## look for known security holes in the locks and the images
	@$(IN_VENV) python .ci/scan.py $(ARGS)

# One worker and no job runners: a fifth of the memory, and plenty for one person.
ui: .venv/installed  ## serve the tracking UI on http://127.0.0.1:5000 (ARGS="--port 5001": elsewhere)
	@case "$(URI)" in http*) echo "Open $(URI)" ;; *) \
		$(IN_VENV) MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
		mlflow server --backend-store-uri "$(URI)" --host 127.0.0.1 --workers 1 $(ARGS) ;; esac

bench: .venv/installed-dev  ## run every benchmark; each prints its ratio last
	@for script in benchmarks/*.py; do echo "== $$script"; $(IN_VENV) python "$$script" || exit 1; done

services:  ## start the team's tracking server with Docker Compose (settings: services/.env)
	@"$(PYTHON)" services/compose.py up

services-local: .venv/installed-services  ## start the tracking server without Docker, on loopback
	@"$(SERVICES_PYTHON)" services/local.py start

services-stop:  ## end what `make services-local` started; its data stays
	@"$(SERVICES_PYTHON)" services/local.py stop

backup:  ## write the tracking server's databases and artifacts to services/backups/
	@"$(SERVICES_PYTHON)" services/backup.py backup

restore:  ## put a backup back (BACKUP=services/backups/TIME; FORCE=1: over what is there)
	@FORCE="$(FORCE)" "$(SERVICES_PYTHON)" services/backup.py restore "$(BACKUP)"

upgrade:  ## after new locks: a backup, then the tracking server's databases to the new MLflow's schema
	@test ! -d services/data/postgresql || $(MAKE) --no-print-directory .venv/installed-services
	@"$(SERVICES_PYTHON)" services/backup.py upgrade

clean:  ## remove .venv and the tools' caches; runs and data stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# An environment counts only once its stamp, written last, is there and newer than its lock: an interrupted install
# is started again from nothing. pip comes from outside, because Debian's Python cannot put one into a venv. Python
# compiles what it imports; compiling all at once would double the time to the first run.
.venv/installed: requirements.lock
	@command -v "$(PYTHON)" > /dev/null || { echo "error: no $(PYTHON) here; install Python 3.11 or later"; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or \
		sys.exit(f"error: Python 3.11 or later is needed, $(PYTHON) is {v}; name another: make PYTHON=python3.12")'
	@"$(PYTHON)" -c 'import importlib.util, sys; importlib.util.find_spec("pip") or \
		sys.exit("error: $(PYTHON) has no pip; install it (Debian: apt-get install python3-pip)")'
	@echo "Making .venv: 5.4 GB, a few minutes"
	@"$(PYTHON)" -m venv --clear --without-pip .venv
	@"$(PYTHON)" -m pip --python .venv/bin/python install --quiet --no-compile --require-hashes -r requirements.lock
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.lock tests/requirements.lock plugin/pyproject.toml
	@.venv/bin/python -m pip install --quiet --no-compile --require-hashes -r requirements-dev.lock
	@.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable ./plugin
	@.venv/bin/python -m pip install --quiet --no-compile --require-hashes --no-deps --upgrade --target .venv/triton \
		-r tests/requirements.lock || echo "There is no Triton for this machine; tests that need it will be skipped"
	@touch $@

# The tracking server's packages have the project's versions, so both live in one environment.
.venv/installed-services: .venv/installed services/requirements.lock
	@.venv/bin/python -m pip install --quiet --no-compile --require-hashes -r services/requirements.lock
	@touch $@
