"""The formats in which frozen weights are held, how they are multiplied, and which is taken for how many rows."""
