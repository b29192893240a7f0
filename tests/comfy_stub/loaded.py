"""Models of svdd as ComfyUI's MODEL, VAE and CONDITIONING."""

import copy
import math
from importlib import import_module
from types import SimpleNamespace

import torch


class Discrete:
    """x = x0 + sigma noise, for a network that predicts noise or v."""

    def __init__(self, scheduler):
        alphas_cumprod, self.v = scheduler.alphas_cumprod, scheduler.config.prediction_type == "v_prediction"
        self.sigmas = ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5
        self.sigma_min, self.sigma_max = self.sigmas[0], self.sigmas[-1]

    def timestep(self, sigma):
        return (sigma.log().reshape(-1, 1) - self.sigmas.log()).abs().argmin(1)

    def sigma(self, timestep):
        low = int(timestep)
        high, share = min(low + 1, len(self.sigmas) - 1), float(timestep) - low
        return ((1 - share) * self.sigmas[low].log() + share * self.sigmas[high].log()).exp()

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        noise *= (1 + sigma**2) ** 0.5 if max_denoise else sigma  # in place, as ComfyUI may
        noise += latent_image
        return noise

    def inverse_noise_scaling(self, sigma, latent):
        return latent

    def predict(self, network, x, sigma):
        wide = sigma.reshape(-1, 1, 1, 1)
        output, scale = network(x / (wide**2 + 1) ** 0.5, self.timestep(sigma)), (wide**2 + 1) ** 0.5
        return x / scale**2 - output * wide / scale if self.v else x - wide * output


class Flow:
    """x = (1 - sigma) x0 + sigma noise, for a network that predicts noise - x0."""

    def __init__(self, shift):
        times = torch.arange(1, 1001) / 1000
        self.sigmas = shift * times / (1 + (shift - 1) * times)
        self.sigma_min, self.sigma_max = self.sigmas[0], self.sigmas[-1]

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return sigma * noise + (1 - sigma) * latent_image

    def inverse_noise_scaling(self, sigma, latent):
        return latent / (1 - sigma)

    def predict(self, network, x, sigma):
        return x - sigma.reshape(-1, 1, 1, 1) * network(x, sigma * 1000)


class Model:
    """ComfyUI's BaseModel, around a family of svdd."""

    def __init__(self, family, sampling):
        self.family, self.model_sampling = family, sampling
        self.latent_format = SimpleNamespace(latent_channels=family.latent_shape[0])
        config = family.vae.config
        self.scale, self.shift = config.scaling_factor, config.get("shift_factor") or 0.0
        self.inputs = []  # x of each call

    def process_latent_in(self, latent):
        return (latent - self.shift) * self.scale

    def process_latent_out(self, latent):
        return latent / self.scale + self.shift

    def extra_conds(self, cross_attn, noise, pooled_output=None, **options):
        return {"states": cross_attn} | ({} if pooled_output is None else {"pooled": pooled_output})

    def memory_required(self, input_shape, cond_shapes=None):
        return 4 * math.prod(input_shape)

    def apply_model(self, x, sigma, **texts):
        management = import_module("comfy.model_management")
        assert self in [patcher.model for patcher in management.on_device], "the model is not on the device"
        self.inputs.append(x)
        return self.model_sampling.predict(lambda scaled, t: self.family.network(scaled, t, texts, 1.0), x, sigma)


class ModelPatcher:
    """ComfyUI's MODEL."""

    def __init__(self, model):
        self.model, self.load_device = model, torch.device("cpu")
        self.model_options = {"transformer_options": {}}

    def get_model_object(self, name):
        return getattr(self.model, name)

    def clone(self):
        other = copy.copy(self)
        other.model_options = copy.deepcopy(self.model_options)
        return other

    def set_model_sampler_post_cfg_function(self, function, disable_cfg1_optimization=False):
        self.model_options.setdefault("sampler_post_cfg_function", []).append(function)


class VAE:
    """ComfyUI's VAE."""

    def __init__(self, family):
        self.vae, self.patcher = family.vae, ModelPatcher(family.vae)

    def decode(self, samples):
        import_module("comfy.model_management").load_models_gpu([self.patcher])
        images = self.vae.decode(samples, return_dict=False)[0]
        return (images / 2 + 0.5).clamp(0, 1).movedim(1, -1)


def conditioning(family, text):
    """Returns ComfyUI's CONDITIONING of a text."""
    texts = family.encode_texts([text])
    pooled = {"pooled_output": texts["pooled"]} if "pooled" in texts else {}
    return [[texts["states"], pooled]]
