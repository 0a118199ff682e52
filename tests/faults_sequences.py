"""Faults of what follows time: models, guides and filters of sequences."""

from __future__ import annotations

from tests.fault import Fault

TEMPORAL = "tests/test_temporal.py::"
FIVO = "tests/test_fivo.py::"
HGF = "tests/test_gaussian_filter.py::"
FLOWS = "tests/test_sequence_flows.py::"
COMBINERS = "tests/test_sequence_combiners.py::"
DENSITY = "tests/test_sequence_densities.py::"

FAULTS = [
    Fault(
        "a belief is carried without the transition",
        "guides/inference/temporal.py",
        "total = total + slope @ covariance.detach().to(slope) @ slope.mT",
        "total = total + covariance.detach()",
        TEMPORAL + "test_carried_precision_is_the_kalman_filter",
    ),
    Fault(
        "the extended filter takes its curvature at the prediction",
        "guides/inference/temporal.py",
        'point = joint.start if self.precision in ("riccati", "steady") else u',
        "point = joint.start",
        TEMPORAL + "test_the_extended_filter_is_the_iterated_kalman_filter",
    ),
    Fault(
        "the program's own density counts beside a carried one",
        "guides/sequences/window.py",
        'msg["mask"] = False',
        "pass",
        TEMPORAL + "test_carried_precision_is_the_kalman_filter",
    ),
    Fault(
        "steps that a row lacks have an evidence",
        "guides/inference/temporal_evidence.py",
        "rest = torch.where(joint.on, rest, torch.zeros_like(rest))",
        "pass",
        TEMPORAL + "test_rows_do_not_know_each_other[riccati]",
    ),
    Fault(
        "the minimum of a step is held while its evidence is differentiated",
        "guides/inference/temporal_evidence.py",
        "blocks(point - step)",
        "blocks(point - step.detach())",
        TEMPORAL + "test_the_evidence_of_a_step_has_its_whole_derivative",
    ),
    Fault(
        "the steady state is that of the process noise",
        "guides/inference/temporal_riccati.py",
        "moved = predicted + slope @ belief @ slope.mT",
        "moved = predicted + 0 * belief",
        TEMPORAL + "test_steady_precision_is_the_steady_kalman_filter",
    ),
    Fault(
        "weights are kept after resampling",
        "guides/objectives/fivo.py",
        "log_w = torch.where(weak, torch.zeros_like(log_w), log_w)",
        "pass",
        FIVO + "test_the_evidence_is_unbiased",
    ),
    Fault(
        "particles are resampled without their histories",
        "guides/objectives/fivo.py",
        "run.select(torch.where(weak, chosen, kept))",
        "run.select(kept.expand_as(chosen))",
        FIVO + "test_the_filter_follows_particles_and_not_places",
    ),
    Fault(
        "steps that a row lacks count in q of an objective",
        "guides/objectives/packed_draws.py",
        "torch.where(self.mask, term, torch.zeros_like(term))",
        "term",
        FIVO + "test_objectives_count_no_step_that_a_row_lacks",
    ),
    Fault(
        "a surprise does not change how sure a volatility is",
        "guides/inference/gaussian_filter.py",
        "weight * (weight + (2 * weight - 1) * delta)",
        "weight * weight",
        HGF + "test_the_volatility_update_is_a_newton_step_on_the_energy",
    ),
    Fault(
        "a volatility sees the mean of its child and not its doubt",
        "guides/inference/gaussian_filter.py",
        "squared = 1 / child.precision + (child.mean - child_predicted.mean).square()",
        "squared = (child.mean - child_predicted.mean).square()",
        HGF + "test_the_energy_is_the_expectation_under_the_belief_about_the_child"
        " " + HGF + "test_three_levels_of_the_paper",
    ),
    Fault(
        "experts are averaged by their scales",
        "guides/sequences/product.py",
        "precisions = [scale**-2 for _, scale in experts]",
        "precisions = [scale**-1 for _, scale in experts]",
        "tests/test_sequences.py::test_a_product_of_experts_is_the_product_of_their_densities",
    ),
    Fault(
        "the state of a VRNN does not see the latent of the step before",
        "zoo/vrnn.py",
        "torch.cat([step, z], -1)",
        "torch.cat([step, 0 * z], -1)",
        DENSITY + "test_the_density_of_a_deep_sequence_model_by_hand[vrnn-False]",
    ),
    Fault(
        "the deterministic layer of an SRNN starts from nothing at every step",
        "zoo/srnn.py",
        "d = self.cell(before, d)",
        "d = self.cell(before, None)",
        DENSITY + "test_the_density_of_a_deep_sequence_model_by_hand[srnn-False]",
    ),
    Fault(
        "the gate of a transition opens the other way",
        "zoo/transition.py",
        "(1 - gate) * self.linear(z) + gate * proposal",
        "gate * self.linear(z) + (1 - gate) * proposal",
        DENSITY + "test_the_density_of_a_deep_sequence_model_by_hand[deep_markov-False]",
    ),
    Fault(
        "a recurrent cell never resets its state",
        "zoo/recurrent.py",
        "torch.tanh(new + torch.sigmoid(reset + own_reset) * own_new)",
        "torch.tanh(new + own_new)",
        DENSITY + "test_the_recurrent_cell_is_torchs",
    ),
    Fault(
        "the Jacobian of a masked flow forgets that coordinates were reversed",
        "zoo/masked_flow.py",
        "self._maps(self._order(y))[1].sum(-1)",
        "self._maps(y)[1].sum(-1)",
        DENSITY + "test_the_density_of_a_flow_prior_by_hand",
    ),
    Fault(
        "states of a step are averaged as if there were two",
        "guides/sequences/guide.py",
        "sum(parts[1:], parts[0]) / len(parts)",
        "sum(parts[1:], parts[0]) / 2",
        COMBINERS + "test_the_averaging_combiner_is_its_formula",
    ),
    Fault(
        "the backward network starts in the padding",
        "guides/sequences/context.py",
        "last = torch.where(on, steps, -1).amax(1, keepdim=True)",
        "last = torch.where(on, number - 1, -1).amax(1, keepdim=True)",
        COMBINERS + "test_the_averaging_combiner_is_its_formula",
    ),
    Fault(
        "padding counts in the evidence of a flow",
        "zoo/autoregressive_flow.py",
        "terms if on is None else",
        "terms if True else",
        "tests/test_flow_models.py::test_the_evidence_of_a_flow_counts_no_padding",
    ),
    Fault(
        "padding counts in the density of temporal differences",
        "zoo/temporal_difference.py",
        "with time.active(t):",
        "with time.active(0):",
        "tests/test_flow_models.py::test_padding_changes_no_density",
    ),
    Fault(
        "a missing input leaves the precision as it was",
        "guides/inference/gaussian_filter.py",
        "torch.where(on, b.precision, p.precision)",
        "torch.where(on, b.precision, before[0].precision)",
        HGF + "test_a_row_without_inputs_keeps_its_means_and_grows_unsure",
    ),
    Fault(
        "a guide of a filtering form sees the data to come",
        "guides/sequences/__init__.py",
        '"filtering": (_GUIDE, {"past": True, "future": False',
        '"filtering": (_GUIDE, {"past": True, "future": True',
        "-m slow tests/test_sequences.py::"
        "test_smoothing_reaches_the_evidence_and_filtering_the_best_of_its_form",
    ),
    Fault(
        "steps that a row lacks count in the density of a guide's trace",
        "guides/guide.py",
        "stack.enter_context(poutine.mask(mask=mask))",
        "pass",
        FLOWS + "test_flows_train_alike_on_padded_and_unpadded_batches",
    ),
    Fault(
        "coordinates of an autoregressive flow do not see each other",
        "guides/families/autoregressive.py",
        "self.phi(number, z if self.size > 1",
        "self.phi(number, 0 * z if self.size > 1",
        "-m slow " + FLOWS + "test_a_flow_wins_where_the_posterior_of_a_step_is_curved",
    ),
]
