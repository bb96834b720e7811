"""Every layout is recognised, read as what it is, and trained for two epochs."""

import json
import pickle
from collections import Counter

import labelled
import numpy as np
import pytest
import rasterio
import tifffile
from PIL import Image, ImageSequence
from rasterio.errors import NotGeoreferencedWarning

from tilenet.errors import InputError, UsageError
from tilenet.geometry import Window
from tilenet.quiet import ignoring
from tilenet.train_api import train
from tilenet.training.check import check_data
from tilenet.training.config import TrainConfig
from tilenet.training.layouts import find_samples
from tilenet.training.palette import COLOUR, find_palette, read_palette
from tilenet.training.samples import BrokenDataError
from tilenet.training.split import split_samples
from tilenet.training.survey import survey_part
from tilenet.training.truth import staged_images

TINY = {
    "arch": "classic-unet", "options": {"widths": (4, 8)}, "tile": 32, "batch_size": 2, "epochs": 2,
    "steps": 2, "workers": 0, "device": "cpu", "precision": "fp32",
}  # fmt: skip


def with_parquet(folder):
    return labelled.vector(folder, ".parquet", "EPSG:3857")


def with_gpkg(folder):
    return labelled.vector(folder, ".gpkg", "EPSG:32631")


LAYOUTS = {
    "pairs": (labelled.pairs, "images in images/", 2),
    "carvana": (labelled.carvana, "images in train/, masks in train_masks/", 2),
    "coloured": (labelled.coloured, "images in images/", 3),
    "suffix": (labelled.suffix, "masks with a suffix", 2),
    "by_part": (labelled.by_part, "in train/ and val/", 2),
    "dsb": (labelled.dsb, "one mask per object", 2),
    "stack": (labelled.stack, "two multi-page TIFFs", 2),
    "table": (labelled.table, "the table pairs.csv", 2),
    "raster": (labelled.raster, "masks with a suffix", 2),
    "geojson": (labelled.vector, "polygons of houses.geojson", 2),
    "gpkg": (with_gpkg, "polygons of houses.gpkg", 2),
    "parquet": (with_parquet, "polygons of houses.parquet", 2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_is_recognised_and_trained(name, tmp_path):
    make, words, classes = LAYOUTS[name]
    data = make(tmp_path / "data")
    result = train(TrainConfig(data=data, **TINY), tmp_path / "model")
    found = result.metrics["data"]
    assert words in found["layout"]
    assert found["train"]["images"] > 0
    assert found["val"]["images"] > 0
    assert len(found["train"]["class_pixels"]) == classes
    assert min(found["train"]["class_pixels"]) > 0
    assert result.metrics["epochs"] == 2
    card = json.loads((tmp_path / "model" / "tilenet.json").read_text())
    assert card["divisor"] == 2
    assert card["context"] == "local"


def labels_of(config, tmp_path):
    data = check_data(config, tmp_path / "cache")
    return data, split_samples(data.samples, config)


def test_object_masks_are_merged(tmp_path):
    data, _ = labels_of(TrainConfig(data=labelled.dsb(tmp_path / "d")), tmp_path)
    for sample in data.samples:
        _, objects = labelled.disc(int(sample.name[2:]))
        classes, numbers = sample.label.read(Window(0, 0, 64, 64))
        np.testing.assert_array_equal(classes, objects > 0)
        assert set(np.unique(numbers)) == set(np.unique(objects))
    assert data.bands == 3  # alpha is no band


def test_polygons_lie_where_the_pixels_are(tmp_path):
    config = TrainConfig(data=labelled.vector(tmp_path / "d"), tile=64)
    data, parts = labels_of(config, tmp_path)
    assert "spatial block" in parts.words
    label = data.samples[0].label
    classes, _ = label.read(Window(0, 0, 256, 256))
    assert (classes[:, :190] != 255).all()
    assert (classes[:, 195:] == 255).all()  # beyond the labelled area
    from tilenet.sources import open_raster

    pixels, _ = open_raster(data.samples[0].image.path).read(Window(0, 0, 256, 256), np.zeros(3))
    inside = classes[:, :190]
    assert pixels[0][:, :190][inside == 1].min() > 100
    # A window is the same as the same part of the whole.
    part, _ = label.read(Window(37, 50, 61, 77))
    np.testing.assert_array_equal(part, classes[37:98, 50:127])


def test_polygon_classes_by_column(tmp_path):
    config = TrainConfig(data=labelled.vector(tmp_path / "d"), tile=64, class_column="kind")
    data, parts = labels_of(config, tmp_path)
    assert [c.name for c in data.classes] == ["background", "a", "b"]
    survey = survey_part(parts.train, 3)
    assert (survey.class_pixels > 0).all()


def test_polygons_of_an_unknown_class_are_named(tmp_path):
    data = labelled.vector(tmp_path / "d")
    config = TrainConfig(data=data, class_column="kind", classes=("ground", "a"))
    with pytest.raises(BrokenDataError, match="polygons of b: outside the classes"):
        check_data(config, tmp_path / "cache")


def test_folders_of_unlabelled_images_are_left_alone(tmp_path):
    data = labelled.pairs(tmp_path / "d")
    (data / "unlabelled").mkdir()
    Image.new("RGB", (8, 8)).save(data / "unlabelled" / "u.png")
    found = find_samples(TrainConfig(data=data))
    assert (len(found.samples), found.problems) == (6, [])


def test_slippy_map_tiles_have_a_place(tmp_path):
    from tilenet.training.images import ImageRef, open_image

    path = tmp_path / "OAM-1238424-1046544-21.png"
    Image.fromarray(np.zeros((256, 256, 3), np.uint8)).save(path)
    place = open_image(ImageRef(str(path))).placed
    assert place.transform[0] == pytest.approx(0.0746455, rel=1e-5)
    assert place.transform[2] == pytest.approx(
        1238424 / 2**20 * 20037508.342789244 - 20037508.34, abs=1
    )


def test_spatial_blocks_do_not_overlap(tmp_path):
    config = TrainConfig(data=labelled.raster(tmp_path / "d"), tile=32)
    _, parts = labels_of(config, tmp_path)
    covered = np.zeros((256, 256), int)
    for sample in (*parts.train, *parts.val):
        covered[sample.window.slices()] += 1
    assert (covered == 1).all()
    assert 0.1 < sum(s.window.pixels for s in parts.val) / 256**2 < 0.35


def test_split_by_hash_is_the_documented_rule(tmp_path):
    import hashlib

    _, parts = labels_of(TrainConfig(data=labelled.pairs(tmp_path / "d", 30)), tmp_path)
    held = {s.name for s in parts.val}
    expected = {
        f"i{k}" for k in range(30) if int(hashlib.sha1(f"i{k}".encode()).hexdigest(), 16) % 5 == 0
    }
    assert held == expected


BROKEN = {
    "an image without a mask": lambda d: (d / "masks" / "i1.png").unlink(),
    "a mask without an image": lambda d: (d / "images" / "i1.png").unlink(),
    "sizes differ": lambda d: Image.new("L", (9, 9)).save(d / "masks" / "i1.png"),
    "outside the classes": lambda d: Image.new("L", (64, 64), 7).save(d / "masks" / "i1.png"),
    "does not read": lambda d: (d / "masks" / "i1.png").write_bytes(b"\x89PNG broken"),
    "not a raster": lambda d: (d / "images" / "i1.png").write_bytes(b"nothing"),
    "bands of uint8": lambda d: Image.new("L", (64, 64)).save(d / "images" / "i1.png"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_pair_is_named(what, tmp_path):
    data = labelled.pairs(tmp_path / "d")
    BROKEN[what](data)
    with pytest.raises(BrokenDataError) as caught:
        train(TrainConfig(data=data, **TINY), tmp_path / "model")
    assert len(caught.value.problems) == 1
    assert what in str(caught.value.problems[0])
    assert "i1" in str(caught.value.problems[0])
    assert caught.value.code == 3
    [problem] = caught.value.problems
    assert str(caught.value) == f"1 broken: {problem}; mend or remove what is named"
    assert not (tmp_path / "model").exists()


def test_the_first_of_several_broken_pairs_stands_for_all(tmp_path):
    data = labelled.pairs(tmp_path / "d")
    for name in ("i1.png", "i3.png"):
        (data / "masks" / name).unlink()
    with pytest.raises(BrokenDataError) as caught:
        check_data(TrainConfig(data=data), tmp_path / "cache")
    assert (caught.value.what, caught.value.where, caught.value.do) == (
        "2 broken, the first: an image without a mask", str(data / "images" / "i1.png"),
        "mend or remove what is named",
    )  # fmt: skip
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.problems) == (str(caught.value), caught.value.problems)


def test_truncated_image_is_named(tmp_path):
    data = labelled.pairs(tmp_path / "d", ending=".jpg")
    path = data / "images" / "i1.jpg"
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(BrokenDataError, match="1 broken"):
        train(TrainConfig(data=data, **TINY), tmp_path / "model")


@pytest.mark.parametrize(
    ("make", "mask"), [(labelled.pairs, "masks/i1.png"), (labelled.dsb, "id1/masks/1.png")]
)
def test_cut_off_mask_is_named(make, mask, tmp_path):
    # GDAL's short cut for whole PNGs would give whatever memory held before.
    path = make(tmp_path / "d") / mask
    labelled.cut(path)
    with pytest.raises(BrokenDataError) as caught:
        check_data(TrainConfig(data=tmp_path / "d"), tmp_path / "cache")
    assert caught.value.code == 3
    assert str(path) in str(caught.value)


def test_parts_of_a_table(tmp_path):
    data = labelled.table(tmp_path / "d")
    table = data / "pairs.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], *(line + "," for line in lines[1:])]))
    assert len(find_samples(TrainConfig(data=data)).samples) == len(lines) - 1
    names = [line.split(",")[:2] for line in lines[1:]]
    for word, left in (("testing", 1), ("dev", 0)):
        parts = [word] + ["train"] * (len(names) - 1)
        rows = [",".join([*pair, part]) for pair, part in zip(names, parts, strict=True)]
        table.write_text("\n".join(["image,mask,split", *rows]))
        found = find_samples(TrainConfig(data=data))
        assert len(found.samples) == len(names) - left
        assert {one.part for one in found.samples} == ({"train"} if left else {"train", "val"})
    table.write_text("\n".join(["image,mask,split", *(",".join([*p, "evil"]) for p in names)]))
    with pytest.raises(BrokenDataError, match=r"split 'evil' is none of train.* line 2"):
        check_data(TrainConfig(data=data), tmp_path / "cache")


@pytest.mark.parametrize("bands", [None, (3, 2, 1), (2,)])
def test_stacks_are_judged_by_the_bands_that_were_learnt(tmp_path, bands):
    """Predict gets whole pages, and chooses the bands itself."""
    data = labelled.stack(tmp_path / "d")
    volume = data / "volume.tif"
    with Image.open(volume) as stack:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(stack)]
    four = [np.dstack([frame, frame[..., :1] // 2]) for frame in frames]
    tifffile.imwrite(volume, np.stack(four), photometric="minisblack", planarconfig="contig")
    config = TrainConfig(data=data, bands=bands, **TINY)
    with staged_images(find_samples(config).samples) as (_, staged):
        for path, frame in zip(staged, four, strict=True):
            with ignoring(NotGeoreferencedWarning), rasterio.open(path) as page:
                np.testing.assert_array_equal(page.read(), np.moveaxis(frame, -1, 0))
    result = train(config, tmp_path / "model")
    assert result.metrics["validation"]["accuracy"] is not None
    card = json.loads((tmp_path / "model" / "tilenet.json").read_text())
    assert card["bands"] == (4 if bands is None else len(bands))
    with pytest.raises(BrokenDataError, match="no band 9"):
        check_data(TrainConfig(data=data, bands=(9,)), tmp_path / "cache")


def test_no_foreground_is_named(tmp_path):
    data = labelled.pairs(tmp_path / "d", mask=lambda objects: np.zeros(objects.shape, np.uint8))
    with pytest.raises(BrokenDataError, match="no foreground at all"):
        train(TrainConfig(data=data, **TINY), tmp_path / "model")


def test_unknown_layout(tmp_path):
    (tmp_path / "d").mkdir()
    with pytest.raises(InputError, match="recognised"):
        find_samples(TrainConfig(data=tmp_path / "d"))


@pytest.mark.parametrize(
    ("values", "classes", "given", "wanted"),
    [
        ([0, 255], 2, [0, 255], [0, 1]),
        ([0, 1, 2], 3, [0, 2, 255], [0, 2, 255]),
        ([0, 1, 2, 255], 3, [2, 255], [2, 255]),
        ([0, 128, 255], 3, [128, 255], [1, 2]),
        (list(range(256)), 2, [0, 127, 128, 255], [0, 0, 1, 1]),
        ([0, COLOUR + 0xFF7850], 2, [COLOUR + 0xFF7850], [1]),
        ([*range(10), *range(246, 256)], 2, [9, 250], [0, 1]),
        ([0, 200, 220, 240], 4, [0, 200, 220, 240], [0, 1, 2, 3]),
        (list(range(200)), 2, [0, 1, 199], [0, 1, 1]),
        ([*range(9), 255], 9, [0, 8, 255], [0, 8, 255]),
        (list(range(19)), 19, [0, 18], [0, 18]),
        ([0, 2, 255], 2, [0, 2, 255], [0, 1, 255]),
    ],
)
def test_palette_is_found(values, classes, given, wanted):
    counts = Counter({value: 1000 if value in (0, 255) else 10 for value in values})
    palette = find_palette({"a": counts, "b": counts}, None)
    assert len(palette.classes) == classes
    assert palette.apply(np.array(given)).tolist() == wanted


def indexed(classes, colours):
    """Return a mask of indices into a table of colours."""
    found = Image.fromarray(classes.astype(np.uint8), "P")
    found.putpalette([value for colour in colours for value in colour])
    return found


def of_colours(tmp_path, colours, values=(0, 1, 2, 255)):
    """Return the data of masks with colour tables, all with the same values in the same places."""
    data = labelled.pairs(tmp_path / "d")
    places = np.array(values)[np.arange(64 * 64).reshape(64, 64) % len(values)]
    for number, path in enumerate(sorted((data / "masks").iterdir())):
        indexed(places, colours(number)).save(path)
    return places, data


def test_indices_of_one_table_number_the_classes(tmp_path):
    table = [(0, 0, 0), (200, 9, 9), (9, 200, 9), *[(1, 1, 1)] * 252, (255, 255, 255)]
    places, data = of_colours(tmp_path, lambda _: table)
    found = check_data(TrainConfig(data=data, classes=("ground", "a", "b")), tmp_path / "cache")
    assert [(c.name, c.color) for c in found.classes] == [
        ("ground", (0, 0, 0)), ("a", (200, 9, 9)), ("b", (9, 200, 9))
    ]  # fmt: skip
    for sample in found.samples:
        np.testing.assert_array_equal(sample.label.read(Window(0, 0, 64, 64))[0], places)


def test_colours_count_where_tables_differ(tmp_path):
    one = [(0, 0, 0), (200, 9, 9), (9, 200, 9)]
    other = [(9, 200, 9), (0, 0, 0), (200, 9, 9)]
    places, data = of_colours(tmp_path, lambda k: other if k else one, (0, 1, 2))
    found = check_data(TrainConfig(data=data), tmp_path / "cache")
    assert found.palette == ('"0" = "class_0"', '"#09c809" = "class_1"', '"#c80909" = "class_2"')
    meant = np.array([0, 2, 1])[places], np.array([1, 0, 2])[places]
    for number, sample in enumerate(found.samples):
        read = sample.label.read(Window(0, 0, 64, 64))[0]
        np.testing.assert_array_equal(read, meant[bool(number)])


def test_of_two_indices_the_darker_is_the_background(tmp_path):
    places, data = of_colours(tmp_path, lambda _: [(255, 255, 255), (0, 0, 0)], (0, 1))
    found = check_data(TrainConfig(data=data), tmp_path / "cache")
    read = found.samples[0].label.read(Window(0, 0, 64, 64))[0]
    np.testing.assert_array_equal(read, 1 - places)


def test_a_palette_file_may_name_indices(tmp_path):
    table = [(0, 0, 0), (200, 9, 9), (9, 200, 9)]
    places, data = of_colours(tmp_path, lambda _: table, (0, 1, 2))
    file = tmp_path / "p.toml"
    for text in ('0 = "x"\n1 = "y"\n2 = "x"', '"#000000" = "x"\n"#c80909" = "y"\n"#09c809" = "x"'):
        file.write_text(text)
        found = check_data(TrainConfig(data=data, palette=file), tmp_path / "cache")
        read = found.samples[0].label.read(Window(0, 0, 64, 64))[0]
        np.testing.assert_array_equal(read, places == 1)


def test_palette_file_maps_and_ignores(tmp_path):
    path = tmp_path / "p.toml"
    path.write_text('"#ff7850" = "road"\n0 = "ground"\n7 = "ignore"\n')
    palette = read_palette(path, ["ground", "road"])
    assert palette.apply(np.array([0, 7, COLOUR + 0xFF7850])).tolist() == [0, 255, 1]
    assert palette.classes[1].color == (255, 120, 80)
    assert palette.unknown([0, 8]) == [8]
    path.write_text("nonsense")
    with pytest.raises(UsageError):
        read_palette(path, None)
