"""`python -m fortwo` runs the `fortwo` command."""

from fortwo.cli import app

app(prog_name="fortwo")
