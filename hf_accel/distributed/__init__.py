"""Several processes: collectives, what the launcher chose, sharded weights, signals."""

from .collectives import (
    all_gather,
    all_gather_objects,
    all_gather_with_grad,
    all_reduce,
    barrier,
    broadcast_object,
    host_group,
    is_main,
    on_any,
    processes_on_node,
    rank,
    say,
    warning_once,
    world_size,
)
