"""Labelled images of class folders, matched with the classes of a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bn_insert import ImageError
from bn_insert.images import (
    ClassFolders,
    LabelledBatches,
    Transform,
    open_batches,
    open_class_folders,
    open_labelled_batches,
)

PLAIN = Transform(resize=None, crop=None, mean=(0.0,), std=(1.0,))


def class_folders(folder: Path, names: str) -> Path:
    """Make a folder per class with two pictures, whose brightness is the position of the class."""
    for position, name in enumerate(names.split()):
        (folder / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (4, 4), (position,) * 3).save(folder / name / f"{number}.png")
    return folder


def labels_by_brightness(batches: LabelledBatches) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for images, labels in batches:
        for picture, label in zip(images, labels.tolist(), strict=True):
            found.setdefault(round(float(picture.max()) * 255), set()).add(label)
    return found


def test_without_classes_labels_follow_the_sorted_names_of_folders(tmp_path: Path) -> None:
    found = open_labelled_batches(class_folders(tmp_path, "bee ant"), PLAIN, batch_size=3)
    assert (found.classes, found.images) == (("ant", "bee"), 4)
    assert labels_by_brightness(found) == {0: {1}, 1: {0}}


def test_folders_are_matched_with_classes_by_name_in_any_order_and_may_be_fewer(tmp_path: Path) -> None:
    found = open_labelled_batches(class_folders(tmp_path, "bee ant"), PLAIN, classes=("dog", "bee", "cat", "ant"))
    assert found.classes == ("dog", "bee", "cat", "ant")
    assert labels_by_brightness(found) == {0: {1}, 1: {3}}


def test_images_for_training_get_the_labels_of_another_order_of_the_same_classes(
    tmp_path: Path, unchecked: Callable[[Any], Any]
) -> None:
    for part in ("train", "val"):
        class_folders(tmp_path / part, "ant bee cat")
    sorted_by_name = open_class_folders(tmp_path, PLAIN)
    found = sorted_by_name.in_order(["cat", "ant", "bee"])
    assert (found.classes, found.digest) == (("cat", "ant", "bee"), sorted_by_name.digest)
    assert [image.path for image in found.train] == [image.path for image in sorted_by_name.train]
    assert all(found.classes[label] == path.parent.name for path, label in (*found.train, *found.val))
    others = r"and the folders in .*train are cat, ant, bee; pass the names of all folders, each once"
    with pytest.raises(ImageError, match=rf"the classes are \['ant', 'bee'\], {others}"):
        found.in_order(["ant", "bee"])
    wrong: Any  # a set has no order
    for wrong in ({"cat", "ant", "bee"}, ["cat", "ant", 1]):
        with pytest.raises(ImageError, match=others):
            unchecked(ClassFolders.in_order)(found, wrong)


def test_val_is_used_unless_it_is_a_class(tmp_path: Path) -> None:
    class_folders(tmp_path / "val", "ant bee")
    class_folders(tmp_path / "train", "ant bee")
    assert open_labelled_batches(tmp_path, PLAIN, classes=("ant", "bee")).folder == tmp_path / "val"
    assert open_labelled_batches(tmp_path, PLAIN, classes=("train", "val")).folder == tmp_path


def test_a_sample_has_as_many_images_as_asked_for(tmp_path: Path) -> None:
    folder = class_folders(tmp_path, "ant bee cat")
    one, two = (open_labelled_batches(folder, PLAIN, images=4, seed=3) for _ in range(2))
    assert one.images == 4
    assert [batch.labels.tolist() for batch in one] == [batch.labels.tolist() for batch in two]


def test_unreadable_files_are_left_out_with_their_labels(tmp_path: Path) -> None:
    folder = class_folders(tmp_path, "ant bee")
    (folder / "ant" / "0.png").write_bytes(b"no picture")
    found = open_labelled_batches(folder, PLAIN)
    (batch,) = found
    assert batch.labels.tolist() == [0, 1, 1]
    assert [file.path.name for file in found.unreadable] == ["0.png"]
    with pytest.raises(ImageError, match="leave out strict"):
        list(open_labelled_batches(folder, PLAIN, strict=True))


def test_folders_of_other_classes_are_named_with_the_classes(tmp_path: Path) -> None:
    folder = class_folders(tmp_path, "ant bee wasp hornet")
    with pytest.raises(ImageError) as refusal:
        open_labelled_batches(folder, PLAIN, classes=("bee", "ant", *"cdefg"))
    assert "has folders that are not classes of the network: hornet, wasp; its classes are bee, ant, c, d, e and 2" in (
        str(refusal.value)
    )


def test_a_folder_without_class_folders_is_refused_with_the_layout(tmp_path: Path) -> None:
    (tmp_path / "0.png").touch()
    layout = "the layout is CLASS/IMAGE, or val/CLASS/IMAGE"
    for folder, fault in (
        (tmp_path, "has no class folders"),
        (tmp_path / "0.png", "is not a folder"),
        (tmp_path / "none", "does not exist"),
    ):
        with pytest.raises(ImageError, match=f"{fault}; {layout}"):
            open_labelled_batches(folder, PLAIN)
    (tmp_path / "ant").mkdir()
    with pytest.raises(ImageError, match="ant contains no image"):
        open_labelled_batches(tmp_path, PLAIN)


def test_without_shuffling_images_are_in_order_and_a_maximum_takes_the_first(tmp_path: Path) -> None:
    folder = class_folders(tmp_path, "b a c")
    torch.save(torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 3, 2, 2), tmp_path / "x.pt")
    every = [path for batch in open_batches(folder, PLAIN, batch_size=4, shuffle=False) for path in batch.paths]
    assert every == sorted(every)
    assert len(every) == 6
    first = [path for batch in open_batches(folder, PLAIN, images=3, shuffle=False) for path in batch.paths]
    assert first == every[:3]
    (batch,) = open_batches(tmp_path / "x.pt", PLAIN, images=4, shuffle=False)
    assert batch.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
