"""tinygpt2's command line for `accelerate launch`, with FSDP and DeepSpeed on CPUs, where Accelerate would not use them.

Only what Accelerate believes of the machine is changed: processes that talk through gloo, on the CPU.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType

from tinygpt2.cli.app import main
from tinygpt2.training import preparation as setup


def on_cpu(state: PartialState) -> None:
    state.device = torch.device("cpu")


def accelerator(**options: Any) -> Accelerator:
    made = Accelerator(**options | {"cpu": False})
    if made.is_main_process:
        sys.stderr.write(f"{made.num_processes} processes by {made.distributed_type.value}\n")
    return made


if __name__ == "__main__":
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)  # type: ignore[method-assign]
    PartialState.set_device = on_cpu  # type: ignore[method-assign]
    setup.Accelerator = accelerator  # type: ignore[assignment, misc]
    main()
