# make demo   the whole job on synthetic scans: lesion maps, a table and a picture (about 10 minutes)
# make test   the tests; make test-slow adds those that take more than a minute each

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
SEED := 1
CORES := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)

.PHONY: demo test test-slow lint clean

$(VENV)/installed: setup.py tf_lesion/__init__.py
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[scripts,test]"
	touch $@

test: $(VENV)/installed lint
	$(BIN)/python -m pytest -q -m "not slow"

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -q

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(DEMO)

# Every command below is one a user would type: make prints it before it runs it.
demo: $(VENV)/installed
	@echo "A demonstration on synthetic scans at 2 mm with a briefly trained prior: it shows the"
	@echo "whole way from NIfTI to lesion maps, not the quality that real data would give."
	rm -rf $(DEMO)
	$(BIN)/python -m preprocessing.phantom --out $(DEMO)/scans --healthy 20 --patients 5 --seed $(SEED) --voxel-size 2 --jobs $(CORES)
	$(BIN)/python -m preprocessing.camcan --input $(DEMO)/scans/healthy --out $(DEMO)/healthy.h5 --voxel-size 2 --test-subjects 3 --jobs $(CORES)
	$(BIN)/python -m preprocessing.brats --input $(DEMO)/scans/patients --reference $(DEMO)/healthy.h5 --out $(DEMO)/patients.h5 --jobs $(CORES)
	$(BIN)/python train_gmvae.py --cache $(DEMO)/healthy.h5 --out $(DEMO)/run --preset practical --steps 3000 --seed $(SEED)
	$(BIN)/python -m eval.select_lambda --model $(DEMO)/run --cache $(DEMO)/healthy.h5 --grid 1,2,3 --steps 200 --max-slices 24 --precision bfloat16
	$(BIN)/python -m eval.thresholds --model $(DEMO)/run --cache $(DEMO)/healthy.h5 --out $(DEMO)/thresholds.json --tv-weight auto --steps 200 --max-slices 64 --precision bfloat16
	$(BIN)/python restore_brats.py --model $(DEMO)/run --cache $(DEMO)/patients.h5 --out $(DEMO)/restored.h5 --tv-weight auto --steps 200 --precision bfloat16 --thresholds $(DEMO)/thresholds.json
	$(BIN)/python -m eval.evaluate --restored $(DEMO)/restored.h5 --cache $(DEMO)/patients.h5 --thresholds $(DEMO)/thresholds.json --out $(DEMO)/evaluation
	$(BIN)/python restore_brats.py --model $(DEMO)/run --input $(DEMO)/scans/patients/HGG/Brats17_PHA_0_1/Brats17_PHA_0_1_t2.nii.gz --out $(DEMO)/maps --tv-weight auto --steps 200 --precision bfloat16 --thresholds $(DEMO)/thresholds.json
	@echo "Lesion maps: $(DEMO)/maps/*.nii.gz   Picture: $(DEMO)/evaluation/panel.png   Table: above"
