"""Options that every command has."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["Debug", "Json"]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]

Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
"""Read by `tilenet.cli.run`, which prints errors."""
