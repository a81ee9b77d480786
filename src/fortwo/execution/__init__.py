"""Faster ways through the network, fused or recorded, for training and for serving, and what measures which to take."""
