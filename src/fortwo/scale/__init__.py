"""Past one machine: vLLM serves, Ray trains and keeps replicas.

Nothing below imports this package, and a single machine never loads it.
"""
