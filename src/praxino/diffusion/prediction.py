"""What a network predicts of z = alpha x + sigma noise, and how each of the four gives data and noise back.

`v` is alpha noise - sigma x (Salimans & Ho 2022) and `flow` is noise - x, the velocity of rectified flow; both are
defined so for every path, and well conditioned at every t. `eps` says nothing of the data where alpha is zero, `x0`
nothing of the noise where sigma is: the conversions stay finite there, without meaning.
"""

from typing import Literal, assert_never, get_args

from torch import Tensor

from praxino.diffusion.path import TINY, Path, expand

Prediction = Literal["eps", "x0", "v", "flow"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)


def check(prediction: str) -> None:
    """Raise ValueError unless the prediction is known."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction {prediction!r} is unknown: choose one of {', '.join(PREDICTIONS)}.")


def levels(path: Path, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma with the axes of `x`."""
    return expand(path.alpha(t), x), expand(path.sigma(t), x)


def join(path: Path, prediction: Prediction, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Return the output that stands for this data and this noise, the inverse of `split`."""
    alpha, sigma = levels(path, t, x0)
    match prediction:
        case "eps":
            return eps
        case "x0":
            return x0
        case "v":
            return alpha * eps - sigma * x0
        case "flow":
            return eps - x0
        case _:
            assert_never(prediction)


def target(path: Path, prediction: Prediction, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return what the network learns to put out."""
    return join(path, prediction, x, noise, t)


def split(path: Path, prediction: Prediction, output: Tensor, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the data and the noise that the output stands for at `z`; they mix to `z` again."""
    alpha, sigma = levels(path, t, z)
    match prediction:
        case "eps":
            return (z - sigma * output) / alpha.clamp(min=TINY), output
        case "x0":
            return output, (z - alpha * output) / sigma.clamp(min=TINY)
        case "v":
            square = alpha.square() + sigma.square()
            return (alpha * z - sigma * output) / square, (sigma * z + alpha * output) / square
        case "flow":
            return (z - sigma * output) / (alpha + sigma), (z + alpha * output) / (alpha + sigma)
        case _:
            assert_never(prediction)


def convert(path: Path, source: Prediction, to: Prediction, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """Return an output of one kind as another kind at the same `z`."""
    return output if source == to else join(path, to, *split(path, source, output, z, t), t)


def sensitivity(path: Path, prediction: Prediction, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return how large the errors of x0 and of eps are for an error of one in the output, z given; shaped as `t`."""
    alpha, sigma = path.alpha(t).clamp(min=TINY), path.sigma(t).clamp(min=TINY)
    match prediction:
        case "eps":
            unit = 1 / alpha
        case "x0":
            unit = 1 / sigma
        case "v":
            unit = 1 / (alpha.square() + sigma.square())
        case "flow":
            unit = 1 / (alpha + sigma)
        case _:
            assert_never(prediction)
    return sigma * unit, alpha * unit
