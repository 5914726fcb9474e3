"""How often the host may wait for the GPU, and how many kernels a step may start. Lower them when the code gets better."""

STEP = {(False, 1): 1, (False, 4): 1, (True, 1): 1, (True, 4): 1}  # by whether blocks are padded, and accumulation
OTHER = {"evaluation": 1, "perplexity": 10, "auto-batch-size": 2, "cut": 201}  # in a whole run of each
CACHE = 1  # in addition, in a step that computes the states of the teacher's cache and stores them
OPTIMIZER = {"adamw": 4, "muon": 56}

# What benchmarks/fake_gpu.py may count for GPT-2 small to 6 layers.
BENCHMARK = {
    "synchronisations": 1, "padded_synchronisations": 2, "logit_bytes_moved": 6e9, "adamw": 8, "muon": 80,
    "muon_12_layers": 80,
}  # fmt: skip
