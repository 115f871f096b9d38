# minimta: what can be done here.
#
#   make run      start a private mail system in ./.run and say what to try:
#                 it keeps mail for any address, and nothing leaves
#   make install  put it onto this host, for root; DESTDIR= PREFIX=/usr/local
#   make test     all tests, with pytest; makes a .venv if there is no pytest
#   make crash    kills, failing calls and power cuts, all of them: half an hour
#   make bench    figures of this machine; PEER='127.0.0.1:25 user' loads another
#   make lint     ruff, if it is installed
#   make clean    remove everything that the above has made
# PYTHON=/path/to/python3 names the Python to test, RUFF=... the linter.

PYTHON ?= python3
RUFF ?= ruff
WORKERS = 2
CHOICE =
RUN = $(CURDIR)/.run
MTA = MINIMTA_ROOT='$(RUN)' MINIMTA_CAPTURE=yes '$(CURDIR)/minimta.py'
PREFIX ?= /usr/local
RULES = E,W,F,I,N,A,B,C4,C90,UP,SIM,RET,PIE,BLE,S110,ERA,PLR0911,PLR0912,PLR0915,PLW0603,W505
LINT = --isolated --line-length 88 --target-version py39 \
       --config 'lint.pydocstyle.convention="pep257"' \
       --config 'lint.mccabe.max-complexity=10' \
       --config 'lint.pycodestyle.max-doc-length=79'

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

run:
	@mkdir -p '$(RUN)/etc'; for user in "$$(id -un)" alice bob; do \
	    home='$(RUN)'/home/$$user; mkdir -p "$$home"; \
	    echo "$$user:x:$$(id -u):$$(id -g):$$user:$$home:/bin/sh"; \
	done > '$(RUN)/etc/passwd'
	@test -e '$(RUN)/etc/aliases' || printf '%s\n' 'postmaster: root' \
	    "$$(test "$$(id -un)" = root && echo staff || echo root): $$(id -un)" \
	    'team: alice, bob' > '$(RUN)/etc/aliases'
	@$(MTA) newaliases
	@printf '%s\n' '' 'Try in another terminal, from any directory:' '' \
	    '1. send mail to alice; nothing is printed, it is accepted:' \
	    "echo 'Hello Alice' | $(MTA) mail -s greetings alice" \
	    '2. show the queue; "Mail queue is empty": it is delivered:' \
	    "$(MTA) mailq" \
	    '3. read as alice; "1 message 1 new", then 1 prints it, q ends:' \
	    "$(MTA) mail -u alice" ''
	@exec env $(MTA) serve

install:
	@'$(CURDIR)/minimta.py' install --destdir '$(DESTDIR)' --prefix '$(PREFIX)'

test:
	@python='$(PYTHON)'; \
	if ! "$$python" -c 'import pytest' 2>/dev/null; then \
	    python=.venv/bin/python3; \
	    test "$$($$python -V 2>&1)" = "$$('$(PYTHON)' -V)" && $$python -c 'import pytest' || \
	        { '$(PYTHON)' -m venv --clear .venv && .venv/bin/pip install -q pytest && \
	          { .venv/bin/pip install -q pytest-xdist aiosmtpd || true; }; } || exit; \
	fi; \
	"$$python" -c 'import xdist' 2>/dev/null && workers='-n $(WORKERS)' || workers=; \
	"$$python" -m pytest -q $$workers $(CHOICE) test_minimta.py

# Figures are printed, and the seed: MINIMTA_TEST_SEED=... repeats a run.
CRASHERS = Crash or EveryInstant or PowerCut or Faults or torn
crash:
	@export MINIMTA_TEST_CRASHES="$${MINIMTA_TEST_CRASHES:-200}" MINIMTA_TEST_CUTS="$${MINIMTA_TEST_CUTS:-20}"; \
	$(MAKE) --no-print-directory test WORKERS=0 CHOICE='-s -rs -k "$(CRASHERS)"'

# D400 D403 D205: a program's docstring is its usage text.  D401: docstrings say
# what is returned.  D105 D107: a class says what its magic methods do.  PLR0911:
# guards of a protocol return one by one.  N818: Busy and Gone are no errors.
# A003: next, quit, help are mail's words.  SIM105: contextlib costs start-up.
# SIM905: a row of words is easier to read as text.
IGNORED = D105,D107,D205,D400,D401,D403,PLR0911,N818,A003,SIM105,SIM905
lint:
	@if ! command -v $(RUFF) >/dev/null; then echo 'no ruff here: not linted'; exit 0; fi; set -e; \
	$(RUFF) check $(LINT) --select $(RULES),D,PLR0913,ANN001,ANN201 --ignore $(IGNORED) minimta.py; \
	$(RUFF) check $(LINT) --select $(RULES) --ignore $(IGNORED) test_minimta.py

bench:
	@'$(PYTHON)' .ci/bench $(PEER)

clean:
	rm -rf .run .venv* .pytest_cache .ruff_cache __pycache__

.PHONY: help run install bench test crash lint clean
