from .base import Denoised as Denoised
from .base import Diffusion as Diffusion
from .family import ModelFamily as ModelFamily
from .kernels import DIFFUSION_KERNELS as DIFFUSION_KERNELS
from .kernels import FLOW_KERNELS as FLOW_KERNELS
from .latent import LatentDiffusion as LatentDiffusion
from .pipelines import to_images as to_images
from .stable_diffusion import StableDiffusion as StableDiffusion
