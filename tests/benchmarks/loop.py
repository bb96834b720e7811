"""A loop written by hand for one network and one layout: what the engine is measured against.

`loop.py RASTER MODEL.onnx OUT.zarr`: tiles of 1024, overlap 256, a hann window, two classes; one
thread, sums as wide as the raster, no georeference, no checks, nothing to resume.
"""

from __future__ import annotations

import sys
import warnings

import numpy as np
import rasterio
import zarr
from rasterio.windows import Window

from tilenet.quiet import without_module

with without_module("openvino_telemetry"):
    import openvino as ov
    import openvino.opset13

TILE, STRIDE = 1024, 768


def compiled(path: str) -> ov.CompiledModel:
    """Compile the network for one tile of bytes, as the benchmark's card has it."""
    core = ov.Core()
    model = core.read_model(path)
    model.reshape([1, 3, TILE, TILE])
    steps = ov.preprocess.PrePostProcessor(model)
    steps.input().tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NCHW"))
    pixels = steps.input().preprocess().convert_element_type(ov.Type.f32)
    pixels.mean([127.5] * 3).scale([63.75] * 3)
    scaled = steps.build()
    [scores] = (result.input_value(0) for result in scaled.get_results())
    model = ov.Model([ov.opset13.softmax(scores, 1)], scaled.get_parameters())
    return core.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY"})


def main(source: str, model: str, out: str) -> None:
    """Segment `source`, row of tiles by row of tiles."""
    network = compiled(model).create_infer_request()
    window = np.hanning(TILE + 2)[1:-1].astype(np.float32)
    window = window[:, None] * window[None]
    with rasterio.open(source) as raster:
        height, width = raster.shape
        mask = zarr.create_array(
            out, shape=(height, width), chunks=(STRIDE, STRIDE), dtype="uint8", overwrite=True
        )
        starts = [*range(0, width - TILE, STRIDE), width - TILE]
        sums = np.zeros((2, TILE, width), np.float32)
        done = 0
        for row in [*range(0, height - TILE, STRIDE), height - TILE]:
            if row > done:  # rows above this one have all their tiles
                ready = row - done
                mask[done:row] = sums[1, :ready] > sums[0, :ready]
                sums[:, :-ready] = sums[:, ready:].copy()
                sums[:, -ready:] = 0
                done = row
            pixels = raster.read(window=Window(0, row, width, TILE))
            for col in starts:
                tile = np.ascontiguousarray(pixels[None, :, :, col : col + TILE])
                scores = next(iter(network.infer({0: tile}, share_inputs=True).values()))[0]
                sums[:, :, col : col + TILE] += scores * window
        mask[done:] = sums[1, : height - done] > sums[0, : height - done]


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # a plain image has no place on a map
    main(*sys.argv[1:])
