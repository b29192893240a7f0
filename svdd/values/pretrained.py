"""Trained values from their files: the file names the class and its arguments."""

from svdd import UserError
from svdd.values.feature import FeatureValue
from svdd.values.latent_conv import LatentConvValue
from svdd.values.learned import LearnedValue
from svdd.values.weights import read_weights

__all__ = ["learned_class", "load_value"]

BUILT_IN = (LatentConvValue, FeatureValue)


def load_value(pretrained: str) -> LearnedValue:
    """Returns the value that a file holds; its weights are checked and loaded when it is bound.

    Args:
        pretrained: A file that `svdd fit` wrote, or the name of a value that ships with svdd.

    Raises:
        UserError: If the file cannot be read, or its class is not imported.

    Example:
        >>> load_value("emoji-compressibility").pretrained
        'emoji-compressibility'
    """
    return learned_class(pretrained)(pretrained=pretrained)


def learned_class(pretrained: str) -> type[LearnedValue]:
    """Returns the class of the value in a file: a built-in one, or a subclass of `LearnedValue` that is imported."""
    name, classes = read_weights(pretrained).identity["value"], [LearnedValue]
    for known in classes:  # grows while it is read: all subclasses, however far below
        classes += known.__subclasses__()
        if known.__name__ == name:
            return known
    raise UserError(
        f"pretrained={pretrained!r} holds a value of class {name!r}, which is not imported; name the class, as in "
        f"--model.value my_file.{name}"
    )
