"""Runs of twelve blocks that come to a sudden end."""

from tilenet.api import predict
from tilenet.config import PredictConfig

BLOCKS = {"tile": 64, "overlap": 16, "chunk": 64, "block": 64, "precision": "fp32"}


class Crash(BaseException):
    """Stands for the end of the process."""


def crash(*_arguments, **_options):
    raise Crash


def run(source, out, model, **options):
    """Return what became of one raster."""
    [result] = predict([source], out, PredictConfig(model=str(model), **BLOCKS | options)).runs
    return result
