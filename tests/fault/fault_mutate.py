"""Mutated files: rasters, masks, weights, cards and networks that were right once.

Every trial is made from its number alone: `python tests/fault/fault_mutate.py NUMBER ...` repeats
trials and prints how they ended; `KEEP=folder` keeps their files.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from workload import Outcome  # noqa: I001  # sets the path of the rest

import tiff
from cases import predict
from cases_files import JPEG, PNG, chunk
from cases_models import DEEP
from cases_tiff import DEFLATED, plain, tile_bytes
from fault_inputs import Bench
from forked import SECONDS, Forked
from places import differences

SHORT, LONG = 200, 20_000
CODES = {0, 3, 4, 5, 7, 8}
_LARGE = 1e8  # pixels to decode: what claims to be larger may take longer than a trial

NUMBERS = [
    0, 1, 2, 3, 4, 7, 8, 16, 32, 255, 256, 4096, 32767, 65535, 65536, 10**6, 2**31 - 1, 2**31,
    2**32 - 2, 2**32 - 1,
]  # fmt: skip
CODES_OF_TAGS = [
    254, 256, 257, 258, 259, 262, 266, 270, 273, 274, 277, 278, 279, 284, 317, 320, 322, 323, 324,
    325, 330, 332, 338, 339, 347, 530, 532, 33550, 33922, 34264, 34735, 34736, 34737, 42112, 42113,
    50844, 50909,
]  # fmt: skip


def flip(rng: random.Random, data: bytes, start: int = 0) -> bytes:
    """Change a few bytes, cut the end off, or put zeros somewhere."""
    out = bytearray(data)
    how = rng.random()
    if how < 0.15:
        return bytes(out[: rng.randrange(start, len(out))])
    at = rng.randrange(start, len(out))
    if how < 0.3:
        size = min(rng.randrange(1, 200), len(out) - at)
        out[at : at + size] = bytes(size)
    for _ in range(rng.randrange(1, 9)):
        out[rng.randrange(start, len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def mutate_tiff(rng: random.Random, data: bytes) -> bytes:
    """Change tags, types, counts, offsets and values of a little-endian, classic TIFF; or bytes."""
    out = bytearray(data)
    first = struct.unpack_from("<I", out, 4)[0]
    tags = struct.unpack_from("<H", out, first)[0]
    numbers = [*NUMBERS, len(out), len(out) - 1, first, rng.randrange(len(out))]
    for _ in range(rng.randrange(1, 4)):
        at = first + 2 + 12 * rng.randrange(tags)
        how = rng.randrange(8)
        if how == 0:
            struct.pack_into("<H", out, at, rng.choice(CODES_OF_TAGS))
        elif how == 1:
            struct.pack_into("<H", out, at + 2, rng.randrange(20))
        elif how == 2:
            struct.pack_into("<I", out, at + 4, rng.choice(numbers))
        elif how in (3, 4):
            struct.pack_into("<I", out, at + 8, rng.choice(numbers))
        elif how == 5:
            other = first + 2 + 12 * rng.randrange(tags)
            out[at : at + 12], out[other : other + 12] = out[other : other + 12], out[at : at + 12]
        elif how == 6:
            struct.pack_into("<I", out, first + 2 + 12 * tags, rng.choice(numbers))
        else:
            return flip(rng, bytes(out), rng.choice([0, first + 2 + 12 * tags]))
    return bytes(out)


def mutate_png(rng: random.Random, data: bytes) -> bytes:
    """Change, drop, double and swap chunks; most keep a right checksum."""
    chunks, at = [], 8
    while at < len(data):
        size = struct.unpack_from(">I", data, at)[0]
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += size + 12
    intact = {body for _, body in chunks}
    for _ in range(rng.randrange(1, 3)):
        k = rng.randrange(len(chunks))
        name, body = chunks[k]
        how = rng.randrange(6)
        if how == 0 and name == b"IHDR" and body in intact:
            fields = list(struct.unpack(">IIBBBBB", body))
            fields[rng.randrange(7)] = rng.choice(NUMBERS[:10])
            chunks[k] = (name, struct.pack(">IIBBBBB", *fields))
        elif how == 1 and name == b"IDAT" and body in intact:
            chunks[k] = (name, zlib.compress(flip(rng, zlib.decompress(body))))
        elif how == 2:
            chunks.insert(k, rng.choice(chunks))
        elif how == 3 and len(chunks) > 1:
            del chunks[k]
        elif how == 4:
            kinds = [b"PLTE", b"tRNS", b"gAMA", b"iCCP", b"zTXt", b"acTL", b"sBIT", b"tIME"]
            chunks.insert(k, (rng.choice(kinds), rng.randbytes(rng.randrange(40))))
        elif body:
            chunks[k] = (name, flip(rng, body))
    return data[:8] + b"".join(chunk(name, body) for name, body in chunks)


NONSENSE = [
    None, True, 0, -1, 1, 2, 9, 1.5, 255, 256, 65536, 2**31, 2**63, 10**30, 1e308, "", "a", "3",
    "../../x", [], {}, [0], [1, 2, 3], ["a"], [[]], {"a": 1}, float("nan"), float("inf"),
]  # fmt: skip


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) of a document."""
    keys: Any = ()
    if isinstance(document, dict):
        keys = list(document)
    elif isinstance(document, list):
        keys = range(len(document))
    return [p for key in keys for p in ((document, key), *_places(document[key]))]


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """Replace, drop and move values of a document; or change its bytes."""
    if rng.random() < 0.15:
        return flip(rng, data)
    document = json.loads(data)
    for _ in range(rng.randrange(1, 4)):
        places = _places(document)
        if not places:
            break
        holder, key = rng.choice(places)
        how = rng.randrange(5)
        if how == 0:
            del holder[key]
        elif how == 1:
            other, from_key = rng.choice(places)
            holder[key] = json.loads(json.dumps(other[from_key]))
        elif how == 2 and isinstance(holder[key], int | float):
            holder[key] = rng.choice([-holder[key], holder[key] + 1, holder[key] * 1000, 0.5])
        else:
            holder[key] = rng.choice(NONSENSE)
    text = json.dumps(document)
    return (DEEP if rng.random() < 0.005 else text).encode()


def mutate_weights(rng: random.Random, data: bytes) -> bytes:
    """Change the header of a safetensors file, its size, or bytes anywhere."""
    size = struct.unpack("<Q", data[:8])[0]
    how = rng.random()
    if how < 0.1:
        return struct.pack("<Q", rng.choice([*NUMBERS, size + 1, size - 1, 2**63])) + data[8:]
    if how < 0.2:
        return flip(rng, data)
    header = mutate_json(rng, data[8 : 8 + size])
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


Command = tuple[str, ...]
RASTER, IMAGE = predict(), predict(out="x.tif")
SHARED = "{shared}/ok.tif"
MASK: list[Command] = [
    ("info", "x.zarr"), predict(source=SHARED), ("verify", "x.zarr"),
    ("evaluate", "--pred", "x.zarr", "--truth", "{shared}/truth.tif"),
]  # fmt: skip


def _commands() -> set[str]:
    import tilenet.cli

    registered = tilenet.cli.app.registered_commands
    return {command.name or command.callback.__name__ for command in registered}


def _file(name: str, data: bytes, mutate: Callable[..., bytes]) -> Callable[..., None]:
    """Return what writes a mutation of some bytes into a folder."""
    return lambda rng, folder: (folder / name).write_bytes(mutate(rng, data)) and None


def _mask(rng: random.Random, folder: Path) -> None:
    """Copy the finished mask and mutate one of its files; metadata more often."""
    shutil.copytree(folder.parent / "shared" / "mask.zarr", folder / "x.zarr")
    files = sorted(p for p in (folder / "x.zarr").rglob("*") if p.is_file())
    documents = [p for p in files if p.name == "zarr.json"]
    path = rng.choice(documents if rng.random() < 0.8 else files)
    data = path.read_bytes()
    path.write_bytes(mutate_json(rng, data) if path.name == "zarr.json" else flip(rng, data))


def _copied(name: str, mutated: str, mutate: Callable[..., bytes]) -> Callable[..., None]:
    """Return what copies a model of the shared ones as `m…` and mutates one of its files."""

    def make(rng: random.Random, folder: Path) -> None:
        for path in sorted((folder.parent / "shared").glob(f"{name}*")):
            target = folder / path.name.replace(name, "m")
            (shutil.copytree if path.is_dir() else shutil.copy)(path, target)
        path = folder / mutated
        path.write_bytes(mutate(rng, path.read_bytes()))

    return make


def _geotiff(rng: random.Random, folder: Path) -> None:
    data = (folder.parent / "shared" / "ok.tif").read_bytes()
    (folder / "in.tif").write_bytes(mutate_tiff(rng, data))


ONNX = [predict("--model", "m.onnx", source=SHARED)]
FOLDER = [predict("--model", "m", "--backend", "torch", source=SHARED)]
PLACED = plain({
    tiff.SCALE: tiff.double(10, 10, 0), tiff.TIEPOINT: tiff.double(0, 0, 0, 5e5, 5e6, 0),
    tiff.GEOKEYS: tiff.geokeys((1024, 1), (1025, 1), (3072, 32633)), tiff.NODATA: tiff.text("0"),
})  # fmt: skip

# What is mutated, how, by which commands it is read, and how often.
SUBJECTS: dict[str, tuple[Callable[..., None], list[Command], int]] = {
    "GeoTIFF": (_geotiff, [RASTER, IMAGE], 4),
    "TIFF in strips": (_file("in.tif", PLACED, mutate_tiff), [RASTER, IMAGE], 4),
    "TIFF in tiles": (
        _file("in.tif", tiff.write(DEFLATED, tile_bytes()), mutate_tiff), [RASTER], 2,
    ),
    "PNG": (_file("in.tif", PNG, mutate_png), [RASTER], 2),
    "JPEG": (_file("in.tif", JPEG, partial(flip, start=2)), [RASTER], 1),
    "mask": (_mask, MASK, 3),
    "weights": (_copied("unet", "m/model.safetensors", mutate_weights), FOLDER, 1),
    "config.json": (_copied("unet", "m/config.json", mutate_json), FOLDER, 1),
    "card": (_copied("conv", "m.json", mutate_json), ONNX, 2),
    "ONNX": (_copied("conv", "m.onnx", flip), ONNX, 1),
}  # fmt: skip


def _is_large(bench: Bench, line: list[str], folder: Path) -> bool:
    """Whether a command plans to do more than fits a trial."""
    ended = bench.forker.command([*line, "--dry-run", "--json"], folder)
    try:
        plan = json.loads(ended.out)["estimate"]
        return bool(plan["pixels"] * plan["read_amplification"] > _LARGE)
    except (ValueError, KeyError):
        return False


def judge(ended: Forked) -> list[str]:
    """Return what is wrong with how a trial ended."""
    errors = [line for line in ended.err.splitlines() if line.startswith("tilenet: error: ")]
    wrong = [] if ended.code in CODES else [f"code {ended.code}"]
    if "Traceback" in ended.err:
        wrong.append("a traceback")
    if ended.code not in (0, 7) and len(errors) != 1:
        wrong.append(f"{len(errors)} lines of error")
    return wrong


def trial(bench: Bench, number: int) -> tuple[str, Forked, list[str]]:
    """Make, run and judge one trial."""
    rng = random.Random(number)
    names = list(SUBJECTS)
    name = rng.choices(names, [SUBJECTS[n][2] for n in names])[0]
    make, commands, _ = SUBJECTS[name]
    folder = bench.folder / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    make(rng, folder)
    known = _commands()
    command = rng.choice([c for c in commands if c[0] in known])
    line = [part.replace("{shared}", str(bench.shared)) for part in command]
    ended = bench.forker.command(line, folder)
    wrong = judge(ended)
    if ended.seconds > SECONDS and _is_large(bench, line, folder):
        wrong = []
    if ended.code == 0 and command in (RASTER, IMAGE):
        looked = bench.forker.call(lambda: differences(folder / "in.tif", folder / command[3]))
        wrong += looked.err.splitlines()[-3:]
    return f"{name}, {command[0]}", ended, wrong


def run(folder: Path, *, long: bool) -> Outcome:
    """Run the trials from number 0 on."""
    bench = Bench(folder)
    trials = LONG if long else SHORT
    failures, codes, slowest, most = [], Counter[int](), 0.0, 0
    for number in range(trials):
        name, ended, wrong = trial(bench, number)
        codes[ended.code] += 1
        slowest, most = max(slowest, ended.seconds), max(most, ended.grown)
        if wrong:
            failures.append(f"{number} ({name}): {', '.join(wrong)}: {ended.err.strip()[-300:]}")
    failures += bench.close()
    figures = {"codes": dict(sorted(codes.items())), "slowest": round(slowest, 2),
               "most_mb": most // 10**6}  # fmt: skip
    return Outcome(trials, failures, figures)


def main(numbers: list[str]) -> int:
    """Repeat trials, given as numbers or ranges like 0-99, and print how each ended."""
    bounds = [(int(a), int(b or a)) for a, _, b in (n.partition("-") for n in numbers)]
    failed = 0
    with tempfile.TemporaryDirectory(prefix="tilenet-") as folder:
        bench = Bench(Path(folder))
        start = time.monotonic()
        for number in (n for a, b in bounds for n in range(a, b + 1)):
            name, ended, wrong = trial(bench, number)
            failed += bool(wrong)
            if wrong or len(numbers) > 1 or bounds[0][0] == bounds[0][1]:
                print(number, name, ended.code, f"{ended.seconds:.1f} s", *wrong, flush=True)
                print("   ", ended.err.strip()[-600:])
            if "KEEP" in os.environ:
                shutil.copytree(Path(folder) / "case", Path(os.environ["KEEP"]) / str(number))
        print(f"{failed} failed, {time.monotonic() - start:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
