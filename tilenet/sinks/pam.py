"""GDAL's sidecar `NAME.tif.aux.xml`: class names and colours that TIFF tags cannot hold."""

from __future__ import annotations

from xml.etree import ElementTree as ET  # we only write XML here

from tilenet.classes import ClassInfo

__all__ = ["class_table"]

# (name, GDALRATFieldType: 0 int, 2 string, GDALRATFieldUsage: 2 name, 5 value, 6 to 8 RGB)
_COLUMNS = (
    ("Value", 0, 5),
    ("Class", 2, 2),
    ("Red", 0, 6),
    ("Green", 0, 7),
    ("Blue", 0, 8),
)


def class_table(classes: tuple[ClassInfo, ...]) -> bytes:
    """Return the sidecar of a one-band class raster: category names and a thematic attribute table.

    Parameters
    ----------
    classes : tuple of ClassInfo
        In any order; ids without a class get an empty category name.
    """
    dataset = ET.Element("PAMDataset")
    band = ET.SubElement(dataset, "PAMRasterBand", band="1")
    names = {c.id: c.name for c in classes}
    categories = ET.SubElement(band, "CategoryNames")
    for value in range(max(names) + 1):
        ET.SubElement(categories, "Category").text = names.get(value, "")
    table = ET.SubElement(band, "GDALRasterAttributeTable", tableType="thematic")
    for index, (name, kind, usage) in enumerate(_COLUMNS):
        column = ET.SubElement(table, "FieldDefn", index=str(index))
        for tag, text in (("Name", name), ("Type", str(kind)), ("Usage", str(usage))):
            ET.SubElement(column, tag).text = text
    for index, c in enumerate(sorted(classes, key=lambda c: c.id)):
        row = ET.SubElement(table, "Row", index=str(index))
        for cell in (c.id, c.name, *c.color):
            ET.SubElement(row, "F").text = str(cell)
    ET.indent(dataset)
    return ET.tostring(dataset, encoding="unicode").encode()
