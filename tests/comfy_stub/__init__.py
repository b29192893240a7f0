"""A small stand-in for ComfyUI, written from its public interface: what custom nodes and samplers may call.

Put this folder on the import path to import `comfy` and `latent_preview` from it. `loaded.py` wraps a model of svdd in
the objects that ComfyUI hands to nodes.
"""
