"""Public benchmarks of text-to-image models: one file per benchmark."""

__all__ = ["BENCHMARKS"]

BENCHMARKS = {  # name on the command line: class
    "geneval": "svdd.evaluation.benchmarks.geneval.GenEval",
    "t2i-compbench": "svdd.evaluation.benchmarks.compbench.T2ICompBench",
    "dpg": "svdd.evaluation.benchmarks.dpg.DPGBench",
    "drawbench": "svdd.evaluation.benchmarks.drawbench.DrawBench",
}
