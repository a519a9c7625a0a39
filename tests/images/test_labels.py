import re
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


@pytest.mark.parametrize("size", [1, 2])
def test_the_next_readable_image_replaces_a_batch_without_any_wherever_the_pass_begins(
    tmp_path: Path, size: int
) -> None:
    folder = copy_labelled_digits(tmp_path / "digits", 4, 1)
    labelled = open_digits(folder)
    train = labelled.train
    for image in (*train[4:6], *train[-size:]):
        image.path.write_bytes(b"no image")
    batches = list(labelled.batches(train, size, full=True))
    assert torch.cat([batch.labels for batch in batches]).tolist() == [label for _, label in train[:-size]] + size * [0]
    (next_one,) = labelled.batches(train[6:7], 1)
    assert all(torch.equal(image, next_one.images[0]) for batch in batches[4 // size : 6 // size] for image in batch[0])
    resumed = list(open_digits(folder).batches(train[4:], size, full=True))
    for mine, theirs in zip(batches[4 // size :], resumed, strict=True):
        assert torch.equal(mine.images, theirs.images) and torch.equal(mine.labels, theirs.labels)
    assert [path for path, _ in labelled.unreadable] == [image.path for image in (*train[4:6], *train[-size:])]


def test_training_images_of_which_none_can_be_read_are_one_error(tmp_path: Path) -> None:
    labelled = open_digits(copy_labelled_digits(tmp_path / "digits", 1, 1))
    for image in (*labelled.train, labelled.val[0]):
        image.path.write_bytes(b"no image")
    assert len(list(labelled.batches(labelled.val, 1))) == 9  # validation comes first
    path = re.escape(str(labelled.train[3].path))
    with pytest.raises(ImageError, match=rf"^none of the 10 training images can be read; one of them is {path}: "):
        next(labelled.batches(labelled.train[3:], 1, full=True))


def test_a_file_or_a_folder_with_one_folder_has_no_classes(tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    assert folder_classes(tmp_path) == []
    assert folder_classes(tmp_path / "x.pt") == []
