"""Trained values from their files, which name the class and its arguments."""

from svdd import UserError
from svdd.values.feature import FeatureValue
from svdd.values.latent_conv import LatentConvValue
from svdd.values.learned import HEADER, LearnedValue, read_checkpoint

__all__ = ["BUILT_IN", "learned_class", "load_value"]

BUILT_IN = (LatentConvValue, FeatureValue)  # imported, so that their files can be loaded


def load_value(pretrained: str) -> LearnedValue:
    """Returns the value in a file of `svdd fit`, or the shipped value of that name; `bind` loads its weights."""
    return learned_class(pretrained)(pretrained=pretrained)


def learned_class(pretrained: str) -> type[LearnedValue]:
    """Returns the class of the value in a file; UserError if the file cannot be read, or its class is not imported."""
    name, classes = read_checkpoint(pretrained)[HEADER]["identity"]["value"], [LearnedValue]
    for known in classes:  # the list grows by the subclasses of each
        classes += known.__subclasses__()
        if known.__name__ == name:
            return known
    raise UserError(
        f"pretrained={pretrained!r} holds a value of class {name!r}, which is not imported; name the class, as in "
        f"--model.value my_file.{name}"
    )
