from .auto import AutoDiffusion as AutoDiffusion
from .auto import from_pipeline as from_pipeline
from .base import Denoised as Denoised
from .base import Diffusion as Diffusion
from .latent import LatentDiffusion as LatentDiffusion
from .stable_diffusion import StableDiffusion as StableDiffusion
