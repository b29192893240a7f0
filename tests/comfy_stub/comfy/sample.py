"""What nodes call to sample."""

import comfy.samplers
import torch


def prepare_noise(latent_image, seed, noise_inds=None):
    return torch.randn(latent_image.shape, generator=torch.manual_seed(seed))


def fix_empty_latent_channels(model, latent_image):
    channels = model.get_model_object("latent_format").latent_channels
    if latent_image.shape[1] != channels and torch.count_nonzero(latent_image) == 0:
        return latent_image.repeat(1, -(-channels // latent_image.shape[1]), 1, 1)[:, :channels]
    return latent_image


def sample_custom(
    model,
    noise,
    cfg,
    sampler,
    sigmas,
    positive,
    negative,
    latent_image,
    noise_mask=None,
    callback=None,
    disable_pbar=False,
    seed=None,
):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider.sample(noise, latent_image, sampler, sigmas, noise_mask, callback, disable_pbar, seed)
