"""Processes that share one job: `accelerate launch sparsereel search ...` on several GPUs, or several CPU processes.

Work is dealt out by number and meets again in files, so that a process which dies costs its own share only. Without
`accelerate launch` (or torchrun) a team has one member and none of this does anything.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Team:
    """This process among `size` processes; number `rank`, from 0."""

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Team:
        """The team that this process was launched in."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size <= 1:
            return cls()
        import torch
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes)

    @property
    def leads(self) -> bool:
        """Whether this is the process that goes on alone where work cannot be shared."""
        return self.rank == 0

    def does(self, number: int) -> bool:
        """Whether piece `number` of the work is this process's."""
        return number % self.size == self.rank

    def meet(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def from_leader(self, value: Any) -> Any:
        """`value` of the leading process, in every process."""
        if self.size == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]
