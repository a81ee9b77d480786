"""Serving on vLLM: fortwo trains, proves, versions and chooses the adapters; vLLM's server computes the replies."""
