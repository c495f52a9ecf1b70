"""Settings that all tests share: no deadlines on a busy machine, and in CI the same examples every time."""

import os

import torch
from hypothesis import settings

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

torch.set_num_threads(1)  # the models of the tests are too small to share among cores
