"""The grid of families and schemes: what a cell is called, and which cells make no sense."""

from __future__ import annotations

__all__ = ["cell_name", "refusal"]

_GAUSSIAN = ("delta", "normal", "multivariate_normal", "lateral_cholesky", "lateral_symmetric")


def cell_name(scheme: str, family: str) -> str:
    """The name of a cell: the family alone for free parameters, prefixed by the scheme otherwise.

    Example:
        >>> cell_name("amortized", "normal"), cell_name("local", "normal")
        ('amortized_normal', 'normal')
    """
    return family if scheme == "local" else f"{scheme}_{family}"


def refusal(scheme: str, family: str) -> str | None:
    """Why a cell makes no sense, None where it does.

    Example:
        >>> print(refusal("amortized", "normal"))
        None
    """
    if scheme == "laplace" and family not in _GAUSSIAN:
        return (
            f"Laplace refinement finds a mode and a covariance, and {family!r} has no parameters "
            f"for a given Gaussian. It works with {', '.join(_GAUSSIAN)}; semi_amortized_{family} "
            "refines this family by gradient steps."
        )
    if scheme == "top_down" and family != "normal":
        return (
            "the top-down guide merges the precisions of two Gaussians with independent "
            f"coordinates, which {family!r} is not. Use top_down_normal, or bottom_up_{family}."
        )
    return None
