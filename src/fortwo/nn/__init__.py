"""The network: its configuration, the decoder, LoRA adapters, and rows packed into one pass."""
