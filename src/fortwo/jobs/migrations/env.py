"""Alembic's entry: runs the migrations on the connection that the store hands over, or on sqlalchemy.url."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from fortwo.jobs.database import connect
from fortwo.jobs.schema import TableBase


def run(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=TableBase.metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    engine = connect(context.config.get_main_option("sqlalchemy.url") or "")
    with engine.begin() as opened:
        run(opened)
    engine.dispose()
