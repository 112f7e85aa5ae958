"""Serves ``module:callable`` by bjoern, which has no command of its own: run_bjoern.py APP SOCKET"""

import importlib
import sys

import bjoern

module, _, name = sys.argv[1].partition(":")
bjoern.run(getattr(importlib.import_module(module), name), f"unix:{sys.argv[2]}")
