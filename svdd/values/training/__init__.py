"""Training and calibration of values on rollouts of the pretrained model."""
