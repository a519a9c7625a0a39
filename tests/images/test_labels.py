from pathlib import Path

import pytest
import torch

from bn_insert import ImageError
from bn_insert.images import Transform, folder_classes, open_batches, with_labels
from support.digits import copy_digits, copy_labelled_digits, open_digits

AS_STORED = Transform(resize=None, crop=None, mean=(0.0,), std=(1.0,))


def test_images_get_the_numbers_of_their_class_folders(tmp_path: Path) -> None:
    folder = copy_digits(tmp_path / "digits", 2)
    classes = folder_classes(folder)
    assert classes == [str(digit) for digit in range(10)]
    batches = open_batches(folder, AS_STORED, batch_size=8)
    found = list(with_labels(batches, folder, classes))
    expected = [int(path.parent.name) for batch in batches for path in batch.paths]
    assert torch.cat([labels for _, labels in found]).tolist() == expected
    assert sum(len(images) for images, _ in found) == 20


def test_images_outside_of_class_folders_are_left_out(tmp_path: Path) -> None:
    folder = copy_digits(tmp_path / "digits", 1)
    next((folder / "3").iterdir()).rename(folder / "loose.png")
    found = list(with_labels(open_batches(folder, AS_STORED), folder, folder_classes(folder)))
    assert sorted(found[0][1].tolist()) == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def test_an_image_alone_in_its_batch_that_cannot_be_read_is_one_image(tmp_path: Path) -> None:
    labelled = open_digits(copy_labelled_digits(tmp_path / "digits", 1, 1))
    images = labelled.train[:2]
    for image in images:
        image.path.write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"^the only image of a batch cannot be read: .*; repair or remove this file$"):
        list(labelled.batches(images[:1], 1, full=True))
    with pytest.raises(ImageError, match=r"^none of the 2 images of a batch can be read; the first is "):
        list(labelled.batches(images, 2, full=True))


def test_a_file_or_a_folder_with_one_folder_has_no_classes(tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    assert folder_classes(tmp_path) == []
    assert folder_classes(tmp_path / "x.pt") == []
