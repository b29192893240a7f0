from .base import Denoised as Denoised
from .base import Diffusion as Diffusion
from .latent import LatentDiffusion as LatentDiffusion
from .qwen_image import QwenImage as QwenImage
from .sana import Sana as Sana
from .stable_diffusion import StableDiffusion as StableDiffusion
from .z_image import ZImage as ZImage
