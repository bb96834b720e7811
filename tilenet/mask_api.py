"""The front door of finished masks: are they what was written, and the same in another format."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tilenet.engine.convert import convert
from tilenet.engine.elsewhere import RemoteOutput
from tilenet.engine.inspection import Bad, inspect
from tilenet.engine.item import check_item, has_item, write_item
from tilenet.engine.repair import repair as repair_mask
from tilenet.errors import UsageError, VerifyError, convert_errors
from tilenet.sources import RemoteName, given

__all__ = ["VerifyResult", "export", "verify"]

_logger = logging.getLogger(__name__)

_LOST = "damaged beyond repair"


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """What was found in a mask; fields are the keys of `--json`.

    Parameters
    ----------
    ok : bool
        Every file is what its run wrote.
    mask : str
        The mask.
    files, blocks : int
        How many were looked at.
    bad : tuple of Bad
        What is not as it was written.
    repaired : tuple of Bad
        What was not, and is again.
    """

    ok: bool
    mask: str
    files: int
    blocks: int
    bad: tuple[Bad, ...]
    repaired: tuple[Bad, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document."""
        parts = {"bad": self.bad, "repaired": self.repaired}
        return asdict(self) | {key: [one.as_dict() for one in bad] for key, bad in parts.items()}

    def failure(self) -> VerifyError | None:
        """Return what is wrong in words, None if nothing is."""
        if self.ok:
            return None
        first = self.bad[0]
        if first.what == _LOST:
            return VerifyError(
                f"{first.file} is damaged, and with it what could be compared", self.mask,
                "make the mask again: move it away, and run predict",
            )  # fmt: skip
        place = f" ({first.place})" if first.place else ""
        told = "1 part is not what was written: "
        if len(self.bad) > 1:
            told = f"{len(self.bad)} parts are not what was written, the first is "
        return VerifyError(
            f"{told}{first.file}{place}: {first.what}",
            self.mask,
            "tilenet verify --repair makes them again",
        )


def verify(
    path: Path | RemoteName | str,
    *,
    repair: bool = False,
    source: Path | str | None = None,
    model: Path | str | None = None,
    allow_remote: bool = False,
) -> VerifyResult:
    """Look at every byte of a mask, and make what is damaged again.

    Parameters
    ----------
    path : Path or str
        A mask of tilenet's; a str ``s3://bucket/x.zarr`` for one in an object store.
    repair : bool
        Whether to make damaged parts again, from raster and model.
    source, model : Path or str, optional
        Where these lie now, if they were moved, for a repair.
    allow_remote : bool
        Whether the mask may be in an object store.

    Raises
    ------
    UsageError
        A mask that is not to be repaired needs neither raster nor model; one in an object store is
        read only with `allow_remote`, and not repaired.
    InputError
        No mask of tilenet's; or, to repair, its raster is missing, or was changed or renamed.
    VerifyError
        What is made again differs from what was written.
    """
    path = given(path)
    if not repair and (source is not None or model is not None):
        what = "--input" if model is None else "--model"
        raise UsageError("only a repair needs it", what, "give --repair, or leave it out")
    with convert_errors(path):
        try:
            if isinstance(path, RemoteName):
                return _verify_remote(path, repair=repair, allow_remote=allow_remote)
            found = inspect(path)
        except VerifyError as error:
            lost = Bad(Path(error.where).name, _LOST)
            return VerifyResult(ok=False, mask=str(path), files=0, blocks=0, bad=(lost,))
        bad = tuple(found.bad)
        if bad and repair:
            repair_mask(found, *(None if one is None else Path(one) for one in (source, model)))
            found = inspect(path)
        left = tuple(found.bad)
        mended = tuple(one for one in bad if one not in left)
        return VerifyResult(not left, str(path), found.files, found.blocks, left, mended)


def _verify_remote(place: RemoteName, *, repair: bool, allow_remote: bool) -> VerifyResult:
    if not allow_remote:
        raise UsageError("lies on another machine", place, "to read it there, give --allow-remote")
    if repair:
        raise UsageError("only on a disk", "--repair", "make the mask again, with --overwrite")
    found = RemoteOutput(place, None).inspect()
    bad = tuple(found.bad)
    return VerifyResult(not bad, str(place), found.files, found.blocks, bad)


def export(
    path: Path | str, out: Path | str, *, overwrite: bool = False, stac: bool = False
) -> Path:
    """Write a finished mask in another format, with the bytes that predict would have written.

    Parameters
    ----------
    path : Path or str
        A mask of tilenet's.
    out : Path or str
        ``x.tif`` (a COG), ``x.ome.tif``, ``x.png`` or ``x.zarr``.
    overwrite : bool
        Replace an output of ours.
    stac : bool
        Write a STAC item beside it. One that is there is kept true anyway.

    Raises
    ------
    UsageError
        The ending gives no format, or the mask is too large for it.
    OutputError
        There is something at `out`.
    VerifyError
        The mask is not what its run wrote.
    """
    out = Path(out)
    with convert_errors(out):
        if stac:
            check_item(out)
        convert(Path(path), out, overwrite=overwrite)
        if stac or has_item(out):
            for note in write_item(out):
                _logger.warning("%s", note)
        return out
