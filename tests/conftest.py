"""Shared by all tests: one thread (the suite runs on small machines) and no global randomness needed."""

import torch

torch.set_num_threads(1)
