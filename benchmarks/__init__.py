"""What a training step costs, beside every peer that can be installed: `python -m benchmarks`.

cases.py        models and batches of a given shape
contestants.py  one function a contestant: the same loss, computed its way
measure.py      agreement, interleaved time, peak memory in a process of its own
loops.py        whole training loops on real bodies: fit, TRL's trainer, the authors' step
sections.py     what is measured, and pocket.py: a whole run on the bundled model
goals.py        limits, and whether they hold
report.py       results.json -> README.md and scaling.png

On one GPU, `make gpu`: gpu.py runs the parts (gpu_numerics.py and gpu_machinery.py, gpu_bench.py, gpu_experiment.py), and
gpu_page.py with gpu_figures.py writes gpu/README.md.
"""
