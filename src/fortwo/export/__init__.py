"""Adapters in the forms of other programs."""
