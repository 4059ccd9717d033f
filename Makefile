# make demo   the whole job on synthetic scans: lesion maps, a table and a picture (about 10 minutes)
# make test   the tests; make test-slow adds the long ones
# make docs   docs/ as a site, in site/; a warning or a broken link is an error
# make pretrained LABEL_MAPS=DIR   the shipped prior again, from label maps of heads
# make figures SCANS=DIR LABEL_MAPS=DIR   the figures of the README and of the model card
# make figures-heads LABEL_MAPS=DIR   those of the card of the brain finder
# make finder LABEL_MAPS=DIR   the shipped brain finder again, from the same

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
CORES := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)

.PHONY: demo docs test test-slow lint clean pretrained pretrained-gmvae pretrained-vae
.PHONY: pretrained-denoiser finder figures figures-real figures-healthy figures-heads
.PHONY: figures-glioma figures-stroke figures-ms

$(VENV)/installed: setup.py constraints.txt tf_lesion/__init__.py
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[scripts,test]"
	touch $@

test: $(VENV)/installed lint
	$(BIN)/python -m pytest -q -n $(CORES) --dist loadfile -m "not slow"

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -q

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

# What it would print is that Material for MkDocs has a successor.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(DEMO) site

# Every command below is one a user would type: make prints it before it runs it.
FAST := --solver huber
demo: $(VENV)/installed
	@echo "A demonstration: synthetic scans, at 2 mm, a prior trained for a minute."
	@echo "It shows the whole way from NIfTI to lesion maps, not the quality that real data give."
	@echo "The maps of one scan come from the prior that is shipped, the figures from the one trained here."
	rm -rf $(DEMO)
	$(BIN)/python -m preprocessing.phantom --out $(DEMO)/scans --healthy 7 --patients 2 --seed 7 --jobs $(CORES)
	$(BIN)/python -m preprocessing.camcan --input $(DEMO)/scans/healthy --out $(DEMO)/healthy.h5 --match --voxel-size 2 --test-subjects 2 --jobs $(CORES)
	$(BIN)/python -m preprocessing.brats --input $(DEMO)/scans/patients --reference $(DEMO)/healthy.h5 --voxel-size 2 --out $(DEMO)/patients.h5 --slice-step 6 --jobs $(CORES)
	$(BIN)/tf-lesion train --cache $(DEMO)/healthy.h5 --out $(DEMO)/run --preset practical --precision float32 --steps 120
	$(BIN)/tf-lesion calibrate --model $(DEMO)/run --cache $(DEMO)/healthy.h5 --tv-weight auto --grid 1.8,3.6 --grid-slices 4 --grid-steps 100 --max-slices 10 $(FAST)
	$(BIN)/python restore_brats.py --model $(DEMO)/run --cache $(DEMO)/patients.h5 --out $(DEMO)/restored.h5 --tv-weight auto --calibration $(DEMO)/run/calibration.h5 $(FAST)
	$(BIN)/tf-lesion evaluate --restored $(DEMO)/restored.h5 --cache $(DEMO)/patients.h5 --calibration $(DEMO)/run/calibration.h5 --out $(DEMO)/evaluation
	$(BIN)/tf-lesion detect $(DEMO)/scans/patients/LGG/Brats17_PHA_1_1/Brats17_PHA_1_1_t2.nii.gz $(DEMO)/maps
	$(BIN)/python -m eval.restored_figure --results $(DEMO)/maps --out $(DEMO)/restored.png
	$(BIN)/tf-lesion report --results $(DEMO)/maps
	@echo "This was a demonstration on synthetic scans. Figures of the prior trained here: $(DEMO)/evaluation"
	@echo "Maps of the shipped prior: $(DEMO)/maps; a restored slice: $(DEMO)/restored.png"
	@echo "Look at it: file://$(CURDIR)/$(DEMO)/maps/report.html"

FIGURES := figures

# Everything the shipped priors came from; LABEL_MAPS is a folder of 20 FreeSurfer label maps. Of the
# first 17 come the healthy scans, 3 of them to calibrate on, of the last 3 the patients of Table 1.
WORK := prior
SHIPPED := tf_lesion/pretrained
# A larger lambda changes healthy slices less still, but finds less in synthetic patients.
LAMBDA := 3
SCORE := relative,signed,smooth=4
CHOSEN_BY := labels of synthetic patients, stroke and MS scans
# of convolutions; bfloat16 takes a third of the time on processors with AMX, and ten times as long on others.
PRECISION := float32
pretrained: pretrained-gmvae pretrained-vae pretrained-denoiser table1-glioma table1-stroke table1-ms

$(WORK)/scans/phantom.json: $(VENV)/installed
	mkdir -p $(WORK)/known
	ls $(abspath $(LABEL_MAPS))/*.nii.gz | head -n 17 | xargs ln -sf -t $(WORK)/known
	$(BIN)/python -m preprocessing.phantom --out $(WORK)/scans --label-maps $(WORK)/known --held-out 3 --healthy 98 --test 24 --patients 0 --seed 3 --jobs $(CORES)

PREPARE = $(BIN)/python -m preprocessing.camcan --input $(WORK)/scans/healthy --test-list $(WORK)/scans/test_subjects.txt --align rigid --match --min-brain 0.02 --jobs $(CORES)
$(WORK)/healthy_1mm.h5: $(WORK)/scans/phantom.json
	$(PREPARE) --slice-step 2 --out $@

$(WORK)/healthy_2mm.h5: $(WORK)/scans/phantom.json
	$(PREPARE) --voxel-size 2 --out $@

pretrained-gmvae pretrained-vae: pretrained-%: $(WORK)/healthy_1mm.h5
	$(BIN)/tf-lesion train --cache $< --out $(WORK)/$* --preset denoising --model $* --precision $(PRECISION) --force
	$(BIN)/tf-lesion calibrate --model $(WORK)/$* --cache $< --max-slices 480 --tv-weight $(LAMBDA) $(FAST) --postprocess $(SCORE) --chosen-by "$(CHOSEN_BY)"
	$(BIN)/tf-lesion export --as run --model $(WORK)/$* --out $(SHIPPED)/$* --align rigid --force

pretrained-denoiser: export TF_ENABLE_ONEDNN_OPTS = 1
pretrained-denoiser: $(WORK)/healthy_2mm.h5
	$(BIN)/tf-lesion train --cache $< --out $(WORK)/denoiser --model denoiser --preset practical --steps 12000 --batch-size 32 --force
	$(BIN)/tf-lesion calibrate --model $(WORK)/denoiser --healthy $(WORK)/scans/healthy --align rigid --pattern "sub-CC71*/**/*_T2w.nii.gz" --postprocess flip,signed,median=3,smooth=2,support=8,contralateral,scale --chosen-by "labels of synthetic patients" --force
	$(BIN)/tf-lesion export --as run --model $(WORK)/denoiser --out $(SHIPPED)/denoiser --align rigid --force

# Table 1 of GMVAE and VAE, on the patients of `figures`.
table1-%: $(FIGURES)/%/scans/phantom.json $(WORK)/healthy_1mm.h5
	$(BIN)/python -m preprocessing.brats --input $(<D)/patients --align rigid --reference $(WORK)/healthy_1mm.h5 --slice-step 8 --out $(WORK)/$*.h5 --jobs $(CORES)
	sed 's/KIND/$*/' eval/experiment_pretrained.yaml > $(WORK)/$*.yaml
	$(BIN)/python -m eval.tables --config $(WORK)/$*.yaml

# The figures of README and model card. SCANS holds a folder for each real scan, with NAME_t2.nii.gz
# and NAME_seg.nii.gz; the synthetic ones are of the three label maps that nothing was trained with.
figures: figures-real figures-healthy figures-glioma figures-stroke figures-ms

$(FIGURES)/anatomies:
	mkdir -p $@
	ls $(abspath $(LABEL_MAPS))/*.nii.gz | tail -n 3 | xargs ln -sf -t $@

$(FIGURES)/%/scans/phantom.json: $(VENV)/installed | $(FIGURES)/anatomies
	$(BIN)/python -m preprocessing.phantom --out $(@D) --label-maps $(FIGURES)/anatomies --healthy 0 --patients 9 --lesions $* --seed 6 --jobs $(CORES) --force

figures-real: $(VENV)/installed
	$(BIN)/tf-lesion detect $(SCANS) $(FIGURES)/real/maps --force
	$(BIN)/tf-lesion evaluate --results $(FIGURES)/real/maps --out $(FIGURES)/real/measured --force

figures-healthy: $(VENV)/installed $(FIGURES)/anatomies
	$(BIN)/python -m preprocessing.phantom --out $(FIGURES)/healthy/scans --label-maps $(FIGURES)/anatomies --healthy 12 --patients 0 --seed 21 --jobs $(CORES) --force
	$(BIN)/tf-lesion detect $(FIGURES)/healthy/scans/healthy $(FIGURES)/healthy/maps --force

figures-glioma figures-stroke figures-ms: figures-%: $(FIGURES)/%/scans/phantom.json
	$(BIN)/tf-lesion detect $(FIGURES)/$*/scans/patients $(FIGURES)/$*/maps --force
	$(BIN)/tf-lesion evaluate --results $(FIGURES)/$*/maps --groups $(FIGURES)/$*/scans/groups.csv --out $(FIGURES)/$*/measured --force
	$(BIN)/python -m eval.twins --input $(FIGURES)/$*/scans/patients --align rigid --out $(FIGURES)/$*/twins.csv --force

# Of the card of the brain finder: heads of the four label maps that it was not trained with.
figures-heads: $(VENV)/installed
	mkdir -p $(FIGURES)/untrained
	ls $(abspath $(LABEL_MAPS))/*.nii.gz | tail -n 4 | xargs ln -sf -t $(FIGURES)/untrained
	$(BIN)/python -m preprocessing.phantom --out $(FIGURES)/heads --label-maps $(FIGURES)/untrained --healthy 0 --patients 0 --heads 200 --seed 12 --jobs $(CORES) --force
	$(BIN)/python -m eval.heads --input $(FIGURES)/heads --out $(FIGURES)/heads.csv --jobs $(CORES) --force

FINDER := finder
finder: $(VENV)/installed
	$(BIN)/python -m preprocessing.finder --label-maps $(LABEL_MAPS) --held-out 4 --out $(FINDER) --seed 1 --jobs $(CORES)
	cp $(FINDER)/finder.npz tf_lesion/scans/finder/finder.npz
