"""All rewards of `tests/tested_rewards.py` fulfil one contract."""

import inspect
import socket

import pytest
import torch

from svdd import UserError, rewards
from svdd.assets.content import digest
from svdd.evaluation.reward_checks import CHECKS, findings
from svdd.evaluation.reward_trials import Trial
from svdd.rewards.base import Reward
from svdd.rewards.clip import CLIPScore
from svdd.rewards.pretrained import PretrainedReward
from tests.tested_rewards import TESTED, Case, images_of, serving

BUILT_IN = {kind for kind in map(rewards.__getattr__, rewards.__all__) if not inspect.isabstract(kind)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    with serving(tmp_path_factory.mktemp) as found:
        yield found


@pytest.fixture(scope="module", params=TESTED)
def case(request) -> Case:
    return TESTED[request.param]


@pytest.fixture(scope="module")
def reward(case, models) -> Reward:
    return case.make(models)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Blocks connections to other machines."""
    connect = socket.socket.connect

    def local(self, address):
        assert not isinstance(address, tuple) or address[0] in ("127.0.0.1", "localhost", "::1"), address
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")


def test_every_built_in_reward_is_tested(models):
    assert BUILT_IN - {type(case.make(models)) for case in TESTED.values()} == set()


def test_weights_are_read_when_needed(case, models):
    assert all(
        part.pretrained_network is None for part in case.make(models).modules() if isinstance(part, PretrainedReward)
    )


def test_scoring_changes_nothing_that_a_run_compares(case, models):
    reward = case.make(models)
    reward.load()
    before = reward.identity, digest(reward)
    reward.score(*images_of(case, 2))
    assert (reward.identity, digest(reward)) == before


@pytest.mark.parametrize("name", CHECKS)
def test_it_passes_the_check_of_test_reward(case, reward, models, name):
    """The shared tester, `svdd.evaluation.reward_checks`; nothing is skipped for lack of pictures that differ."""
    images, prompts = images_of(case, 4)
    trial = Trial(reward, images, prompts, lambda: case.make(models), case.tolerance)
    (found,) = findings(trial, [name])
    assert found.passed is not False, found.message + found.traceback
    reasons = ("a groupwise reward compares the images of a call", "no gradient is stated", "no range is stated", "")
    assert found.message in reasons or (case.ties and found.message.startswith("all pictures score")), found.message


def test_scores_of_the_pictures_differ(case, reward):
    scores = reward.score(*images_of(case, 4))
    assert len({round(score, 4) for score in scores.tolist()}) == 4 or (case.ties and scores.std() > 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_images_of_every_float_type_are_accepted(case, reward, dtype):
    images, prompts = images_of(case, 2)
    scores = reward.score(images.to(dtype), prompts)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reward.score(images.to(dtype).float(), prompts), rtol=0, atol=0)
    torch.testing.assert_close(scores, reward.score(images, prompts), rtol=0.1, atol=0.05)


def test_a_module_of_half_precision_scores_nearly_the_same(case, reward, models):
    """A reward that is converted before its weights are read is the same as one that is converted afterwards."""
    images, prompts = images_of(case, 4)
    exact = reward.score(images, prompts)
    networks = [part for part in reward.modules() if isinstance(part, PretrainedReward)]
    if not networks and list(reward.parameters()):
        pytest.skip("a network whose precision is not that of the images")
    before, after = (case.make(models) for _ in range(2))
    after.load()
    scores = before.to(torch.bfloat16).score(images, prompts)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, exact, rtol=0.1, atol=0.1)
    torch.testing.assert_close(scores, after.to(torch.bfloat16).score(images, prompts), rtol=0, atol=0)


def test_a_pretrained_reward_computes_in_the_stated_dtype(models):
    """A float32 run is not continued in bfloat16: its settings, identity and digest differ."""
    taking = [kind for kind in BUILT_IN if issubclass(kind, PretrainedReward)]
    assert [kind for kind in taking if "dtype" not in inspect.signature(kind).parameters] == []
    exact, half = (CLIPScore(models("clip"), dtype=dtype) for dtype in ("float32", "bfloat16"))
    for reward in (exact, half):
        reward.load()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.identity == {**exact.identity, "dtype": "bfloat16"}
    assert digest(half) != digest(exact)
    assert half.loading_key() != exact.loading_key()
    with pytest.raises(UserError, match="dtype must be float32, bfloat16 or float16, got 'bf16'"):
        CLIPScore(dtype="bf16")


def test_non_contiguous_images_are_accepted(case, reward):
    images, prompts = images_of(case, 4)
    part = images.permute(0, 1, 3, 2)[::2]
    scores, expected = (reward.score(each, prompts[::2]) for each in (part, part.contiguous()))
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=case.tolerance)


def test_scores_taken_in_inference_mode_do_not_stop_gradients(case, reward):
    if not reward.differentiable:
        pytest.skip("no gradient")
    images, prompts = images_of(case, 2)
    with torch.inference_mode():
        reward.score(images, prompts)
    reward(images.requires_grad_(), prompts).sum().backward()
    assert images.grad.abs().max() > 0


def test_no_parameter_is_trainable(reward):
    reward.load()
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert not any(
        module.training for module in reward.modules() if not isinstance(module, Reward | torch.nn.ModuleList)
    )
