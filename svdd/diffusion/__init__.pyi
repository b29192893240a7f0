from .base import Denoised as Denoised
from .base import Diffusion as Diffusion
from .flux import Flux as Flux
from .flux2_klein import Flux2Klein as Flux2Klein
from .latent import LatentDiffusion as LatentDiffusion
from .stable_diffusion import StableDiffusion as StableDiffusion
from .stable_diffusion_3 import StableDiffusion3 as StableDiffusion3
