"""Run in two ranks by util/test_run.py: trains, then writes each rank's trained weights.

    torchrun --nproc_per_node 2 tests/keep_weights.py OUT <options of train.py>
"""

import os
import sys

import tiny
import torch

sys.path.insert(0, str(tiny.ROOT))
import train  # noqa: E402
from util import distributed  # noqa: E402

students, wrap = [], distributed.wrap
distributed.wrap = lambda student, ranks: students.append(student) or wrap(student, ranks)
train.main(sys.argv[2:])
weights = {name: parameter.detach() for name, parameter in students[0].named_parameters()
           if parameter.requires_grad}
torch.save(weights, f"{sys.argv[1]}.{os.environ['RANK']}")
