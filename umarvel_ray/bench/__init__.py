"""Benchmarks against named peers: `umarvel bench NAME`. One module each; `harness.py` runs them all."""
