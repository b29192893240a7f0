"""Every model family against its pipeline, with every kind of sampler, and from the command line and a notebook."""

from functools import cache

import numpy as np
import pytest

from tests.tiny_families import FAMILIES
from tests.tiny_families.drawing import GUIDANCE, Reference, build, draw

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Returns a function from a family to the folder of its small pipeline, which is saved once."""
    return cache(lambda family: family.save(tmp_path_factory.mktemp(family.module)))


@pytest.fixture(scope="session")
def reference(folder):
    """Returns a function from a family to its pipeline as diffusers loads it, once."""
    return cache(lambda family: Reference(family, folder(family)))


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize(
    ("family", "step"),
    [pytest.param(family, step, id=f"{family.name}, {step.name}") for family in FAMILIES for step in family.steps],
)
def test_unguided_pictures_equal_the_pipelines(family, step, guidance, folder, reference):
    if guidance == "negative prompts" and not family.negative:
        pytest.skip("the pipeline takes no negative prompts")
    size = None if guidance == "guided" else family.size
    diffusion = build(family, folder(family), step, guidance, size)
    for count in (1, 3):
        expected = reference(family).draw(step, guidance, size, count)
        found = draw(diffusion, guidance, count)
        assert expected.std() > 0.01
        assert np.array_equal(found, expected)
