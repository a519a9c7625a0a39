"""Folders of images and tensor files, read as batches; knows nothing of networks."""

from .batch_interface import Batch, Batches, Unreadable, sample
from .class_folders import ClassFolders, check_class_folders, open_class_folders
from .image_batches import ImageBatches, image_batches
from .image_files import IMAGE_SUFFIXES, find_images
from .image_sources import check_source, open_batches
from .labelled_batches import LabelledBatches, check_labelled_folder, folder_classes, open_labelled_batches, with_labels
from .tensor_batches import TENSOR_SUFFIXES, TensorBatches, tensor_batches
from .transform import Transform

__all__ = [
    "IMAGE_SUFFIXES",
    "TENSOR_SUFFIXES",
    "Batch",
    "Batches",
    "ClassFolders",
    "ImageBatches",
    "LabelledBatches",
    "TensorBatches",
    "Transform",
    "Unreadable",
    "check_class_folders",
    "check_labelled_folder",
    "check_source",
    "find_images",
    "folder_classes",
    "image_batches",
    "open_batches",
    "open_class_folders",
    "open_labelled_batches",
    "sample",
    "tensor_batches",
    "with_labels",
]
