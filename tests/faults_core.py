"""Faults of energies, guides, families, refinement and objectives."""

from __future__ import annotations

from tests.fault import Fault

ENERGY = "tests/test_energy.py"
EXACT = "tests/test_exact.py"
GRID = "tests/test_grid_elbo.py"
CODING = "tests/test_predictive_coding.py"
SCORES = "tests/test_scores.py"
TRAPS = "tests/test_traps.py"
ROWS = "tests/test_rows_and_layout.py"
FAMILIES = "tests/test_families.py"
FLOWS = "tests/test_flows.py"
REFINEMENT = "tests/test_refinement.py"
LEVELS = "tests/test_levels.py"
COMPOSITE = "tests/test_composite.py"
OBJECTIVES = "tests/test_objectives.py tests/test_objective_gradients.py"

FAULTS = [
    Fault(
        "N/B stays in the rows",
        "guides/energy.py",
        "scale = scale / plate.scale",
        "scale = scale * 1.0",
        ENERGY,
    ),
    Fault(
        "N/B is left out of the total",
        "guides/energy.py",
        "return self.layout.scale * rows.sum() + other",
        "return rows.sum() + other",
        ENERGY,
    ),
    Fault(
        "the user's mask is ignored",
        "guides/energy.py",
        'scale, site["mask"])',
        "scale, None)",
        ENERGY,
    ),
    Fault(
        "the Jacobian of the energy is dropped",
        "guides/energy.py",
        "        if jacobian:\n",
        "        if False:\n",
        ENERGY,
    ),
    Fault(
        "the Jacobian of the energy has the wrong sign",
        "guides/energy.py",
        "rows = rows + log_det",
        "rows = rows - log_det",
        f"{ENERGY} {CODING}",
    ),
    Fault(
        "the guide's density misses its Jacobian",
        "guides/guide.py",
        "density = -log_det",
        "density = 0 * log_det",
        GRID,
    ),
    Fault(
        "the guide's density has its Jacobian upside down",
        "guides/guide.py",
        "density = -log_det",
        "density = log_det",
        GRID,
    ),
    Fault(
        "draws miss the Jacobian of local sites",
        "guides/draws.py",
        "rows = rows - reduced",
        "rows = rows",
        GRID,
    ),
    Fault(
        "a delta guide scores values with the Jacobian",
        "guides/guide.py",
        "self.jacobian = self.has_density if jacobian is None else jacobian",
        "self.jacobian = True",
        ENERGY,
    ),
    Fault(
        "auxiliary and guide parameters share one name",
        "guides/guide.py",
        'return f"{cls.__name__.lower()}_{next(_COUNTER)}"',
        'return f"{cls.__name__.lower()}"',
        TRAPS,
    ),
    Fault(
        "a copy keeps the name of the original",
        "guides/guide.py",
        'copied.__dict__["_pyro_name"] = _unique(type(self))',
        'copied.__dict__["_pyro_name"] = self._pyro_name',
        TRAPS,
    ),
    Fault(
        "tables have the size of the minibatch",
        "guides/schemes/local.py",
        "init.expand(group.plate.size, -1)",
        "init.expand(group.plate.num_rows, -1)",
        TRAPS,
    ),
    Fault(
        "tables ignore the index of their rows",
        "guides/schemes/local.py",
        "return self.table[index]",
        "return self.table[: len(index)]",
        TRAPS,
    ),
    Fault(
        "the step goes up the energy",
        "guides/inference/solvers/gradient.py",
        "return -weights * point.gradient, {}",
        "return weights * point.gradient, {}",
        EXACT,
    ),
    Fault(
        "the local step keeps N/B",
        "guides/inference/units.py",
        "return Point(x, gradient / self.scale, rows, rows, other)",
        "return Point(x, gradient, rows, rows, other)",
        ENERGY,
    ),
    Fault(
        "the curvature is that of the scaled energy",
        "guides/inference/relaxation.py",
        "factor = scale if value.dim() == 2 else 1.0",
        "factor = 1.0",
        ENERGY,
    ),
    Fault(
        "rising energies are accepted",
        "guides/inference/solvers/solver.py",
        "return ((change < -slack) | ((change <= slack) & calmer)) & new.finite()",
        "return torch.ones_like(calmer)",
        CODING,
    ),
    Fault(
        "parameters learn one state too early",
        "guides/inference/predictive_coding.py",
        "terms = log_joint.run(values, expose_params=True)",
        "terms = log_joint.run(self._start(log_joint), expose_params=True)",
        CODING,
    ),
    Fault(
        "gradients of parameters are carried over",
        "guides/inference/predictive_coding.py",
        "            zero_grads(learning)\n",
        "",
        CODING,
    ),
    Fault(
        "globals chase the last minibatch",
        "guides/inference/predictive_coding.py",
        "rate = 1.0 / log_joint.layout.scale if self.global_rate is None else self.global_rate",
        "rate = 1.0",
        CODING,
    ),
    Fault(
        "evaluate_loss keeps globals",
        "guides/inference/predictive_coding.py",
        "        _, relaxed = self._relax(log_joint, hold_globals=_holds_globals(log_joint))\n",
        "        values, relaxed = self._relax(log_joint)\n"
        "        self._keep_globals(log_joint, values)\n",
        CODING,
    ),
    Fault(
        "the arrow form forgets N/B",
        "guides/inference/laplace_guide.py",
        "- read.scale * explained",
        "- explained",
        CODING,
    ),
    Fault(
        "the arrow form adds what it should subtract",
        "guides/inference/laplace_guide.py",
        "- read.scale * explained",
        "+ read.scale * explained",
        CODING,
    ),
    Fault(
        "locals move with the globals the wrong way",
        "guides/inference/laplace_guide.py",
        "loc = loc - (gain",
        "loc = loc + (gain",
        CODING,
    ),
    Fault(
        "the evidence forgets to average",
        "guides/diagnostics/scores.py",
        "estimate = first - math.log(num_samples)",
        "estimate = first",
        SCORES,
    ),
    Fault(
        "the evidence averages logarithms",
        "guides/diagnostics/scores.py",
        "estimate = first - math.log(num_samples)",
        "estimate = kept.mean(0)",
        SCORES,
    ),
    Fault(
        "k-hat of the inverse weights",
        "guides/diagnostics/scores.py",
        "result[i] = _psis(row - row.max())",
        "result[i] = _psis(row.min() - row)",
        SCORES,
    ),
    Fault(
        "a joint weight passes for one a row",
        "guides/draws.py",
        "joint=has_global or outside or read.data_plate is None,",
        "joint=outside,",
        "tests/test_scores.py::test_a_global_latent_drawn_from_its_prior_makes_weights_joint",
    ),
    Fault(
        "nested plates are packed across rows",
        "guides/sites.py",
        "return value.movedim(rows, 0).reshape(value.shape[rows], self.size)",
        "return value.reshape(value.shape[rows], self.size)",
        ROWS,
    ),
    Fault(
        "slices of slices count from zero",
        "guides/rows.py",
        "number = rows if plate.index is None else plate.index.to(rows.device)[rows]",
        "number = rows",
        ROWS,
    ),
    Fault(
        "the flow's density misses its scale",
        "guides/families/flow.py",
        "return scale * y, log_det + scale.log().sum(-1)",
        "return scale * y, log_det",
        FAMILIES,
    ),
    Fault(
        "the Sylvester flow multiplies by a transpose, as Pyro's",
        "guides/families/sylvester.py",
        "return z + _times(q, _times(r1, t)), log_det",
        "return z + _times(q, _times(r1.mT, t)), log_det",
        FLOWS,
    ),
    Fault(
        "a planar step forgets its constraint",
        "guides/families/planar.py",
        "u = u + ((inner - raw) / norm).unsqueeze(-1) * w",
        "u = u",
        FLOWS,
    ),
    Fault(
        "roots carry no derivative",
        "guides/families/roots.py",
        "for _ in range(2):",
        "for _ in range(0):",
        FLOWS,
    ),
    Fault(
        "a coordinate sees itself",
        "guides/families/autoregressive.py",
        "before = place.unsqueeze(-1) > place",
        "before = place.unsqueeze(-1) >= place",
        FLOWS,
    ),
    Fault(
        "a flow forgets the density of its base",
        "guides/families/flow.py",
        "return self.base.log_prob(base, e) - log_det",
        "return StandardNormal(self.size).log_prob(base, e) - log_det",
        "tests/test_flows.py::test_any_family_can_be_the_base",
    ),
    Fault(
        "inner gradients are those of the mean over rows",
        "guides/schemes/bound.py",
        "return rows.sum(), rows",
        "return rows.mean(), rows",
        "tests/test_refinement.py::"
        "test_the_rows_gradient_is_that_of_the_formula_and_of_the_errors",
    ),
    Fault(
        "the path gradient keeps the score of q",
        "guides/schemes/bound.py",
        "(self.family.log_prob(lam, u) if path else log_q)",
        "log_q",
        "tests/test_refinement.py::"
        "test_the_path_gradient_has_the_same_mean_and_vanishes_at_the_posterior",
    ),
    Fault(
        "rows of a batch see each other's noise position",
        "guides/schemes/bound.py",
        "rows = 1 if self.shared_noise else like.shape[0]",
        "rows = like.shape[0]",
        "tests/test_refinement.py::test_a_row_does_not_see_its_batch",
    ),
    Fault(
        "iterations are not detached",
        "guides/schemes/iterative.py",
        "fixed = lam.detach()",
        "fixed = lam",
        "tests/test_refinement.py::test_the_two_gradients_are_the_mean_and_the_last",
    ),
    Fault(
        "the guide learns from the sum over iterations",
        "guides/schemes/iterative.py",
        "fraction = 1.0 / (len(iterates) + 1)",
        "fraction = 1.0",
        "tests/test_refinement.py::test_the_two_gradients_are_the_mean_and_the_last",
    ),
    Fault(
        "the highway gate is turned around",
        "guides/schemes/iterative.py",
        "return gate * lam + (1 - gate) * (self.init + move)",
        "return (1 - gate) * lam + gate * (self.init + move)",
        "tests/test_refinement.py::test_a_gate_of_one_leaves_the_parameters_unchanged",
    ),
    Fault(
        "truncated backpropagation keeps all steps",
        "guides/schemes/semi_amortized.py",
        "if t >= first and not stops:",
        "if not stops:",
        "tests/test_refinement.py::"
        "test_gradient_steps_contract_as_the_closed_form_and_so_does_their_derivative",
    ),
    Fault(
        "importance weights forget q",
        "guides/schemes/semi_amortized.py",
        "weights = torch.softmax(log_p - log_q, 0).unsqueeze(-1)",
        "weights = torch.softmax(log_p, 0).unsqueeze(-1)",
        "tests/test_refinement.py::test_importance_refinement_leaves_an_exact_posterior",
    ),
    Fault(
        "curvature leaves out the prior",
        "guides/gauss_newton.py",
        "term = 0.5 * (_standardized(f, v) - before).square()",
        "term = 0.0 * (_standardized(f, v) - before).square()",
        "tests/test_curvature.py::"
        "test_gauss_newton_is_the_exact_hessian_of_linear_gaussian_programs",
    ),
    Fault(
        "rows that stopped are written to the wrong place",
        "guides/schemes/refinement.py",
        "rows = keep if rows is None else rows[keep]",
        "rows = keep",
        "tests/test_refinement.py::test_rows_stop_one_by_one_and_dropping_them_changes_nothing",
    ),
    Fault(
        "a level does not see the draws before it",
        "guides/guide.py",
        "lam = self.schemes[group.name](group, replace(call, upstream=upstream))",
        "lam = self.schemes[group.name](group, call)",
        "tests/test_levels.py::test_chains_hold_the_exact_posterior_in_both_directions",
    ),
    Fault(
        "a latent may be covered twice",
        "guides/guide.py",
        "if len(keys) != 1:",
        "if len(keys) < 1:",
        "tests/test_composite.py::test_what_does_not_fit_is_refused",
    ),
    Fault(
        "doubly reparameterized gradients weigh once",
        "guides/objectives/dreg.py",
        "factor * (weights.square() * (rows - log_q)).sum()",
        "factor * (weights * (rows - log_q)).sum()",
        "tests/test_objective_gradients.py::test_dreg_is_unbiased",
    ),
    Fault(
        "the weighted bound is a sum",
        "guides/objectives/iwelbo.py",
        "return log_w.logsumexp(1) - math.log(log_w.shape[1])",
        "return log_w.logsumexp(1)",
        "tests/test_objectives.py::test_weights_are_per_datum_as_in_pyros_renyi_elbo",
    ),
    Fault(
        "N/B is left out of the weighted bound",
        "guides/objectives/weighted.py",
        "return -(scale * rows.sum(-1) + above).mean()",
        "return -(rows.sum(-1) + above).mean()",
        "tests/test_objectives.py::test_copies_of_a_datum_count_as_many",
    ),
    Fault(
        "errors are not weighted by precision",
        "guides/location_scale.py",
        "result = centered / base.scale**2",
        "result = centered / base.scale",
        "tests/test_energy.py::test_the_gradient_is_the_local_message_of_predictive_coding",
    ),
    Fault(
        "Adam in a graph divides before it multiplies",
        "guides/capture/optimizers.py",
        "return parameter - numbers[0] * mean / root",
        "return parameter - numbers[0] * (mean / root)",
        "tests/test_compiled_svi.py::test_parameters_have_the_bits_of_the_optimizers",
    ),
    Fault(
        "tiny products of a graph are sums",
        "guides/capture/products.py",
        "if compiled and bias is None",
        "if bias is None",
        "tests/test_compiled_svi.py::test_parameters_have_the_bits_of_the_optimizers",
    ),
]
