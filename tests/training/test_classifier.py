import torch
from torch import nn

from bn_insert.support.processes import Ranks
from bn_insert.training.classifier import Classifier


class GroupsRows(nn.Module):
    """Views several images in a way that only contiguous ones allow; one image is both."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 8 * 8, 4)
        self.mask: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mask is None:
            self.mask = torch.ones(1, 3, 8, 8)
        return self.fc((x * self.mask).view(len(x), -1))


def test_finding_the_memory_format_leaves_no_tensor_in_the_network_that_cannot_be_trained() -> None:
    network = GroupsRows()
    classifier = Classifier.of(
        network, "fc", 4, torch.device("cpu"), Ranks(), amp=False, example=torch.rand(1, 3, 8, 8)
    )
    assert classifier.memory_format is torch.contiguous_format
    assert network.mask is None


class FlipsChannels(nn.Module):
    """Makes its images contiguous, as Caffe's networks take BGR, and views what its conv returns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x[:, [2, 1, 0]].contiguous()).view(len(x), -1))


def test_a_forward_that_views_activations_behind_contiguous_images_is_trained_in_contiguous_format() -> None:
    network, images = FlipsChannels(), torch.rand(4, 3, 8, 8)
    pointer = network.conv.weight.data_ptr()
    classifier = Classifier.of(network, "fc", 4, torch.device("cpu"), Ranks(), amp=False, example=images)
    assert classifier.memory_format is torch.contiguous_format
    assert network.conv.weight.data_ptr() == pointer
    assert classifier.training_logits(images).shape == (4, 4)
