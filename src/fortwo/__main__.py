"""`python -m fortwo` is `fortwo`."""

from fortwo.cli import app

app(prog_name="fortwo")
