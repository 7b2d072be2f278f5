"""Conversion: every form of the golden model computes the published numbers; nothing half-written."""

import pytest
from golden_numbers import GOLDEN, check_golden

import sqllava
from sqllava.convert import Options, convert

STAGE2 = GOLDEN / "sqllava-lora"
ROUTES = {
    "as it is": (),
    "ours": ("ours",),
    "merged": ("merged",),
    "ours, published": ("ours", "published"),
    "ours, published, ours": ("ours", "published", "ours"),
    "ours, merged": ("ours", "merged"),
    "merged, published": ("merged", "published"),
    "merged, published, ours": ("merged", "published", "ours"),
}


@pytest.mark.parametrize("route", ROUTES)
def test_golden_numbers_survive_conversion(route, tmp_path):
    folder = STAGE2
    for step, to in enumerate(ROUTES[route]):
        convert(folder, tmp_path / str(step), to, Options(check=False))
        folder = tmp_path / str(step)
    check_golden(*sqllava.load(folder, dtype="float32", device="cpu"))
