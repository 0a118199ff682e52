"""NumPyro: eight schools, radon and the two-level VAE.

    eight_schools, radon   option guide: "normal" (AutoNormal) | "multivariate_normal"
                           (AutoMultivariateNormal); Adam, lr 0.01
    vae                    amortized mean field; Adam, lr 0.001

One step is one `SVI.update` with `Trace_ELBO()`. The option `loop` says how steps are made:

    "update"     a Python loop of a jitted `svi.update`, the state donated
    "scan"       `svi.run(progress_bar=False)` as a whole under `jax.jit`: its steady state, one
                 compiled scan, with nothing traced again
    "run"        `svi.run(progress_bar=False)` as it is called; traces and compiles every time
    "progress"   `svi.run()` as it is called, with its progress bar; compiles every time

`check` computes Trace_ELBO's loss with the programs and guides that are timed, at the given
parameters, with the guide's draws put where the given noise leads.
"""

from __future__ import annotations

from benchmarks.speed.peers.protocol import Program, limit_threads, options_of, serve

_THREADS = limit_threads()

from collections.abc import Callable, Mapping  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import numpyro  # noqa: E402
import numpyro.distributions as dist  # noqa: E402
from numpyro.handlers import replay, seed  # noqa: E402
from numpyro.infer import SVI, Trace_ELBO  # noqa: E402
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal  # noqa: E402
from numpyro.infer.util import log_density  # noqa: E402

from benchmarks.speed.peers.problems import load  # noqa: E402

__all__ = ["build", "main"]

Arrays = dict[str, Any]

_LOOPS = ("update", "scan", "run", "progress")


def eight_schools(y: Any, sigma: Any) -> None:
    """Eight schools, non-centered."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", 8):
        theta_trans = numpyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + tau * theta_trans, sigma), obs=y)


def radon(floor: Any, uranium: Any, county: Any, y: Any) -> None:
    """Radon in homes, see :mod:`~benchmarks.speed.peers.problems`."""
    mu_alpha = numpyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    sigma_alpha = numpyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    sigma_y = numpyro.sample("sigma_y", dist.HalfNormal(1.0))
    beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    with numpyro.plate("counties", 85):
        alpha_raw = numpyro.sample("alpha_raw", dist.Normal(0.0, 1.0))
    alpha = mu_alpha + sigma_alpha * alpha_raw
    with numpyro.plate("homes", y.shape[0]):
        loc = alpha[county] + beta[0] * uranium + beta[1] * floor
        numpyro.sample("y", dist.Normal(loc, sigma_y), obs=y)


def _linear(x: Any, given: Arrays, name: str) -> Any:
    weight = numpyro.param(f"{name}.weight", given[f"{name}.weight"])
    return x @ weight.T + numpyro.param(f"{name}.bias", given[f"{name}.bias"])


def vae(x: Any, given: Arrays) -> None:
    """Two levels, 16-32-784."""
    with numpyro.plate("data", x.shape[0]):
        z2 = numpyro.sample("z2", dist.Normal(0.0, 1.0).expand([16]).to_event(1))
        features = jax.nn.silu(_linear(z2, given, "model.levels.0.network.0"))
        loc = _linear(features, given, "model.levels.0.loc")
        raw = _linear(features, given, "model.levels.0.raw_scale")
        level = dist.Normal(loc, 0.05 + jax.nn.softplus(raw)).to_event(1)
        z1 = numpyro.sample("z1", level)
        features = jax.nn.silu(_linear(z1, given, "model.network.0"))
        logits = _linear(features, given, "model.likelihood.output")
        numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def vae_guide(x: Any, given: Arrays) -> None:
    """The amortized mean field of both levels."""
    inputs = (x - given["guide.shift"]) / given["guide.scale"]
    features = jax.nn.silu(_linear(inputs, given, "guide.network.0"))
    lam = given["guide.init"] + _linear(features, given, "guide.network.2")
    loc, scale = lam[:, :48], jax.nn.softplus(lam[:, 48:]) + 1e-8
    with numpyro.plate("data", x.shape[0]):
        numpyro.sample("z2", dist.Normal(loc[:, :16], scale[:, :16]).to_event(1))
        numpyro.sample("z1", dist.Normal(loc[:, 16:], scale[:, 16:]).to_event(1))


def _split(task: str, u: Any) -> Arrays:
    """Packed latents by site."""
    if task == "eight_schools":
        return {"mu": u[0], "tau": u[1], "theta_trans": u[2:]}
    names = {"mu_alpha": u[0], "sigma_alpha": u[1], "sigma_y": u[2], "beta": u[3:5]}
    return {**names, "alpha_raw": u[5:]}


_POSITIVE = ("tau", "sigma_alpha", "sigma_y")


class _SVI:
    """A model, a guide and Adam, stepped by one of the loops."""

    def __init__(self, task: str, given: Arrays, number: int, options: Mapping[str, Any]) -> None:
        self.loop = options["loop"]
        if self.loop not in _LOOPS:
            raise ValueError(f"Unknown loop {self.loop!r}. Available: {', '.join(_LOOPS)}.")
        self.key = jax.random.PRNGKey(number)
        if task == "vae":
            self.args: tuple[Any, ...] = (given["x"], given)
            model: Any = vae
            guide: Any = vae_guide
            draws = self._vae_draws(given)
            params = None
        else:
            names = {"eight_schools": ("y", "sigma"), "radon": ("floor", "uranium", "county", "y")}
            self.args = tuple(given[name] for name in names[task])
            model = {"eight_schools": eight_schools, "radon": radon}[task]
            guide, params, draws = _auto(task, model, self.args, given)
        self.model, self.guide, self.draws = model, guide, draws
        optim = numpyro.optim.Adam(options["lr"])
        self.svi = SVI(model, guide, optim, Trace_ELBO())
        self.state = self.svi.init(self.key, *self.args, init_params=params)
        self.compiled: dict[int, Any] = {}

    @staticmethod
    def _vae_draws(given: Arrays) -> Arrays:
        inputs = (given["x"] - given["guide.shift"]) / given["guide.scale"]
        weight, bias = given["guide.network.0.weight"], given["guide.network.0.bias"]
        features = jax.nn.silu(inputs @ weight.T + bias)
        weight, bias = given["guide.network.2.weight"], given["guide.network.2.bias"]
        lam = given["guide.init"] + features @ weight.T + bias
        u = lam[:, :48] + (jax.nn.softplus(lam[:, 48:]) + 1e-8) * given["noise"]
        return {"z2": u[:, :16], "z1": u[:, 16:]}

    def check(self) -> float:
        params = {**self.svi.get_params(self.state), **self.draws}
        guide, model = seed(self.guide, self.key), seed(self.model, self.key)
        log_q, trace = log_density(guide, self.args, {}, params)
        log_p, _ = log_density(replay(model, trace), self.args, {}, params)
        return float(log_q - log_p)

    def prepare(self, num_steps: int) -> None:
        if self.loop == "update" and not self.compiled:
            jitted = jax.jit(self.svi.update, donate_argnums=0)
            self.compiled[0] = jitted.lower(self.state, *self.args).compile()
        if self.loop == "scan":

            def steps(state: Any, *args: Any) -> tuple[Any, Any]:
                done = self.svi.run(
                    self.key, num_steps, *args, progress_bar=False, init_state=state
                )
                return done.state, done.losses[-1]

            jitted = jax.jit(steps, donate_argnums=0)
            self.compiled[num_steps] = jitted.lower(self.state, *self.args).compile()

    def advance(self, num_steps: int) -> float:
        if self.loop == "update":
            update, state, args = self.compiled[0], self.state, self.args
            for _ in range(num_steps):
                state, loss = update(state, *args)
            self.state = state
        elif self.loop == "scan":
            self.state, loss = self.compiled[num_steps](self.state, *self.args)
        else:
            done = self.svi.run(
                self.key,
                num_steps,
                *self.args,
                progress_bar=self.loop == "progress",
                init_state=self.state,
            )
            self.state, loss = done.state, done.losses[-1]
        jax.block_until_ready((self.state, loss))
        return float(loss)


def _auto(
    task: str, model: Callable[..., None], args: tuple[Any, ...], given: Arrays
) -> tuple[Any, Arrays, Arrays]:
    """An autoguide, its parameters, and its draws at the given noise."""
    loc, noise = given["loc"], given["noise"]
    if "scale_tril" not in given:
        guide = AutoNormal(model)
        params: Arrays = {}
        for name, value in _split(task, loc).items():
            params[f"{name}_auto_loc"] = value
        for name, value in _split(task, given["scale"]).items():
            params[f"{name}_auto_scale"] = value
        draws = _split(task, loc + given["scale"] * noise)
        return guide, params, {k: jnp.exp(v) if k in _POSITIVE else v for k, v in draws.items()}
    guide = AutoMultivariateNormal(model)
    SVI(model, guide, numpyro.optim.Adam(0.1), Trace_ELBO()).init(jax.random.PRNGKey(0), *args)
    # The guide packs sites in an order of its own: where each of its entries stands in ours.
    sites = _split(task, jnp.arange(len(loc)))
    unpacked = guide._unpack_latent(jnp.arange(len(loc), dtype=loc.dtype))
    ours = np.empty(len(loc), dtype=int)
    for name, places in unpacked.items():
        ours[np.asarray(places, dtype=int)] = np.asarray(sites[name])
    tril = given["scale_tril"]
    covariance = (tril @ tril.T)[ours][:, ours]
    permuted = jnp.linalg.cholesky(covariance)
    params = {"auto_loc": loc[ours], "auto_scale_tril": permuted}
    return guide, params, {"_auto_latent": (loc + tril @ noise)[ours]}


def build(task: str, number: int, options: Mapping[str, Any]) -> Program:
    """Make the program of a task.

    Args:
        task: ``"eight_schools"``, ``"radon"`` or ``"vae"``.
        number: Seed of arrays that are not given, and of the draws.
        options: ``arrays``, ``guide``, ``batch``, ``data``, ``dtype``, ``lr`` and ``loop``.

    Raises:
        ValueError: For another task or loop, or for float64 where JAX was started without it.
    """
    if task not in ("eight_schools", "radon", "vae"):
        raise ValueError(f"NumPyro has no task {task!r}: eight_schools, radon, vae.")
    options = options_of(
        options,
        arrays=None,
        guide=None,
        batch=None,
        data=None,
        dtype=None,
        lr=0.001 if task == "vae" else 0.01,
        loop="scan",
    )
    return _SVI(task, as_jax(load(task, number, options)), number, options)


def as_jax(given: Mapping[str, Any]) -> Arrays:
    """Arrays of JAX with the same dtype.

    Args:
        given: Arrays of numpy.

    Raises:
        ValueError: For float64 where JAX was started without it.
    """
    if not jax.config.jax_enable_x64 and any(v.dtype == np.float64 for v in given.values()):
        raise ValueError(
            "JAX computes in float32 here, but the arrays are float64. Start the peer with "
            "JAX_ENABLE_X64=1 in its environment."
        )
    return {name: jnp.asarray(value) for name, value in given.items()}


def main() -> None:
    """Serve standard input and output."""
    serve(build, ("numpyro", "jax", "jaxlib", "numpy"), _THREADS)
