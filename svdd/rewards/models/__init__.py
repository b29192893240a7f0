"""What several rewards share: CLIP and BLIP models, image preprocessing, remote and local vision-language models."""
