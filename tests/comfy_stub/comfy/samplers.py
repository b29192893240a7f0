"""Noise levels, and the guider that evaluates a model with classifier-free guidance."""

import copy
import math

import torch


def _normal(sampling, steps):
    ends = (float(sampling.timestep(sigma)) for sigma in (sampling.sigma_max, sampling.sigma_min))
    times = torch.linspace(*ends, steps)
    return torch.tensor([*(float(sampling.sigma(t)) for t in times), 0.0])


def _simple(sampling, steps):
    every = len(sampling.sigmas) / steps
    return torch.tensor([*(float(sampling.sigmas[-1 - int(k * every)]) for k in range(steps)), 0.0])


_SCHEDULES = {"normal": _normal, "simple": _simple}


def calculate_sigmas(model_sampling, scheduler_name, steps):
    return _SCHEDULES[scheduler_name](model_sampling, steps)


class KSampler:
    SCHEDULERS = [*_SCHEDULES]  # noqa: RUF012

    def __init__(self, model, steps, device, sampler=None, scheduler=None, denoise=None, model_options=None):
        sampling = model.get_model_object("model_sampling")
        whole = steps if denoise is None or denoise > 0.9999 else int(steps / denoise)
        self.sigmas = calculate_sigmas(sampling, scheduler, whole)[-(steps + 1) :].to(device)


class CFGGuider:
    def __init__(self, model_patcher):
        self.model_patcher, self.model_options = model_patcher, model_patcher.model_options
        self.original_conds, self.cfg = {}, 1.0

    def set_conds(self, positive, negative):
        named = {"positive": positive, "negative": negative}
        self.original_conds = {
            name: [{**options, "cross_attn": states} for states, options in conds] for name, conds in named.items()
        }

    def set_cfg(self, cfg):
        self.cfg = cfg

    def __call__(self, x, timestep, model_options=None, seed=None):
        uncond = None if math.isclose(self.cfg, 1.0) else self.conds["negative"]
        denoised = self._predict(x, timestep, self.conds["positive"])
        if uncond is not None:
            other = self._predict(x, timestep, uncond)
            denoised = other + (denoised - other) * self.cfg
        for patch in model_options.get("sampler_post_cfg_function", []):
            denoised = patch({"denoised": denoised, "sigma": timestep, "input": x, "model": self.inner_model})
        return denoised

    def _predict(self, x, timestep, conds):
        (cond,) = conds
        inputs = {name: value.expand(len(x), *value.shape[1:]) for name, value in cond["model_conds"].items()}
        return self.inner_model.apply_model(x, timestep, **inputs)

    def sample(
        self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False, seed=None
    ):
        import comfy.model_management

        self.inner_model, device = self.model_patcher.model, self.model_patcher.load_device
        comfy.model_management.load_models_gpu([self.model_patcher])
        noise, latent_image = (each.to(device, torch.float32) for each in (noise, latent_image))
        if torch.count_nonzero(latent_image) > 0:
            latent_image = self.inner_model.process_latent_in(latent_image)
        self.conds = {
            name: [{**cond, "model_conds": self.inner_model.extra_conds(noise=noise, **cond)} for cond in conds]
            for name, conds in self.original_conds.items()
        }
        options = copy.copy(self.model_options)
        extra_args = {"model_options": options, "seed": seed}
        samples = sampler.sample(self, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)
        samples = self.inner_model.process_latent_out(samples.to(torch.float32))
        del self.inner_model
        return samples
