"""Trained values from their files, which name the class and its arguments."""

from svdd import UserError
from svdd.values.feature import FeatureValue
from svdd.values.latent_conv import LatentConvValue
from svdd.values.learned import LearnedValue
from svdd.values.weights import read_weights

__all__ = ["FeatureValue", "LatentConvValue", "learned_class", "load_value"]


def load_value(pretrained: str) -> LearnedValue:
    """Returns the value that a file holds; binding it loads and checks the weights.

    Args:
        pretrained: A file that `svdd fit` wrote, or the name of a value that ships with svdd.

    Raises:
        UserError: If the file cannot be read, or its class is not imported.
    """
    return learned_class(pretrained)(pretrained=pretrained)


def learned_class(pretrained: str) -> type[LearnedValue]:
    """Returns the class of the value in a file, among all imported subclasses of `LearnedValue`."""
    name, classes = read_weights(pretrained).identity["value"], [LearnedValue]
    for known in classes:  # the list grows by the subclasses of each
        classes += known.__subclasses__()
        if known.__name__ == name:
            return known
    raise UserError(
        f"pretrained={pretrained!r} holds a value of class {name!r}, which is not imported; name the class, as in "
        f"--model.value my_file.{name}"
    )
