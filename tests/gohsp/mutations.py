# SPDX-License-Identifier: Apache-2.0
"""Puts one fault at a time into pruning and sees that a test finds it.

    python -m tests.gohsp.mutations [NAME ...]         tests each mutant; a minute or two for all

Works on a copy of the packages. test_mutations.py sees that each fault still fits the source.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.faults import ROOT, Mutation, chosen, copy_tree, first_failure, planted, report

SOURCES = ROOT / "python" / "gohsp"
TESTS = Path(__file__).parent

MUTATIONS = {
    "transformers: layer scale is left out": Mutation(
        "models/hf_vit.py", "    if not hasattr(layer, name):\n", "    if True:\n",
        "models/test_adapters.py::test_compressed_plain_and_frozen_it_is_the_masked_one",
    ),
    "transformers: recorders that hung on layers are thought to be there still": Mutation(
        "models/hf_vit.py", 'pop("_output_capturing_hooks_installed"', 'get("_output_capturing_hooks_installed"',
        "models/test_hf_vit.py::test_hidden_states_are_those_of_the_masked_model",
    ),
    "transformers: a mask reaches the heads of the dense layer alone": Mutation(
        "models/hf_vit.py", "return attention_mask, False", "return None, False",
        "models/test_hf_vit.py::test_attention_masks_reach_the_heads_that_are_left",
    ),
    "torchvision: the weights that are read together are copied": Mutation(
        "models/torchvision_vit.py", "joined.weight, joined.bias = attention.in_proj_weight, attention.in_proj_bias",
        "joined.weight, joined.bias = nn.Parameter(attention.in_proj_weight.clone()), attention.in_proj_bias",
        "models/test_adapters.py::test_compressed_plain_and_frozen_it_is_the_masked_one",
    ),
    "timm: a hybrid's images have the channels of its backbone's result": Mutation(
        "models/timm_vit.py", "for part in embed.modules() if", "for part in [embed.proj] if",
        "models/test_adapters.py::test_costs_are_those_of_the_parameters_and_products",
    ),
    "mask: q and k rows of a pruned head stay": Mutation(
        "masks/mask.py", "qk = (self.qk & self.heads[:, None]).flatten()", "qk = self.qk.flatten()",
        "masks/test_mask.py::test_apply_zeroes_exactly_the_pruned_entries",
    ),
    "mask: the bias of a pruned row stays": Mutation(
        "models/base.py", "                    layer.bias[mine] = 0", "                    pass",
        "masks/test_mask.py::test_apply_zeroes_exactly_the_pruned_entries",
    ),
    "mask: an output that is not written stays": Mutation(
        "masks/mask.py", "write.clear_(~self.attn_out, ~v)", "write.clear_(None, ~v)",
        "masks/test_mask.py::test_apply_zeroes_exactly_the_pruned_entries",
    ),
    "mask: a random one leaves a channel in one head of a block": Mutation(
        "masks/mask.py", "draws.amin(dim=-1, keepdim=True)", "draws.amin()",
        "masks/test_mask.py::test_random_never_empties_a_field_unless_asked",
    ),
    "mask: that of a compressed model shares its memory": Mutation(
        "masks/mask.py", "blocks = [block.mask.clone() for block", "blocks = [block.mask for block",
        "masks/test_mask.py::test_mask_of_a_compressed_model_is_a_copy",
    ),
    "mask: qk-norm wants the channels of pruned heads too": Mutation(
        "masks/mask.py", "bool(block.qk[block.heads].all())", "bool(block.qk.all())",
        "masks/test_mask.py::test_qk_norm_keeps_its_channels",
    ),
    "mask: a run of indices is read without its last": Mutation(
        "masks/ranges.py", "kept[start : stop + 1] = True", "kept[start : max(stop, start + 1)] = True",
        "masks/test_mask.py::test_json_form_gives_the_mask_back",
    ),
    "mask: runs that touch are written with a gap": Mutation(
        "masks/ranges.py", "index == runs[-1][1] + 1", "index == runs[-1][0] + 1",
        "masks/test_mask.py::test_json_form_is_readable",
    ),
    "layout: a head without V channels stays": Mutation(
        "masks/mask.py", "alive = self.heads & self.v.any(dim=1)", "alive = self.heads",
        "masks/test_mask.py::test_head_without_v_leaves_and_head_without_qk_stays",
    ),
    "layout: k rows begin after the q rows that are kept": Mutation(
        "masks/mask.py", "k_rows=q_rows + span", "k_rows=q_rows + len(q_rows)",
        "masks/test_mask.py::test_layout_of_a_mask_worked_out_by_hand",
    ),
    "layout: v rows begin after the q and k rows that are kept": Mutation(
        "masks/mask.py", "v_rows=v_cols + 2 * span", "v_rows=v_cols + 2 * len(q_rows)",
        "masks/test_mask.py::test_layout_of_a_mask_worked_out_by_hand",
    ),
    "layers: the softmax scale of the width that is left": Mutation(
        "layers/compact.py", "self.scale = attn.softmax_scale", "self.scale = max(1, *layout.qk_widths, 1) ** -0.5",
        "layers/test_compact.py::test_block_agrees_with_the_masked_dense_block",
    ),
    "layers: the first attention masks for the heads that are left": Mutation(
        "layers/attention.py", "head : head + 1] for head in heads]", "head : head + 1] for head in range(len(heads))]",
        "layers/test_compact.py::test_attention_masks",
    ),
    "layers: the norm of the MLP runs with another eps": Mutation(
        "layers/compact.py", "out_cols=mlp.out_cols,\n            eps=norm.eps,", "out_cols=mlp.out_cols,",
        "layers/test_compact.py::test_eps_of_each_norm_is_its_own",
    ),
    "layers: qk-norm runs with the eps of the block's norm": Mutation(
        "layers/compact.py", 'qk_eps=qk_norm.pop("eps", norm.eps),',
        'qk_eps=norm.eps if qk_norm.pop("eps", 1) else 0.0,',
        "layers/test_compact.py::test_eps_of_each_norm_is_its_own",
    ),
    "densify: the bias of q keeps the scale of another width": Mutation(
        "models/timm_vit.py", "attn.qkv.bias[: attn.attn_dim] *= factor", "attn.qkv.bias[: attn.attn_dim] *= 1.0",
        "test_compress.py::test_heads_of_one_width_become_timm_attention",
    ),
    "moments: the mean of what a layer gives is not weighted": Mutation(
        "pruning/moments.py", "y=(gaps * w[:, None]).sum(", "y=gaps.sum(",
        "pruning/test_moments.py::test_weights_are_repetitions",
    ),
    "moments: what a chunk was centred on is not put back": Mutation(
        "pruning/moments.py", "self._xy += z.T @ b + a.T @ y", "self._xy += a.T @ y",
        "pruning/test_moments.py::test_large_means_in_float32_leave_the_fit_alone",
    ),
    "calibration: the last chunk is taken before the first": Mutation(
        "pruning/calibration.py", "> threads:\n                        take(waiting.popleft()",
        "> threads:\n                        take(waiting.pop()",
        "pruning/test_calibration.py::test_chunks_are_at_work_on_threads_of_their_own_and_come_in_order",
    ),
    "share: every process draws the signs of the first": Mutation(
        "pruning/sensitivity.py", "signs[share.first : share.first + len(stream)]", "signs[: len(stream)]",
        "pruning/test_share.py::test_two_processes_over_gloo_find_what_one_finds",
    ),
    "share: what QK channels do is not added up": Mutation(
        "pruning/scoring.py", "        share.add_up_(self.energy)\n", "",
        "pruning/test_share.py::test_two_processes_over_gloo_find_what_one_finds",
    ),
    "moments: a constant varies by its rounding": Mutation(
        "pruning/moments.py", "- covariance.diagonal()).clamp_min(0)", "- covariance.diagonal()).clamp(0, 0)",
        "pruning/test_moments.py::test_columns_that_hardly_vary_can_be_fitted",
    ),
    "fit: pulled towards zero": Mutation(
        "pruning/moments.py", "start = weight[:, kept]", "start = torch.zeros_like(weight[:, kept])",
        "pruning/test_moments.py::test_fit_is_the_stationary_point_of_its_objective",
    ),
    "fit: moments about zero beside a bias": Mutation(
        "pruning/moments.py", "(xx / self.weight).addr_(mean_x, mean_x, alpha=-1)", "xx / self.weight",
        "pruning/test_moments.py::test_fit_is_the_stationary_point_of_its_objective",
    ),
    "fit: the bias of the weights before": Mutation(
        "pruning/moments.py", "return fitted, mean_y - fitted @ mean_x", "return fitted, mean_y - start @ mean_x",
        "pruning/test_moments.py::test_the_bias_makes_the_mean_of_the_outputs_exact",
    ),
    "fit: damped by the largest variance": Mutation(
        "pruning/moments.py", "max(ridge, 1e-9) * square.diagonal().mean()",
        "max(ridge, 1e-9) * square.diagonal().max()",
        "pruning/test_moments.py::test_damping_is_relative_to_the_mean_diagonal",
    ),
    "sensitivity: terms are squared token by token": Mutation(
        "pruning/sensitivity.py", "(x * gradient).sum(dim=1).double().square().sum(dim=0)",
        "(x * gradient).double().square().sum(dim=(0, 1))",
        "pruning/test_sensitivity.py::test_first_order_terms_are_gradients_by_a_factor_on_each_column",
    ),
    "sensitivity: token weights without the square root": Mutation(
        "pruning/sensitivity.py", "(self.tokens / self.tokens.mean()).sqrt()", "(self.tokens / self.tokens.mean())",
        "pruning/test_sensitivity.py::test_token_weights_follow_the_sensitivity_and_have_a_floor",
    ),
    "count: one bias an input": Mutation(
        "count.py", "(inputs + (layer.read.bias is not None)) * rows",
        "inputs * rows + (layer.read.bias is not None) * inputs",
        "test_count.py::test_compressed_models_agree_with_torch",
    ),
    "count: products with V of the width of QK": Mutation(
        "count.py", "tokens * keys * (size.qk + size.v)", "tokens * keys * (size.qk + size.qk)",
        "test_count.py::test_compressed_models_agree_with_torch",
    ),
    "count: layer scale of all features": Mutation(
        "count.py", "isinstance(layer.scale, nn.Identity) else outputs",
        "isinstance(layer.scale, nn.Identity) else layer.scale.gamma.numel()",
        "test_count.py::test_compressed_models_agree_with_torch",
    ),
    "count: no norm of q": Mutation(
        "count.py", "count_parameters(attention.q_norm, attention.k_norm)", "count_parameters(attention.k_norm)",
        "test_count.py::test_compressed_models_agree_with_torch"
    ),
    "budget: what is outside the blocks is given to them": Mutation(
        "pruning/budget.py", "solve(choices, limit - outside)", "solve(choices, limit)",
        "pruning/test_budget.py::test_the_result_is_counted_exactly_and_nothing_more_fits",
    ),
    "budget: costs are rounded down to a cell": Mutation(
        "pruning/budget.py", "math.ceil((option.cost - least) / cell)", "math.floor((option.cost - least) / cell)",
        "pruning/test_budget.py::test_costs_that_miss_the_limit_by_less_than_a_cell_are_not_taken",
    ),
    "budget: what the rounding leaves is not spent": Mutation(
        "pruning/budget.py", "    return _spend_the_rest(choices, picks, limit)\n", "    return picks\n",
        "pruning/test_budget.py::test_the_result_is_counted_exactly_and_nothing_more_fits",
    ),
    "budget: the way back through the table takes no room": Mutation(
        "pruning/budget.py", "left -= cells[row][picks[row]]", "left -= min(cells[row])",
        "pruning/test_budget.py::test_solve_finds_the_least_loss_of_all_choices",
    ),
    "budget: a cheap step behind a dear one is cheap": Mutation(
        "pruning/budget.py", "highest = max(highest, step.loss)", "highest = step.loss",
        "pruning/test_budget.py::test_a_cheap_step_behind_a_dear_one_does_not_hide_its_price",
    ),
    "budget: losses are not weighed against what they save": Mutation(
        "pruning/budget.py", "offers.append((step.loss / saved,", "offers.append((step.loss,",
        "pruning/test_budget.py::test_options_of_a_half_follow_the_loss_for_each_unit_saved",
    ),
    "budget: a head that gave channels takes its full width along": Mutation(
        "pruning/budget.py", "after[name] -= widths[self._head(step)]", "after[name] -= max(widths)",
        "pruning/test_budget.py::test_channels_of_a_head_that_has_gone_are_not_taken",
    ),
    "budget: channels of a head that has gone are taken": Mutation(
        "pruning/budget.py", "self.alive[self._head(step)] = False", "self.alive[self._head(step)] = True",
        "pruning/test_budget.py::test_channels_of_a_head_that_has_gone_are_not_taken",
    ),
    "budget: floors are asked before a step, not after it": Mutation(
        "pruning/budget.py", "self.widths_after(group, queue[0])[group] >= self.least[group]",
        "self.kept[group] >= self.least[group]", "pruning/test_budget.py::test_floors_hold_in_every_block",
    ),
    "budget: the soft minimum takes what does not fit": Mutation(
        "pruning/budget.py", "exponents.masked_fill(left < 0, -math.inf).logsumexp", "exponents.logsumexp",
        "pruning/test_budget.py::test_the_soft_solution_weighs_all_picks_that_fit",
    ),
    "budget: the soft minimum is not scaled back": Mutation(
        "pruning/budget.py", "best = -temperature * exponents", "best = -exponents",
        "pruning/test_budget.py::test_the_soft_solution_weighs_all_picks_that_fit",
    ),
    "ranking: a walk that restarts somewhere jumps anywhere": Mutation(
        "pruning/ranking.py", "jump = (likely / likely.sum())", "jump = torch.full_like(likely, 1 / count)",
        "pruning/test_ranking.py::test_restart_is_where_the_walk_begins_and_jumps_as_in_personalised_pagerank",
    ),
    "ranking: heads are like themselves": Mutation(
        "pruning/ranking.py", "    graph.fill_diagonal_(0)\n    rows =", "    rows =",
        "pruning/test_ranking.py::test_stationary_distribution_of_a_symmetric_graph_is_the_weighted_degree",
    ),
    "ranking: columns are normalised in the place of rows": Mutation(
        "pruning/ranking.py", "rows = graph.sum(dim=1, keepdim=True)", "rows = graph.sum(dim=0, keepdim=True)",
        "pruning/test_ranking.py::test_stationary_distribution_is_pagerank",
    ),
    "ranking: teleport is the probability of staying on the graph": Mutation(
        "pruning/ranking.py", "(1 - teleport) * steps + teleport * jump",
        "teleport * steps + (1 - teleport) * jump",
        "pruning/test_ranking.py::test_stationary_distribution_is_pagerank",
    ),
    "ranking: a node that is like no other stays where it is": Mutation(
        "pruning/ranking.py", ".clamp_min(torch.finfo(rows.dtype).tiny), jump)",
        ".clamp_min(torch.finfo(rows.dtype).tiny), torch.eye(count, dtype=graph.dtype))",
        "pruning/test_ranking.py::test_a_node_that_is_like_no_other_jumps_anywhere_as_in_pagerank",
    ),
    "ranking: redundant scores do not sum to one": Mutation(
        "pruning/ranking.py", "return (1 - pi) / (len(pi) - 1)", "return (1 - pi) / len(pi)",
        "pruning/test_ranking.py::test_redundant_turns_the_order_round_and_sums_to_one",
    ),
    "ranking: likeness is normalised twice": Mutation(
        "pruning/ranking.py", "norms = energy.diagonal().sqrt()", "norms = energy.diagonal()",
        "pruning/test_ranking.py::test_cka_is_its_definition",
    ),
    "ranking: the directed graph points the other way": Mutation(
        "pruning/ranking.py", "explained * spread[:, None]", "explained.T * spread[:, None]",
        "pruning/test_ranking.py::test_explained_variance_is_that_of_a_regression",
    ),
    "criteria: a column that has gone leaves the inverse as it was": Mutation(
        "pruning/criteria.py", "return torch.addmm(inverse, own, f, alpha=-1), ", "return inverse, ",
        "pruning/test_criteria.py::test_losses_add_up_to_the_joint_error_of_all_that_has_gone",
    ),
    "criteria: half of what a removal changes is applied to the products of weights": Mutation(
        "pruning/criteria.py", ".addmm_(f.T, k, alpha=-1).addmm_(k.T, f, alpha=-1)", ".addmm_(f.T, k, alpha=-2)",
        "pruning/test_criteria.py::test_losses_add_up_to_the_joint_error_of_all_that_has_gone",
    ),
    "criteria: the odd rest goes last": Mutation(
        "pruning/criteria.py", "return size % self.tile or self.tile", "return min(size, self.tile)",
        "pruning/test_criteria.py::test_the_odd_rest_goes_first_and_a_tile_stays",
    ),
    "criteria: guides go by the place among the heads that are open": Mutation(
        "pruning/criteria.py", "_factor(statistics.guide, pool) for _, cost, pool in found]",
        "_factor(statistics.guide, pool) for pool, (_, cost, _) in enumerate(found)]",
        "pruning/test_criteria.py::test_guides_stay_with_their_heads",
    ),
    "criteria: an average head is not guided by one": Mutation(
        "pruning/criteria.py", "(len(importance) * importance).clamp_min", "importance.clamp_min",
        "pruning/test_criteria.py::test_head_guide_is_one_for_an_average_head",
    ),
    "criteria: prices of outputs are not shares": Mutation(
        "pruning/criteria.py", "return self._scaled(self.outputs(statistics))", "return self.outputs(statistics).cpu()",
        "pruning/test_criteria.py::test_a_criterion_of_ones_own_is_on_one_scale",
    ),
    "criteria: QK energy with the mean of the keys": Mutation(
        "pruning/criteria.py", "centred = keys.double() - keys.double().mean(dim=2, keepdim=True)",
        "centred = keys.double()",
        "pruning/test_criteria.py::test_qk_energy_is_the_sum_of_squared_terms_of_the_scores",
    ),
    "layerwise_admm: the projection leaves the dual out": Mutation(
        "pruning/layerwise_admm.py", "by_score(free.square()", "by_score(w.square()",
        "pruning/test_layerwise_admm.py::test_the_steps_are_those_that_are_described"
    ),
    "layerwise_admm: the dual does not add up": Mutation(
        "pruning/layerwise_admm.py", "dual = free - z", "dual = w - z",
        "pruning/test_layerwise_admm.py::test_the_steps_are_those_that_are_described"
    ),
    "layerwise_admm: the dual grows with rho": Mutation(
        "pruning/layerwise_admm.py", "dual /= GROWTH", "dual *= GROWTH",
        "pruning/test_layerwise_admm.py::test_the_steps_are_those_that_are_described"
    ),
    "layerwise_admm: columns are not scaled to one variance": Mutation(
        "pruning/layerwise_admm.py", "weight = root.T @ statistics.weight * deviations",
        "weight = root.T @ statistics.weight",
        "pruning/test_layerwise_admm.py::test_units_of_the_inputs_do_not_matter",
    ),
    "axes: the keys are turned as the queries are": Mutation(
        "pruning/axes.py", "back.mT @ k", "turn @ k",
        "pruning/test_axes.py::test_the_function_stays",
    ),
    "axes: the inverse is that of undamped costs": Mutation(
        "pruning/axes.py", "return axes.mT @ root, inverse @ axes,",
        "return axes.mT @ root, (vectors / (values**2 - DAMPING).sqrt() @ vectors.mT) @ axes,",
        "pruning/test_axes.py::test_the_function_stays",
    ),
    "axes: the bias of v is not turned": Mutation(
        "pruning/axes.py", "_write_rows_(layer, q, k, turn @ v)",
        "_write_rows_(layer, q, k, torch.cat((turn @ v[..., :-1], v[..., -1:]), dim=-1))",
        "pruning/test_axes.py::test_the_function_stays",
    ),
    "axes: the mean of what a head gives is not taken out": Mutation(
        "pruning/axes.py", "_by_head(outputs.covariance(), size)", "_by_head(outputs.xx / outputs.weight, size)",
        "pruning/test_axes.py::test_outputs_are_uncorrelated_and_cost_the_same",
    ),
    "axes: heads are ranked after they were turned": Mutation(
        "pruning/prune.py", "seed, graphs or (), tick", "seed, (), tick",
        "pruning/test_axes.py::test_heads_are_ranked_as_they_were_given",
    ),
    "typed_graph: the mean that LayerNorm takes out is read": Mutation(
        "pruning/typed_graph.py", "return weight - weight.mean(dim=1, keepdim=True)", "return weight",
        "pruning/test_typed_graph.py::test_influence_is_the_energy_of_what_one_reads_of_the_other",
    ),
    "typed_graph: a head reads by its queries alone": Mutation(
        "pruning/typed_graph.py", "range(layer.read.out_features // layer.write.in_features)", "range(1)",
        "pruning/test_typed_graph.py::test_influence_is_the_energy_of_what_one_reads_of_the_other",
    ),
    "typed_graph: one type of edges outweighs the other": Mutation(
        "pruning/typed_graph.py", "+ _shares(self.influence)", "+ self.influence",
        "pruning/test_typed_graph.py::test_ranks_are_personalised_pagerank_with_half_of_each_type",
    ),
    "typed_graph: heads that have gone are not partialled out": Mutation(
        "pruning/typed_graph.py", "covariance if not steps else partial(covariance, torch.cat(steps))", "covariance",
        "pruning/test_typed_graph.py::test_heads_are_compared_anew_after_each_removal",
    ),
    "learned: a closed gate leaves nothing in the place of the mean": Mutation(
        "pruning/learned.py", "mean + (x - mean) * gate.to(mean.dtype)", "x * gate.to(mean.dtype)",
        "pruning/test_learned.py::test_open_gates_change_nothing_and_closed_ones_leave_the_mean",
    ),
    "learned: a node stays only where as many go as before it": Mutation(
        "pruning/learned.py", "likely.cumsum(0)", "likely",
        "pruning/test_learned.py::test_cold_gates_are_the_exact_solution_at_these_prices",
    ),
    "learned: images are drawn by the global generator": Mutation(
        "pruning/learned.py", 'torch.randperm(len(stream), generator=generator, device="cpu")',
        'torch.randperm(len(stream), device="cpu")',
        "pruning/test_learned.py::test_the_model_its_gradients_and_the_global_generator_stay_as_they_were",
    ),
    "learned: prices leave the scale of the terms": Mutation(
        "pruning/learned.py", "spread(prices * level,", "spread(prices,",
        "pruning/test_learned.py::test_before_the_first_step_prices_are_the_first_order_terms",
    ),
    "scoring: what a look at the whole model found is not told": Mutation(
        "pruning/scoring.py", "        prices=sensitivity.prices,\n", "",
        "pruning/test_criteria.py::test_prices_of_a_look_at_the_whole_model_decide_budgets_and_choice",
    ),
    "layerwise: biases are not fitted": Mutation(
        "pruning/layerwise.py", "offset if linear.has_bias else None", "None",
        "pruning/test_prune.py::test_what_follows_from_the_rest_is_pruned_without_a_trace",
    ),
    "layerwise: layer scale is not divided out of what a layer should give": Mutation(
        "models/base.py", "return (gap * _inverse(self.gain())).to(gap.dtype)", "return gap",
        "pruning/test_prune.py::test_the_fit_sees_the_attention_that_is_left",
    ),
    "layerwise: a norm behind a layer is not undone in what that should give": Mutation(
        "models/base.py", "return _before_norm(self.norm, self.layer_scale(), trace.given, gap)", "return gap",
        "models/test_post_norm.py::test_what_write_should_give_closes_the_gap_to_first_order",
    ),
    "layerwise: QK channels of the heads that are left are sought among all": Mutation(
        "pruning/layerwise.py", "_marked(columns[left], size)", "_marked(left, size)",
        "pruning/test_prune.py::test_the_target_is_met_exactly_as_counted",
    ),
    "layerwise: the fit does not see that QK channels have gone": Mutation(
        "pruning/layerwise.py",
        "            self._cut_qk(index, block, budget.qk, channels)\n            moments, _ = self._gather(index)\n",
        "            self._cut_qk(index, block, budget.qk, channels)\n",
        "pruning/test_prune.py::test_the_fit_sees_the_attention_that_is_left",
    ),
    "scoring: the graph does not guide the heads' budget": Mutation(
        "pruning/scoring.py", "replace(known.write, guide=guide)", "known.write",
        "pruning/test_prune.py::test_the_graph_guides_the_budget_of_heads",
    ),
    "synthesis: a neuron that nothing moves is no loss": Mutation(
        "pruning/synthesis.py", " - torch.stack(neurons).mean()", "",
        "pruning/test_synthesis.py::test_a_neuron_that_no_image_moves_makes_them_poor",
    ),
    "synthesis: the classifier is not asked": Mutation(
        "pruning/synthesis.py", "return loss if answers is None else loss + _doubt(answers)", "return loss",
        "pruning/test_synthesis.py::test_a_classifier_is_asked_where_there_is_one",
    ),
    "synthesis: pixels leave their range": Mutation(
        "pruning/synthesis.py", "images.clamp_(*limits)", "pass",
        "pruning/test_synthesis.py::test_the_model_finds_optimised_images_richer_and_they_stay_pixels",
    ),
    "procedural: leaves of all radii alike": Mutation(
        "pruning/procedural.py", "(SMALLEST_LEAF**-2 + draws[:, 0] * (LARGEST_LEAF**-2 - SMALLEST_LEAF**-2)) ** -0.5",
        "SMALLEST_LEAF + draws[:, 0] * (LARGEST_LEAF - SMALLEST_LEAF)",
        "pruning/test_synthesis.py::test_dead_leaves_have_as_much_to_see_at_each_scale",
    ),
    "key frames: each comes one frame late": Mutation(
        "keyframes.py", "self._age < self.every", "self._age <= self.every",
        "test_keyframes.py::test_the_difference_of_the_last_key_frame_is_added",
    ),
    "key frames: a difference is added to frames of any kind": Mutation(
        "keyframes.py", " and self._frames == kind", "",
        "test_keyframes.py::test_a_batch_that_the_state_does_not_fit_is_a_key_frame",
    ),
    "save: the number of neurons is rounded down": Mutation(
        "models/timm_vit.py", "(geometry.hidden + 0.5) / geometry.dim", "geometry.hidden / geometry.dim",
        "test_serialization.py::test_round_trip",
    ),
    "load: weights of another save are taken": Mutation(
        "serialization.py", "if digest != _digest(plan):", "if not digest:",
        "test_serialization.py::test_a_changed_plan_is_noticed_even_if_the_shapes_fit"
    ),
}  # fmt: skip


def find(folder: Path, mutation: Mutation) -> str:
    """Return the test that finds a fault in a copy of the tree, or the empty string."""
    with planted(folder / "python" / "gohsp" / mutation.file, mutation):
        return failure(folder, [mutation.test])


def failure(folder: Path, tests: list[str]) -> str:
    """Return the first of some tests that fails in a copy of the tree, or the empty string."""
    return first_failure(folder, [*(f"tests/gohsp/{test}" for test in tests), "--hypothesis-seed=0"])


def main(names: list[str]) -> int:
    mutations = chosen(names, MUTATIONS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_tree(folder, "tests", "python", "bench", "gohsp_kernels", "pyproject.toml")
        found = failure(folder, sorted({mutation.test for mutation in mutations.values()}))
        assert not found, f"a test fails without any fault: {found}"
        return report(mutations, lambda mutation: find(folder, mutation))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
