"""Tries to break a server on a tiny random base: `python -m bench.soak --help` lists the parts."""
