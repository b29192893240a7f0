"""The callback of samplers."""

import comfy.utils


def prepare_callback(model, steps, x0_output_dict=None):
    bar = comfy.utils.ProgressBar(steps)

    def callback(step, x0, x, total_steps):
        if x0_output_dict is not None:
            x0_output_dict["x0"] = x0
        bar.update_absolute(step + 1, total_steps)

    return callback
