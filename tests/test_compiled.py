"""Compiled calls: few graphs for any number of rows, and the plain module's results, weights, gradients and errors."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional

from svdd.diffusion import compiled
from svdd.diffusion.compiled import compile_calls, compile_network
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.diffusion.twins import blocks_of
from svdd.guided_diffusion import GuidedDiffusion
from svdd.rewards.brightness import Brightness
from svdd.samplers.svdd import SVDD

ROWS = (6, 8, 1, 4, 2, 1, 3, 15)


class Layer(nn.Module):
    """Attention with a text and a timestep, as a network's arguments are: rows, a scalar, tokens."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, t, *, texts):
        attended = functional.scaled_dot_product_attention(self.inner(x), texts, texts)
        return (self.outer(attended).tanh() + t.expand(len(x))[:, None, None],)


class Counting:
    """A backend that computes a graph as it is, and keeps the number of rows that each graph was made for."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph.forward


@pytest.fixture
def counting(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "DEFAULT", counting := Counting())
    yield counting
    torch._dynamo.reset()


def layer():
    torch.manual_seed(0)
    return Layer()


def inputs(rows, tokens=5, seed=0):
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, 4, generator=noise), torch.tensor(0.5), torch.randn(rows, tokens, 4, generator=noise)


def call(module, x, t, texts):
    return module(x, t, texts=texts)[0]


def test_one_graph_serves_several_rows_and_another_a_single_one(counting):
    plain, module = layer(), layer()
    compile_calls([module])
    for rows in ROWS:
        with torch.inference_mode():
            given = inputs(rows)
            torch.testing.assert_close(call(module, *given), call(plain, *given))
    assert len(counting.graphs) == 2
    with torch.inference_mode():
        for tokens in (7, 9, 11):  # texts of other length
            call(module, *inputs(4, tokens))
    assert len(counting.graphs) == 3
    assert module.state_dict().keys() == plain.state_dict().keys()


def test_gradients_are_those_of_the_plain_module_and_have_one_graph(counting):
    plain, module = layer(), layer()
    compile_calls([module])
    for rows in (6, 3, 5):
        gradients = []
        for each in (plain, module):
            x, t, texts = inputs(rows)
            x.requires_grad_()
            gradients += torch.autograd.grad(call(each, x, t, texts).square().sum(), x)
        torch.testing.assert_close(*gradients)
    assert len(counting.graphs) == 1
    assert not any(weight.requires_grad for weight in module.parameters())  # their gradients would be computed, too
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        given = inputs(6)
        torch.testing.assert_close(call(module, *given), call(plain, *given))
    assert len(counting.graphs) == 2


def test_copies_are_not_compiled(counting):
    module = layer()
    compile_calls([module])
    for other in (copy.copy(module), copy.deepcopy(module)):
        call(other, *inputs(2))
    assert not counting.graphs


def test_threads_may_call_while_another_compiles(counting):
    plain, module, other = layer(), layer(), layer()
    compile_calls([module])
    compile_calls([other])

    def compute(k):
        with torch.inference_mode():
            given = inputs(k % 4 + 1, seed=k)
            return [call(each, *given) for each in ((module, other, plain) if k % 2 else (other, module, plain))]

    with ThreadPoolExecutor(4) as pool:
        for one, two, expected in pool.map(compute, range(60)):
            torch.testing.assert_close(one, expected)
            torch.testing.assert_close(two, expected)
    assert len(counting.graphs) == 4  # two threads that look for a graph at once compile none anew


def test_without_a_compiler_the_plain_module_computes_and_a_warning_says_why(tmp_path, monkeypatch):
    plain, module = layer(), layer()
    compile_calls([module])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}), torch.inference_mode():
        with pytest.warns(UserWarning, match="compile: a Layer cannot be compiled here and is computed without: .*"):
            found = call(module, *inputs(2))
        assert torch.equal(found, call(plain, *inputs(2)))
        assert torch.equal(call(module, *inputs(3)), call(plain, *inputs(3)))  # without another warning
    torch._dynamo.reset()


@pytest.mark.filterwarnings("error")
def test_errors_of_the_module_are_its_own(counting):
    module = layer()
    compile_calls([module])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        module(torch.zeros(2, 3, 5), torch.tensor(0.5), texts=torch.zeros(2, 5, 4))
    call(module, *inputs(2))
    assert counting.graphs


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer_blocks = nn.ModuleList([layer() for _ in range(3)])

    def forward(self, x, t, *, texts):
        for block in self.transformer_blocks:
            (x,) = block(x, t, texts=texts)
        return (x,)


def test_the_blocks_of_a_transformer_are_compiled_one_by_one(counting):
    plain, network = Blocks(), Blocks()
    compile_network(network)
    assert network._compiled_call_impl is None
    assert all(block._compiled_call_impl is not None for block in blocks_of(network))
    torch.testing.assert_close(call(network, *inputs(4)), call(plain, *inputs(4)))
    assert len(counting.graphs) == 1


@pytest.mark.slow
def test_a_run_compiles_network_and_decoder_once(sd15, counting):
    images, fingerprints, names = [], [], []
    for compile in (False, True):
        diffusion = StableDiffusion(sd15, 3, compile=compile, height=16, width=16, reproducible=False)
        model = GuidedDiffusion(Brightness(), diffusion, SVDD(3))
        for prompts in (["a", "b"], ["c", "d"], ["e"]):  # the last batch is smaller
            with torch.inference_mode():
                images.append(model.sample(prompts, seed=len(images) % 3)[0])
        fingerprints.append(diffusion.fingerprints())
        names.append(diffusion.state_dict().keys())
    for plain, found in zip(images[:3], images[3:], strict=True):
        torch.testing.assert_close(found, plain, atol=1e-4, rtol=0)
    assert fingerprints[0] == fingerprints[1]
    assert names[0] == names[1]
    of_network = ["encoder_hidden_states" in graph.code for graph in counting.graphs]
    assert sorted(of_network) == [False, True]


@pytest.mark.slow
def test_kernels_of_the_real_compiler_serve_other_numbers_of_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    module = copy.deepcopy(plain)
    compile_calls([module])
    with torch.inference_mode(), torch._inductor.config.patch({"cpp_cache_precompile_headers": False}):
        for rows in (6, 3, 6):
            x, *_ = inputs(rows)
            torch.testing.assert_close(module(x), plain(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
