"""Nodes for ComfyUI: guided sampling of loaded models with the samplers and rewards of svdd."""

from .nodes import GuidedKSampler, RewardNode, SamplerNode

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

NODE_CLASS_MAPPINGS = {"SVDDReward": RewardNode, "SVDDSampler": SamplerNode, "SVDDGuidedKSampler": GuidedKSampler}
NODE_DISPLAY_NAME_MAPPINGS = {
    "SVDDReward": "SVDD Reward",
    "SVDDSampler": "SVDD Sampler",
    "SVDDGuidedKSampler": "SVDD Guided KSampler",
}
