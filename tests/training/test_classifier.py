import pytest

from bn_insert.training.classifier import evaluating
from support.networks import small_vgg


def test_evaluating_puts_mixed_flags_back_when_the_body_raises() -> None:
    model = small_vgg().train()
    model.features[0].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before
