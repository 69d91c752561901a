import numpy as np
import pytest
import torch

from smalto.sampling.sheet import MARGIN, class_sheet, image_sheet


def test_tiles_go_row_by_row():
    values = [10, 60, 110, 160, 210]
    images = torch.stack([torch.full((3, 8, 8), v, dtype=torch.uint8) for v in values])
    sheet = np.asarray(image_sheet(images, columns=3, scale=1))
    assert sheet.shape == (2 * (8 + MARGIN) + MARGIN, 3 * (8 + MARGIN) + MARGIN, 3)
    for i, value in enumerate(values):
        top, left = (MARGIN + place * (8 + MARGIN) for place in divmod(i, 3))
        assert (sheet[top : top + 8, left : left + 8] == value).all()
    assert (sheet[MARGIN + 8 + MARGIN :, 2 * (8 + MARGIN) + MARGIN :] == 255).all(), "no sixth image"


@pytest.mark.parametrize(("side", "scale", "enlarged"), [(16, None, 48), (64, None, 64), (16, 2, 32)])
def test_small_images_are_enlarged(side, scale, enlarged, generator):
    images = torch.randint(256, (1, 3, side, side), dtype=torch.uint8, generator=generator)
    sheet = np.asarray(image_sheet(images, columns=1, scale=scale))
    factor = enlarged // side
    tile = sheet[MARGIN : MARGIN + enlarged, MARGIN : MARGIN + enlarged]
    assert np.array_equal(tile[::factor, ::factor], images[0].permute(1, 2, 0).numpy())


def test_names_stand_in_front():
    images = torch.zeros(4, 3, 48, 48, dtype=torch.uint8)
    plain, named = (image_sheet(images, columns=2, row_names=names) for names in ((), ("shoe", "bag")))
    assert named.height == plain.height
    assert named.width > plain.width
    front = np.asarray(named)[:, : named.width - plain.width]
    assert (front < 128).any(), "something is written there"


def test_a_class_without_a_name_stands_under_its_number():
    def read(chosen):
        return torch.zeros(len(chosen), 3, 8, 8, dtype=torch.uint8)

    sizes = {"count": 3, "classes": [0, 1, 2], "max_rows": 9, "max_columns": 9}
    named = class_sheet(read, names=["shoe"], **sizes)
    assert named.height == class_sheet(read, names=[], **sizes).height
