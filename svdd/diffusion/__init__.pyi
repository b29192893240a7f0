from .base import Denoised as Denoised
from .base import Diffusion as Diffusion
from .latent import LatentDiffusion as LatentDiffusion
from .pixart_sigma import PixArtSigma as PixArtSigma
from .stable_diffusion import StableDiffusion as StableDiffusion
from .stable_diffusion_xl import StableDiffusionXL as StableDiffusionXL
