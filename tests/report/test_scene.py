"""Marks become SVG that parses and PNG files that show them."""

import struct
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from laminar._errors import InputError
from laminar.report.scene import PALETTE, Dots, Fill, Label, Panel, Stroke, to_svg, write_sheet

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def panel():
    panel = Panel("A <title>", 'what "it" shows & says', 100, 50)
    panel.add(
        Fill(np.array([[0, 0], [100, 0], [100, 25], [0, 25]]), "data"),
        Stroke(np.array([[0, 40], [50, np.nan], [60, 40], [100, 45.26]]), "flow", 2, dashed=True),
        Dots(np.array([[10, 35], [np.nan, 1], [20, 45]]), "ink", 3, 1.0),
        Label(50, 48, "$x_1$ < 3 & 🌊", role="ink"),
    )
    return panel


def test_svg_of_a_page_has_marks_by_role_and_words(panel):
    root = ET.fromstring(to_svg(panel))
    assert root.get("role") == "img"
    assert root.get("aria-label") == 'A <title>. what "it" shows & says'
    marks = list(root)
    assert [mark.get("class") for mark in marks] == ["f data", "k flow", "d ink", "ink"]
    assert marks[0].get("d") == "M0 0L100 0L100 25L0 25Z"
    assert marks[1].get("d") == "M0 40M60 40L100 45.3"
    assert marks[2].get("d") == "M10 35h0M20 45h0"
    assert marks[3].text == "$x_1$ < 3 & 🌊"
    assert not any(mark.get("style") for mark in marks)


def test_svg_file_stands_alone(panel, tmp_path):
    path = tmp_path / "sheet.svg"
    write_sheet([panel, panel, panel], path, title="Three", across=2)
    root = ET.parse(path).getroot()
    assert root.find(f"{SVG}title").text == "Three"
    assert PALETTE["flow"] in root.find(f"{SVG}style").text
    # Panels of one row stand beside each other, those of the next below.
    starts = [mark.get("d") for mark in root.iter(f"{SVG}path") if mark.get("class") == "f data"]
    assert [start.split("L")[0] for start in starts] == ["M18 40", "M136 40", "M18 108"]


def test_png_file_shows_the_marks(panel, tmp_path):
    from PIL import Image

    path = tmp_path / "one.png"
    write_sheet([panel], path)
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", head[16:24]) == (272, 172)
    picture = Image.open(path).convert("RGB")
    data = tuple(int(PALETTE["data"][i : i + 2], 16) for i in (1, 3, 5))
    assert picture.getpixel((2 * (18 + 50), 2 * (18 + 10))) == data
    assert picture.getpixel((2, 2)) == (255, 255, 255)


def test_other_files_are_refused_and_nothing_is_written(panel, tmp_path):
    with pytest.raises(InputError, match=r"\.png or \.svg"):
        write_sheet([panel], tmp_path / "sheet.pdf")
    assert not list(tmp_path.iterdir())
