"""One row a zoo model: the smallest instance that has every feature, and a call of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import zoo


@dataclass(frozen=True)
class ModelCase:
    """How a model is built and called in tests.

    Args:
        build: Builds the model; called inside a test, so that an error fails that test only.
        args: From the model to the positional arguments of an example call, all rows.
        plate: Name of the plate whose rows are data.
        variants: Further constructors of the same model, by name, for tests over variants.
        mode: Whether a relaxation from the usual start nears a mode of the posterior.
        latents: Whether there is anything to infer; fully visible models meet no guide.
    """

    build: Callable[[], Any]
    args: Callable[[Any], tuple[torch.Tensor, ...]]
    plate: str = "data"
    variants: dict[str, Callable[[], Any]] = field(default_factory=dict)
    mode: bool = True
    latents: bool = True


def simulate(model: Any) -> tuple[torch.Tensor, ...]:
    """Six rows that the model itself generates, without a trace of them left."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        return (model(size=6).detach(),)


MODEL_CASES = {
    "linear_gaussian": ModelCase(
        build=lambda: zoo.make("linear_gaussian", dims=(2, 3, 5)),
        args=simulate,
        variants={
            "depth 1": lambda: zoo.make("linear_gaussian", dims=(2, 4)),
            "depth 3, diagonal": lambda: zoo.make(
                "linear_gaussian", dims=(2, 3, 2, 4), covariance="diagonal"
            ),
            "factor analysis": lambda: zoo.make(
                "linear_gaussian", dims=(2, 5), covariance=("unit", "diagonal"), bias=(False, True)
            ),
            "probabilistic PCA": lambda: zoo.make(
                "linear_gaussian",
                dims=(2, 5),
                covariance=("unit", "isotropic"),
                bias=(False, True),
            ),
        },
    ),
    "vae": ModelCase(
        build=lambda: zoo.make("vae", x_dim=4, z_dim=2, hidden=(3,)),
        args=simulate,
        variants={
            "gaussian": lambda: zoo.make(
                "vae", x_dim=4, z_dim=2, hidden=(3,), likelihood="gaussian"
            ),
            "continuous bernoulli": lambda: zoo.make(
                "vae", x_dim=4, z_dim=2, hidden=(3,), likelihood="continuous_bernoulli"
            ),
            "linear decoder": lambda: zoo.make("vae", x_dim=4, z_dim=2, hidden=()),
            "full covariances": lambda: zoo.make(
                "vae",
                x_dim=4,
                z_dim=2,
                hidden=(3,),
                likelihood="gaussian",
                likelihood_covariance="symmetric",
                prior_covariance="cholesky",
            ),
        },
    ),
    "conv_vae": ModelCase(
        build=lambda: zoo.make("conv_vae", x_shape=(1, 8, 8), z_dim=2, channels=(2,)),
        args=simulate,
        variants={
            "color, gaussian, odd": lambda: zoo.make(
                "conv_vae", x_shape=(3, 9, 8), z_dim=2, channels=(3, 2), likelihood="gaussian"
            ),
            "continuous bernoulli": lambda: zoo.make(
                "conv_vae",
                x_shape=(1, 8, 8),
                z_dim=2,
                channels=(2,),
                likelihood="continuous_bernoulli",
            ),
        },
    ),
    "hierarchical_vae": ModelCase(
        build=lambda: zoo.make("hierarchical_vae", x_dim=4, z_dims=(3, 2), hidden=(3,)),
        args=simulate,
        variants={
            "skip, three levels": lambda: zoo.make(
                "hierarchical_vae", x_dim=4, z_dims=(3, 2, 2), hidden=(3,), skip=True
            ),
            "gaussian": lambda: zoo.make(
                "hierarchical_vae", x_dim=4, z_dims=(3, 2), hidden=(3,), likelihood="gaussian"
            ),
            "full covariances": lambda: zoo.make(
                "hierarchical_vae",
                x_dim=4,
                z_dims=(3, 2),
                hidden=(3,),
                likelihood="gaussian",
                likelihood_covariance="cholesky",
                prior_covariance="symmetric",
            ),
            "one level": lambda: zoo.make("hierarchical_vae", x_dim=4, z_dims=(2,), hidden=(3,)),
        },
    ),
    "sparse_coding": ModelCase(
        build=lambda: zoo.make("sparse_coding", x_dim=4, z_dim=3, prior="cauchy"),
        args=simulate,
        variants={
            # At zero its density has a kink: there is no Hessian to read a covariance from.
            "laplace": lambda: zoo.make("sparse_coding", x_dim=4, z_dim=3),
            "normal": lambda: zoo.make("sparse_coding", x_dim=4, z_dim=3, prior="normal"),
        },
    ),
    "rao_ballard": ModelCase(
        build=lambda: zoo.make("rao_ballard", x_dim=4, z_dims=(2, 2), num_modules=2),
        args=simulate,
        variants={
            "identity, own bases": lambda: zoo.make(
                "rao_ballard", x_dim=4, z_dims=(2, 2), activation="identity", shared=False
            ),
            "logistic": lambda: zoo.make(
                "rao_ballard", x_dim=4, z_dims=(2, 2), activation="logistic"
            ),
            "cauchy": lambda: zoo.make("rao_ballard", x_dim=4, z_dims=(2, 2), prior="cauchy"),
        },
    ),
    "state_space": ModelCase(
        build=lambda: zoo.make("state_space", z_dim=2, x_dim=2, num_steps=2),
        args=simulate,
        variants={
            "diagonal, bias": lambda: zoo.make(
                "state_space", z_dim=1, x_dim=2, num_steps=2, covariance="diagonal", bias=True
            ),
        },
    ),
    "whitening": ModelCase(
        build=lambda: zoo.make("whitening", x_dim=3),
        args=simulate,
        latents=False,
        variants={
            "symmetric": lambda: zoo.make("whitening", x_dim=3, parameterization="symmetric")
        },
    ),
    "flow_prior_vae": ModelCase(
        build=lambda: zoo.make(
            "flow_prior_vae", x_dim=4, z_dim=2, hidden=(3,), flow_hidden=(4,), levels=2
        ),
        args=simulate,
    ),
    "flow_likelihood_vae": ModelCase(
        build=lambda: zoo.make(
            "flow_likelihood_vae", x_dim=3, z_dim=2, hidden=(3,), flow_hidden=(4,)
        ),
        args=simulate,
    ),
    "deep_markov": ModelCase(
        build=lambda: zoo.make(
            "deep_markov", x_dim=3, z_dim=2, emission=4, transition=3, num_steps=2
        ),
        args=simulate,
        variants={
            "gaussian": lambda: zoo.make(
                "deep_markov",
                x_dim=3,
                z_dim=2,
                emission=4,
                transition=3,
                likelihood="gaussian",
                num_steps=2,
            ),
        },
    ),
    "vrnn": ModelCase(
        build=lambda: zoo.make("vrnn", x_dim=3, z_dim=2, recurrent=3, hidden=(3,), num_steps=2),
        args=simulate,
    ),
    "srnn": ModelCase(
        build=lambda: zoo.make("srnn", x_dim=3, z_dim=2, recurrent=3, hidden=(3,), num_steps=2),
        args=simulate,
    ),
    "autoregressive_gaussian": ModelCase(
        build=lambda: zoo.make("autoregressive_gaussian", x_dim=2, order=2, num_steps=4),
        args=simulate,
        latents=False,
        variants={
            "constant scale": lambda: zoo.make(
                "autoregressive_gaussian", x_dim=1, constant_scale=True, num_steps=2
            ),
            "network": lambda: zoo.make(
                "autoregressive_gaussian", x_dim=2, hidden=(3,), num_steps=2
            ),
        },
    ),
    "autoregressive_flow": ModelCase(
        build=lambda: zoo.make("autoregressive_flow", x_dim=2, order=2, num_steps=4),
        args=simulate,
        latents=False,
        variants={
            "constant scale": lambda: zoo.make(
                "autoregressive_flow", x_dim=1, constant_scale=True, num_steps=2
            ),
        },
    ),
    "temporal_difference": ModelCase(
        build=lambda: zoo.make("temporal_difference", x_dim=2, order=2, num_steps=4),
        args=simulate,
        latents=False,
    ),
    "flow_state_space": ModelCase(
        build=lambda: zoo.make(
            "flow_state_space",
            x_dim=3,
            z_dim=2,
            hidden=(3,),
            transition=3,
            levels=1,
            flow_hidden=(),
            num_steps=2,
        ),
        args=simulate,
        variants={
            "without a flow": lambda: zoo.make(
                "flow_state_space", x_dim=3, z_dim=2, hidden=(3,), transition=3, levels=0
            ),
        },
    ),
    "pattern_generator": ModelCase(
        build=lambda: zoo.make("pattern_generator", x_dim=2, num_steps=2, noise_scale=0.5),
        args=simulate,
    ),
    "visual_pathway": ModelCase(
        build=lambda: zoo.make("visual_pathway", x_dim=3, z_dims=(2, 2), hidden=(3,), num_steps=2),
        args=simulate,
    ),
    "eight_schools": ModelCase(
        build=lambda: zoo.make("eight_schools"),
        args=lambda model: (model.y, model.sigma),
        plate="schools",
        variants={"centered": lambda: zoo.make("eight_schools", centered=True)},
    ),
    # Without the leak its density is zero almost everywhere, and no guide has a finite ELBO.
    # The usual start lies on the kink of |theta_1 + theta_2|, between its two modes.
    "two_moons": ModelCase(
        build=lambda: zoo.make("two_moons", leak=0.1), args=simulate, mode=False
    ),
    # The usual start, zero, is a saddle between its four modes.
    "slcp": ModelCase(build=lambda: zoo.make("slcp"), args=simulate, mode=False),
    "gaussian_mixture": ModelCase(build=lambda: zoo.make("gaussian_mixture"), args=simulate),
}
