"""Which network? The paper's study of capacity, its DenseNet-121, and networks for CIFAR.

    python experiments/paper/networks.py --networks bit_s_r50x1=BiT-S-R50x1 \
        bit_s_r101x1=BiT-S-R101x1 bit_s_r50x3=BiT-S-R50x3 bit_s_r101x3=BiT-S-R101x3 \
        bit_s_r152x4=BiT-S-R152x4 densenet121=densenet121-a639ec97 --detectors energy gradnorm \
        --id imagenet/val --ood Textures=dtd/images --out runs/networks

Each network sees the same images through its own preprocessing, in a run folder of its own.
Interrupted, the same command goes on where it was; another network is one more of --networks.
"""

import dataclasses
from pathlib import Path

import tyro

import gradnorm_jax as gj
from experiments.paper.study import Row, describe, evaluate_timed, write_study
from gradnorm_jax.cli.evaluate import EvaluateOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworksOptions(EvaluateOptions):
    """Compare networks.

    Attributes:
        networks: each as MODEL=WEIGHTS, which are what --model and --weights would be; or MODEL
            alone, of a function that takes no weights.
        detectors: for each network a row each; GradNorm by default.
    """

    networks: tuple[str, ...]


def main(options: NetworksOptions) -> None:
    """Evaluates each network, and writes their table."""
    detectors = tuple(d for group in options.detectors for d in group) or ("gradnorm",)
    names = [detector.name for detector in gj.parse_detectors(detectors)]
    rows, notes = [], []
    for name, own in evaluations(options).items():
        result, told = evaluate_timed(dataclasses.replace(own, detectors=(detectors,)))
        rows += [Row(f"{name}, {detector}", result, detector) for detector in names]
        notes.append(f"{name}: {told}")
    write_study(options.out, describe("Detectors by network", rows), notes)


def evaluations(options: NetworksOptions) -> dict[str, EvaluateOptions]:
    """The evaluation of each network, by the name of its row and of its folder below `out`.

    Raises:
        ValueError: none is given, or one twice, or --model or --weights as well.
    """
    if options.model or options.weights or options.from_cache or not options.networks:
        raise ValueError(
            "--networks takes the place of --model, --weights and --from-cache: give at least one, "
            "as MODEL=WEIGHTS"
        )
    common = {f.name: getattr(options, f.name) for f in dataclasses.fields(EvaluateOptions)}
    found: dict[str, EvaluateOptions] = {}
    for spec in options.networks:
        model, _, weights = spec.partition("=")
        path = Path(weights) if weights else None
        name = model if path is None else f"{model}={path.stem}"
        if name in found:
            raise ValueError(f"there are two networks {name}: give their weights other names")
        own = common | {"model": model, "weights": path, "out": f"{options.out}/{name}"}
        found[name] = EvaluateOptions(**own)
    return found


if __name__ == "__main__":
    main(tyro.cli(NetworksOptions, description=__doc__))
