"""Tests mirror the packages. Tiny models run on one thread: several on a busy machine are 50 times slower."""

import torch

torch.set_num_threads(1)
