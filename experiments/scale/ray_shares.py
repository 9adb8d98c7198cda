"""One evaluation as tasks of Ray, each a share of the run, on any cluster that Ray runs on.

    python experiments/scale/ray_shares.py --shares 8 --gpus 1 --model bit_s_r101x1 ... --out ...

A task whose worker or node is lost is started again, and goes on with what its share lacks.
"""

import dataclasses
import os
import sys
from typing import Any

import ray
import tyro

from gradnorm_jax.cli.evaluate import EvaluateOptions, run_evaluate
from gradnorm_jax.evaluation.records import Interrupted, Unfinished


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(EvaluateOptions):
    """`gradnorm-jax evaluate` in shares; `--out` is a folder that all nodes see.

    Attributes:
        shares: how many; there may be more than the cluster has room for at a time.
        cpus: how many CPUs a share takes.
        gpus: how many GPUs a share takes.
        resources: what else it takes, by name, such as `TPU 4`.
        address: of the cluster, `auto` for that of this node; by default Ray starts here.
        retries: how often a share is started again after its worker was lost.
        wait: how many seconds a share waits for others to finish fitting; then it makes room for
            those that have not begun, and comes back.
    """

    shares: int
    cpus: float = 1.0
    gpus: float = 0.0
    resources: dict[str, float] = dataclasses.field(default_factory=dict)
    address: str | None = None
    retries: int = 10
    wait: float = 30.0


def score_share(options: Options, number: int) -> str | None:
    """Does share `number`; what there is to say in the end, or None if it has to come back."""
    share = dataclasses.replace(options, process=f"{number}/{options.shares}")
    try:
        return str(run_evaluate(share, progress=False))
    except Unfinished as done:
        return str(done)
    except Interrupted:
        return None


def main(options: Options) -> None:
    """Starts all shares, and prints what each has to say, the last one the table."""
    # Modules of the user's own are named on the command line; Ray takes the path to its workers.
    sys.path.insert(0, os.getcwd())
    ray.init(address=options.address, log_to_driver=False)
    as_task: Any = ray.remote(
        num_cpus=options.cpus,
        num_gpus=options.gpus,
        resources=options.resources,
        max_retries=options.retries,
        max_calls=1,  # a worker that stays would keep the devices
    )
    task = as_task(score_share)
    running = {task.remote(options, number): number for number in range(options.shares)}
    while running:
        (done, *_), _ = ray.wait([*running])
        number = running.pop(done)
        try:
            report = ray.get(done)
        except ray.exceptions.RayTaskError as error:
            sys.exit(f"share {number}: {error.cause}")
        if report is None:
            running[task.remote(options, number)] = number
        else:
            print(report, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
