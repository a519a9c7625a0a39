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
    classifier = Classifier.of(network, 4, torch.device("cpu"), Ranks(), amp=False, example=torch.rand(1, 3, 8, 8))
    assert classifier.memory_format is torch.contiguous_format
    assert network.mask is None
