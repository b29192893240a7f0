"""What images are steered towards and measured by: one file per reward."""
