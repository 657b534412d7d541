"""Would the tests notice a bug? Puts one bug at a time into a copy of the code and runs the tests that should fail.

    python scripts/mutants.py                     # all of them (make test-mutants)
    python scripts/mutants.py --only 'alignment'  # those whose file or name contains the text, or matches the pattern
    python scripts/mutants.py --list

The table below holds, for each file of `src/oprd`, mutants of the kind that a refactoring could make: a name, a text that occurs
once in the file, the text in its place, and the tests that must notice. `tests/test_mutants_table.py` checks that it fits the code.

The same tests first run on the unchanged copy and must pass. Exit status: 0 if at least 95 % of the mutants are killed, 1 if
fewer are, 2 if the table does not fit or a test fails without a bug.

Each run is a fork of this process, which has imported torch, transformers and pytest, but never oprd.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path("src/oprd")
COPIED = ("src", "tests", "scripts", "recipes", "comparisons", "examples", "docs", "pyproject.toml", "README.md")
WANTED = 0.95  # share of mutants that must be killed
SECONDS = 300  # that a run of a mutant may take
NO_TEST = 5  # pytest's exit status where it deselects all tests: then nothing notices
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "agg", "CUDA_VISIBLE_DEVICES": "",
    "CI": "1", "OPRD_MUTANTS": "1",  # hypothesis draws the same examples each time, and shrinks none
}  # fmt: skip
PRELOADED = (
    "accelerate", "beartype", "datasets", "jaxtyping", "matplotlib.figure", "peft", "pydantic", "pytest", "torch",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama", "transformers.trainer", "typer",
)  # fmt: skip

# File below src/oprd → (name, old text, new text, tests that must notice: files or node ids below tests/, separated by spaces).
TABLE: dict[str, list[tuple[str, str, str, str]]] = {
    "sanitize.py": [
        ("a secret under its name is kept", "{key: _hidden(v) if named(key) else redacted(v, by_name=by_name)",
         "{key: redacted(v, by_name=by_name)",
         "test_sanitize.py::test_settings_keep_their_shape_and_all_that_is_no_secret"),
        ("user info of a URL is kept", "[^/?#\\s'\\\"<>]+(?=@)", "[^/?#\\s'\\\"<>:]+(?=@)",
         "test_sanitize.py::test_a_secret_is_known_by_what_stands_before_it"),
        ("a padding token is a secret", '"pad", "eos"', '"eos"',
         "test_sanitize.py::test_no_setting_but_the_hub_tokens_has_the_name_of_a_secret"),
        ("control characters pass", "c if c.isprintable() or c in keep or", "c if c.isprintable() or c in keep or True or",
         "test_sanitize.py::test_control_characters_are_shown"),
    ],
    "data/hub.py": [
        ("a silent hub is asked again", "    constants.HF_HUB_OFFLINE = True\n", "",
         "test_hub.py::test_a_hub_that_says_nothing_is_waited_for_once"),
    ],
    "models/nearest_folder.py": [
        ("the nearest folder is any", "if not (alike := difflib.get_close_matches(part, beside, n=1)):",
         "if not (alike := beside):", "test_messages.py::test_the_message"),
    ],
    "tasks/rewards.py": [
        ("weights of reward functions do not count", "[weight * reward for weight", "[reward for weight",
         "test_rewards.py::test_the_reward_is_the_weighted_sum_of_those_that_apply"),
        ("a reward that is not a number passes", "if not math.isfinite(number):", "if math.isinf(number):",
         "test_rewards.py::test_what_a_function_returns_is_checked"),
        ("each batch of async functions has an event loop of its own", "if self._runner is None:", "if True:",
         "test_rewards.py::test_async_functions_run_at_the_same_time_also_within_a_loop"),
        ("a conversation's completion is text", "text if isinstance(row.prompt, str) else", "text if True else",
         "test_rewards.py::test_a_function_gets_what_trl_gives_it"),
    ],
    "training/overrides.py": [
        ("an override of compute_loss passes", '("compute_loss", "compute_loss_context', '("compute_loss_context',
         "test_extend.py::test_what_a_run_never_calls_is_known"),
    ],
    "training/outcome.py": [
        ("the summary lacks what was measured after training", '_keep(trainer, "student_after", trainer.measure_now(), say)',
         'summary["student_before"]',
         "test_python_api.py::test_a_run_from_python_leaves_what_the_command_leaves"),
    ],
    "tools/compare/difference.py": [
        ("differences of unlike problems", "pairs = [left[key] - right[key] for key, _ in sorted(ours)]",
         "pairs = [o - b for (_, o), (_, b) in zip(ours, baseline, strict=True)]",
         "test_compare_runs.py::test_runs_on_the_same_problems_are_paired"),
        ("other problems are paired all the same",
         "if not ours or Counter(key for key, _ in ours) != Counter(key for key, _ in baseline):", "if not ours:",
         "test_compare_runs.py::test_a_problem_that_is_there_twice_counts_twice"),
        ("the difference is over all seeds of both", "for seed in ours if seed in baseline]",
         "for seed in ours if seed in baseline][:1]", "test_compare.py::test_differences_are_paired_by_seed"),
    ],
    "tools/settings_of_run.py": [
        ("a folder may name code", 'if ":" in code else ""', 'if code == ":" else ""',
         "test_eval_of_run.py::test_what_is_not_taken_is_asked_for"),
        ("the run's settings replace those of the command line", "if name in given or not applies",
         "if not applies", "test_eval_of_run.py::test_what_the_command_line_gives_comes_first"),
    ],
    "runs/measure.py": [
        ("rewards are told as an accuracy", 'if "accuracy_std" in metrics or any(_is_reward(found) for found in evaluations):',
         'if "accuracy_std" in metrics:',
         "test_rewards_in_words.py::test_a_run_is_rewarded_by_its_settings_its_evaluations_or_its_steps"),
    ],
    "tools/evaluate.py": [
        ("all rows in place of the first", '"dataset", reading)[:limit]', '"dataset", reading)',
         "test_python_api.py::test_a_model_and_a_task_may_be_objects"),
    ],
    "config.py": [
        ("numbers below a range pass", "and not allowed.least <= value <= allowed.most", "and not value <= allowed.most",
         "test_keys.py::test_numbers_out_of_range_are_refused_when_the_recipe_is_read"),
        ("trackers receive secrets", "return redacted(super().to_dict())", "return super().to_dict()",
         "test_sanitize.py::test_no_file_of_a_run_holds_a_secret"),
    ],
    "training/trackers.py": [
        ("a tracker hears of the end before the results", 'if event == "on_train_end" and self._keeps_open:', "if False:",
         "test_tracker_media.py::test_tensorboard_gets_the_verdict_and_the_curves_at_the_end"),
        ("calls find a later state", "copy.copy(state)", "state",
         "test_trackers.py::test_a_slow_tracker_does_not_slow_the_run_and_keeps_the_order"),
        ("a tracker may end the run", "except BaseException as error:  # SystemExit too", "except OSError as error:  # SystemExit too",
         "test_trackers.py::test_other_processes_do_not_warn"),
        ("a checkpoint is not waited for", '"on_train_begin", "on_save", "on_train_end")', '"on_train_begin", "on_train_end")',
         "test_trackers.py::test_a_slow_tracker_does_not_slow_the_run_and_keeps_the_order"),
    ],
    "training/tracker_media.py": [
        ("model output is Markdown", 'f"&#{ord(c)};" if c in string.punctuation else c', "c",
         "test_tracker_media.py::test_tensorboard_gets_a_table_of_completions_after_each_step_that_measures"),
        ("results go to a tracker that has ended", "if tracker.open and summary.get", "if summary.get",
         "test_tracker_media.py::test_the_end_is_told_after_the_results_and_also_after_an_error"),
    ],
    "resolve/no_effect.py": [
        ("the first key alone is looked at", "for key in needs.keys if", "for key in needs.keys[:1] if",
         "test_no_effect.py::test_alone_it_is_refused_and_with_what_it_needs_it_passes"),
    ],
    "objectives/representation.py": [
        ("norms in the dtype of the states", "vector_norm(states_ND, dim=-1, dtype=dtype)",
         "vector_norm(states_ND, dim=-1).to(dtype)",
         "test_representation.py::test_sums_over_16_bit_states_are_those_of_float64"),
        ("short states have no direction", "_TINY = 1e-12", "_TINY = 1e-3",
         "test_representation.py::test_short_states_have_a_direction_too"),
        ("the teacher's states are overwritten", "teacher_ND.to(dtype, copy=True)", "teacher_ND.to(dtype)",
         "test_representation.py::test_value_equals_the_brute_force_loop"),
        ("half of the gradient", "difference_ND.mul_(2.0 / width)", "difference_ND.mul_(1.0 / width)",
         "test_representation.py::test_gradient_by_finite_differences"),
        ("the gradient keeps its part along the state", "difference_ND.sub_((along_N[:, None] * student_hat_ND).to(dtype))",
         "pass", "test_representation.py::test_gradient_by_finite_differences"),
        ("the normalised gradient is not divided by the length", "(2.0 / student_norm_N)[:, None]",
         "(2.0 * student_norm_N.sign())[:, None]", "test_representation.py::test_gradient_by_finite_differences"),
    ],
    "objectives/reduction.py": [
        ("a rollout is a share of its micro-batch, not of the step", "* (step_rollouts or num_rollouts))",
         "* num_rollouts)", "test_representation.py::test_micro_batches_sum_to_the_whole"),
        ("a token is a share of its micro-batch, not of the step", "1.0 / (step_positions or len(rollout_index))",
         "1.0 / len(rollout_index)", "test_representation.py::test_micro_batches_sum_to_the_whole"),
        ("layers are summed", "for error_N in errors]).mean()", "for error_N in errors]).sum()",
         "test_representation.py::test_value_equals_the_brute_force_loop"),
    ],
    "objectives/schedules.py": [
        ("a crossfade from the wrong side", "return 1.0 - progress, progress", "return progress, 1.0 - progress",
         "test_composite.py::test_a_crossfade_by_hand"),
        ("a schedule one step early", 'min(step / weight["steps"], 1.0)', 'min((step + 1) / weight["steps"], 1.0)',
         "test_composite.py::test_weights_by_hand"),
        ("a jump after the first step", "float(x >= 1)", "float(x > 0)", "test_composite.py::test_weights_by_hand"),
        ("a weight that fades in counts as off", 'return bounds(weight)[1] > 0', 'return bounds(weight)[0] > 0',
         "test_composite.py::test_a_weight_is_on_if_it_ever_counts"),
    ],
    "objectives/head_metric.py": [
        ("no α of 0", "(1 - self.alpha) * state_part", "state_part",
         "test_head_metric.py::test_alpha_0_is_the_representation_loss_and_the_share_is_linear"),
    ],
    "objectives/zero_loss.py": [
        ("as many positions as a term needs are too few", "if chosen >= needed:", "if chosen > needed:",
         "test_silent_losses.py::test_each_choice_of_layers_and_positions_teaches_or_is_refused"),
        ("a loss that begins after the last step is taken", "any(loss.at(step).weights.values()) for step in range(config.max_steps)",
         "any(loss.at(step).weights.values()) for step in range(config.max_steps + 1)",
         "test_silent_losses.py::test_a_run_that_ends_before_its_loss_begins_is_refused"),
    ],
    "objectives/attention.py": [
        ("the divergence the other way round", "return (teacher_NHT * (", "return (student_NHT * (",
         "test_attention_maps.py::test_the_divergence_equals_loops_and_its_gradient_finite_differences"),
        ("the teacher's head is the student's", "(head[0], head[1]) for head", "(head[0], head[0]) for head",
         "test_attention_maps.py::test_heads_by_name_by_number_and_in_pairs"),
    ],
    "states/attention.py": [
        ("rows of the batch's first rollout", "maps_BHTT[flat_index // width, :,", "maps_BHTT[0 * flat_index, :,",
         "test_attention_maps.py::test_rows_are_transformers_own_whatever_the_padding"),
    ],
    "objectives/switch.py": [
        ("a loss that only rises switches", "if self._largest == 0 or gain", "if gain",
         "test_adaptive_switch.py::test_a_loss_that_rises_first_has_no_gain_to_fall_below"),
        ("the gain of a window counts as that of a step", "/ self.window**2", "/ self.window",
         "test_adaptive_switch.py::test_it_switches_where_the_gain_falls_below_half_of_the_largest"),
    ],
    "tools/diagnose/verdict.py": [
        ("a pruned copy is unrelated", 'if report["kept_layers"] is not None:', 'if False and report["kept_layers"]:',
         "test_diagnose_pruned.py::test_a_pruned_copy_of_the_teacher_is_mapped_to_the_layers_that_it_kept"),
    ],
    "objectives/flow.py": [
        ("a step leads into the next rollout", "(index_N[1:] == index_N[:-1])", "(index_N[1:] >= index_N[:-1])",
         "test_flow.py::test_value_and_gradient_equal_the_loops"),
        ("a rollout's steps have the weight of its positions but one", "* spread_S", "",
         "test_flow.py::test_value_and_gradient_equal_the_loops"),
    ],
    "objectives/batch.py": [
        ("a rollout without a reward has a part in its group's mean",
         "{i: float(reward) for i in group if (reward := self.rewards[i]) is not None}",
         "{i: float(self.rewards[i] or 0) for i in group}",
         "test_rewards.py::test_metrics_and_advantages_are_those_of_trl"),
        ("columns stay in order when rollouts are selected", "[column[i] for i in indices]", "list(column[: len(indices)])",
         "test_objectives_in_training.py::test_all_three_terms_together_equal_plain_pytorch"),
        ("ungraded rollouts count as wrong", 'float("nan") if r is None else float(r)', "float(r or 0)",
         "test_policy_gradient.py::test_advantages_of_a_batch_and_none_where_a_rollout_was_not_graded"),
        ("negative advantages count as zero", "sum(a == 0 for a in advantages)", "sum(a <= 0 for a in advantages)",
         "test_objectives_in_training.py::test_all_three_terms_together_equal_plain_pytorch"),
    ],
    "objectives/terms.py": [
        ("normalize is not passed on", "normalize=self.normalize, reuse_teacher=reuse", "reuse_teacher=reuse",
         "test_trainer.py::test_two_steps_equal_plain_pytorch"),
        ("the upper clip is the lower one", '"epsilon_high": self.epsilon_high}', '"epsilon_high": None}',
         "test_objectives_in_training.py::test_several_updates_on_the_same_rollouts_are_clipped_against_the_policy"
         "_that_wrote_them"),
        ("the tail's loss may have the teacher's rollouts", 'ON_POLICY_KINDS = ("sampled_token", "tail_sampled")',
         'ON_POLICY_KINDS = ("sampled_token",)', "test_off_policy.py::test_what_cannot_be_is_refused"),
    ],
    "objectives/composite.py": [
        ("the student's own tokens are learned too", "        if on_policy:\n            weights |=", "        if False:\n            weights |=",
         "test_teacher_text.py::test_a_supervised_term_counts_where_the_teacher_writes"),
        ("the policy gradient fades in, too", '"none": 1.0}', '"none": fade_in}',
         "test_objectives_in_training.py::test_a_crossfade_leaves_the_policy_gradient_alone"),
        ("clip_ratio is a share of the matched positions", "self._observer(self.totals.tokens),",
         "self._observer(self.totals.positions),",
         "test_objectives_in_training.py::test_clipping_is_counted_over_all_tokens_whichever_positions_the_other_terms_have"),
        ("layers are summed", "self._weighted(name, value / objective.num_layers)", "self._weighted(name, value)",
         "test_trainer.py::test_two_steps_equal_plain_pytorch"),
        ("distributions are divided by all tokens", "self._at(_compared_rollouts(asked), events_P, self.totals.compared)", "self._at(_compared_rollouts(asked), events_P, self.totals.tokens)",
         "test_off_policy.py::test_positions_of_the_output_space_loss_by_hand"),
        ("the policy gradient is divided by the matched positions", "self._weights(index_M, self.totals.tokens)",
         "self._weights(index_M, self.totals.positions)",
         "test_objectives_in_training.py::test_all_three_terms_together_equal_plain_pytorch"),
        ("log-probabilities at temperature 1", "asked.tokens, temperature=temperature)", "asked.tokens)",
         "test_objectives_in_training.py::test_grpo_equals_plain_pytorch_and_does_not_ask_the_teacher"),
        ("it measures a step early", "step % self.diagnostic_steps == 0", "(step + 1) % self.diagnostic_steps == 0",
         "test_objectives_in_training.py::test_every_tenth_step_measures_both_distributions"),
        ("the log has weighted losses", '{f"loss/{name}": value.detach()}',
         '{f"loss/{name}": self.terms.weights[name] * value.detach()}',
         "test_objectives_in_training.py::test_a_composite_equals_plain_pytorch"),
        ("the reverse KL is measured over the teacher's tokens", "if self.terms.on_policy:  # over", "if True:  # over",
         "test_off_policy.py::test_the_writer"),
        ("old log-probabilities are forgotten", "None if old is None else torch.cat(list(old))", "None",
         "test_objectives_in_training.py::test_several_updates_on_the_same_rollouts_are_clipped_against_the_policy"
         "_that_wrote_them"),
        ("terms may overwrite what another reads", "may_overwrite_teacher=len(mine) == 1", "may_overwrite_teacher=True",
         "test_composite.py::test_terms_on_the_same_states_do_not_disturb_each_other"),
    ],
    "objectives/diagnostics.py": [
        ("tokens of a rollout count as independent", "total_R.square().sum()", "values_M.square().sum()",
         "test_alarm.py::test_the_error_of_the_sampled_kl_is_over_rollouts"),
        ("the overlap of all events", "student_head.num_events - 1", "student_head.num_events",
         "test_output_space.py::test_the_overlap_that_is_watched_is_of_16_tokens_and_never_of_all"),
        ("the reverse KL has the wrong sign", "own_M - teacher_M", "teacher_M - own_M",
         "test_objectives_in_training.py::test_every_tenth_step_measures_both_distributions"),
    ],
    "objectives/policy_gradient.py": [
        ("the std of a population", "/ (group_size - 1)", "/ group_size",
         "test_policy_gradient.py::test_advantages_by_hand"),
        ("the mean of all prompts", "rewards_PG.mean(1, keepdim=True)", "rewards_PG.mean()",
         "test_policy_gradient.py::test_advantages_by_hand"),
        ("no clip below", "log_ratio_N.clamp(min=low)", "log_ratio_N",
         "test_policy_gradient.py::test_the_surrogate_by_hand"),
        ("the clip is symmetric in the logarithm", "log1p(-epsilon), log1p(", "-log1p(epsilon), log1p(",
         "test_policy_gradient.py::test_the_surrogate_by_hand"),
        ("the old policy gets a gradient", "log_p_N - old_log_p_N.detach()", "log_p_N - old_log_p_N",
         "test_policy_gradient.py::test_gradients_by_finite_differences"),
        ("clipped counts rollouts without an advantage", "(advantage_N > 0))", "(advantage_N >= 0))",
         "test_policy_gradient.py::test_the_surrogate_is_the_printed_formula"),
    ],
    "objectives/output_space.py": [
        ("the sampled token's teacher at temperature 1",
         "teacher_N = log_probs(teacher_head, teacher_NE, tokens_N, temperature=temperature, chunk_size=chunk_size)",
         "teacher_N = log_probs(teacher_head, teacher_NE, tokens_N, chunk_size=chunk_size)",
         "test_output_space.py::test_the_expected_gradient_is_the_reverse_kls"),
        ("the baseline has the wrong sign", "advantage_N = value_N - divergence(", "advantage_N = value_N + divergence(",
         "test_output_space.py::test_the_baseline_and_the_tail_lower_the_variance"),
        ("a sampled token of the support counts twice",
         "ratio_NK[:, -1].masked_fill_((support_NK == sampled_N1).any(-1), 0)", "pass",
         "test_output_space.py::test_the_expected_gradient_is_the_reverse_kls"),
        ("the tail's support is always the student's", "support_NK, _ = supports(*sides, k=k, support=support,",
         'support_NK, _ = supports(*sides, k=k, support="student",',
         "test_output_space.py::test_impossible_tokens_count_with_a_constant_by_hand"),
        ("an empty support has a loss", "value_NK.sum(-1) * ~empty_N1[:, 0]", "value_NK.sum(-1)",
         "test_output_space.py::test_top_k_equals_a_loop_over_sets"),
        ("the total cross-entropy is maximised", "(tokens_N1,), -weights_N,", "(tokens_N1,), weights_N,",
         "test_lm_head_weighted_sum.py::test_a_terms_total_is_the_sum_of_its_losses"),
        ("a union leaves out the wrong tokens", "new_NK = ~shared_NKK.any(1)", "new_NK = ~shared_NKK.any(2)",
         "test_output_space.py::test_top_k_equals_a_loop_over_sets"),
        ("beta is not passed on", '{"kind": "jsd", "beta": term.beta}', '{"kind": "jsd"}',
         "test_objectives_in_training.py::test_two_steps_of_each_output_space_loss_equal_plain_pytorch"),
    ],
    "models/lm_head/head.py": [
        ("the scale of Granite multiplies", '"logits_scaling": -1', '"logits_scaling": 1',
         "test_lm_head.py::test_the_head_of_every_family_gives_the_models_logits"),
        ("the scale comes after the bias", "logits_nV.add_(self.bias[: self.rows])",
         "logits_nV.add_(self.bias[: self.rows] / self.scale)",
         "test_lm_head.py::test_single_head_quantities_equal_the_dense_ones"),
        ("the end is its likeliest stop token", "before_nm.logsumexp(-1)", "before_nm.amax(-1)",
         "test_lm_head.py::test_a_divergence_equals_the_dense_one"),
        ("stop tokens become the last of them", "torch.isin(tokens, stops), stops[0], tokens)",
         "torch.isin(tokens, stops), stops[-1], tokens)",
         "test_output_space.py::test_a_sampled_stop_token_is_the_stop_event"),
        ("the teacher's stop tokens are none", "(*student.stop_token_ids, *teacher.stop_token_ids, *stop_token_ids)",
         "(*student.stop_token_ids, *stop_token_ids)",
         "test_lm_head.py::test_models_that_end_with_different_tokens_agree_when_both_mean_the_end"),
        ("two heads are cut to the student's size", "size = min(student.size, teacher.size) if vocab_size",
         "size = student.size if vocab_size", "test_lm_head.py::test_without_a_map_size_the_smaller_vocabulary_counts"),
        ("the end is named by the lowest id, shared or not", "key=lambda i: (i not in shared, i))", "key=lambda i: i)",
         "test_cross_tokenizer_training.py::test_all_ends_of_a_side_are_one_event_and_padding_is_none"),
    ],
    "models/lm_head/vocabulary.py": [
        ("logits in place of log-probabilities", "top.values - log_normalizer_n1", "top.values",
         "test_lm_head.py::test_single_head_quantities_equal_the_dense_ones"),
    ],
    "models/lm_head/matmul.py": [
        ("one factor is not rounded", "grad_nV, hidden_nD = grad_nV.to(product_dtype), hidden_nD.to(product_dtype)",
         "grad_nV = grad_nV.to(product_dtype)", "test_lm_head_matmul.py::test_operands_are_rounded_and_sums_are_not"),
        ("pieces of the weight overwrite each other", "grad_nD.addmm_(grad_nV[:, part]",
         "grad_nD.zero_().addmm_(grad_nV[:, part]",
         "test_lm_head_matmul.py::test_a_16_bit_weight_is_multiplied_in_float32_by_pieces"),
    ],
    "models/lm_head/gradients.py": [
        ("the second micro-batch replaces the first", "parameter.grad.add_(gradient)",
         "parameter.grad = gradient.to(parameter.dtype)",
         "test_lm_head_weighted_sum.py::test_gradients_added_in_place_are_the_same"),
        ("the bias gets a mean", "logits_grad_nV.sum(0)", "logits_grad_nV.mean(0)",
         "test_lm_head.py::test_gradients_by_finite_differences"),
        ("the embedding stays sparse", "embedding.sparse = before", "pass",
         "test_lm_head_gradients.py::test_outside_and_in_copies_it_is_off"),
    ],
    "models/lm_head/chunked.py": [
        ("the slope of the soft-cap at temperature 1", "logits_nV.mul(temperature / head.softcap)",
         "logits_nV.mul(1 / head.softcap)", "test_lm_head.py::test_gradients_by_finite_differences"),
        ("the gradient is not divided by the temperature", "factor = head.scale / temperature", "factor = head.scale",
         "test_lm_head.py::test_gradients_by_finite_differences"),
        ("stop tokens share the gradient equally", "stops_nm.softmax(-1).nan_to_num_(nan=0.0)",
         "torch.full_like(stops_nm, 1 / stops_nm.shape[1])", "test_lm_head.py::test_gradients_by_finite_differences"),
        ("gradients of a sum are not weighted", "inputs, weights_n1 if any(wanted) else None)",
         "inputs, torch.ones_like(weights_n1) if any(wanted) else None)",
         "test_lm_head_weighted_sum.py::test_it_equals_the_dense_sum"),
        ("the gradient from above is dropped", "gradient.mul_(upstream) for gradient", "gradient for gradient",
         "test_lm_head_weighted_sum.py::test_it_equals_the_dense_sum"),
        ("only the last chunk counts", "total += (values_n1 * weights_n1).sum()", "total = (values_n1 * weights_n1).sum()",
         "test_lm_head_weighted_sum.py::test_it_equals_the_dense_sum"),
    ],
    "models/lm_head/logit_functions.py": [
        ("the variance is not halved", "keepdim=True).mul_(0.5)\n    if upstream", "keepdim=True)\n    if upstream",
         "test_head_metric.py::test_it_is_the_kl_to_second_order"),
        ("what the student cannot write counts", "log_q_nV.exp().masked_fill_(impossible_nV, 0)", "log_q_nV.exp()",
         "test_head_metric.py::test_impossible_events_stay_finite"),
        ("weights do not reach the gradient of a function of log-probabilities", "leaf_nV, upstream_n1[:, 0])",
         "leaf_nV, torch.ones_like(upstream_n1[:, 0]))",
         "test_extend.py::test_a_function_of_log_probabilities_equals_the_shipped_divergence"),
        ("the JSD's gradient without its share", ".mul_(upstream_n1 * (1 - beta))", ".mul_(upstream_n1)",
         "test_lm_head.py::test_a_divergence_equals_the_dense_one"),
        ("impossible events pull on the student", "q_nV.masked_fill_(impossible_nV, 0)", "pass",
         "test_lm_head.py::test_impossible_tokens_give_finite_losses_and_gradients"),
        ("an impossible token gets a gradient", "upstream_nK.masked_fill(values_nK.isneginf(), 0)", "upstream_nK",
         "test_output_space.py::test_impossible_tokens_count_with_a_constant_by_hand"),
        ("the reverse KL's gradient without its mean", "ratio_nV.sub_(value_n1).mul_(p_nV)", "ratio_nV.mul_(p_nV)",
         "test_lm_head.py::test_a_divergence_equals_the_dense_one"),
        ("a baseline is always subtracted", "ratio_nV.mul_(p_nV).sum(-1, keepdim=True) if baseline else value_n1",
         "ratio_nV.mul_(p_nV).sum(-1, keepdim=True)",
         "test_lm_head_weighted_sum.py::test_a_terms_total_is_the_sum_of_its_losses"),
    ],
    "models/lm_head/selected_logits.py": [
        ("a row that several positions select gets one gradient",
         "total_VD.index_add_(0, rows_NR[part].flatten(), own_nRD.flatten(0, 1))",
         "total_VD[rows_NR[part].flatten()] += own_nRD.flatten(0, 1)",
         "test_lm_head_selected_logits.py::test_they_are_the_dense_log_probabilities_up_to_a_constant"),
        ("the end is its likeliest stop token", "logits_NR[:, rows_NK.shape[1] :].logsumexp(-1, keepdim=True)",
         "logits_NR[:, rows_NK.shape[1] :].amax(-1, keepdim=True)",
         "test_lm_head_selected_logits.py::test_they_are_the_dense_log_probabilities_up_to_a_constant"),
        ("the soft-cap is not scaled back", "(logits_NR / head.softcap).tanh() * head.softcap",
         "(logits_NR / head.softcap).tanh()",
         "test_lm_head_selected_logits.py::test_they_are_the_dense_log_probabilities_up_to_a_constant"),
    ],
    "states/positions.py": [
        ("one position too many", "range(max(0, length - k), length)", "range(max(0, length - k - 1), length)",
         "test_selection.py::test_positions"),
        ("the last position is lost without an end", "select_positions(length - ended, positions, k)",
         "select_positions(length - 1, positions, k)", "test_off_policy.py::test_positions_before_the_end"),
    ],
    "states/layers.py": [
        ("the last even layer is missing", "range(2, num_layers + 1, 2)", "range(2, num_layers, 2)",
         "test_selection.py::test_even_and_odd_layers_of_an_even_number"),
    ],
    "states/requests.py": [
        ("the state after the token", "start + len(rollouts.prompt_ids[index]) - 1)",
         "start + len(rollouts.prompt_ids[index]))",
         "test_selection.py::test_request_locates_the_token_before_each_selected_one"),
        ("a group stops before its budget", "(len(groups[-1]) + 1) <= token_budget", "(len(groups[-1]) + 1) < token_budget",
         "test_selection.py::test_micro_batches_by_hand"),
        ("shortest first", "key=lambda i: (-lengths[i], i)", "key=lambda i: (lengths[i], i)",
         "test_selection.py::test_micro_batches_hold_every_sequence_once_within_the_budget"),
        ("packed rows count their positions on", "position_ids[row, span] = torch.arange(lengths[index])",
         "position_ids[row, span] = torch.arange(lengths[index]) + start",
         "test_capture.py::test_padding_side_and_packing_change_nothing"),
        ("padding is seen", "attention_mask[row, span] = 1", "attention_mask[row] = 1",
         "test_capture.py::test_padding_side_and_packing_change_nothing"),
    ],
    "states/capture.py": [
        ("hooks stay", "handle.remove()", "pass", "test_capture.py::test_hooks_are_gone_afterwards_even_after_an_error"),
        ("a copy reads the original",
         'plain.__func__ if getattr(plain, "__self__", None) is model else lambda _, *a, **k: plain(*a, **k)',
         "lambda _, *a, **k: plain(*a, **k)", "test_capture.py::test_a_deep_copy_runs_on_its_own_weights"),
        ("all layers run", "if top < len(block_list):", "if False:",
         "test_capture.py::test_nothing_above_the_highest_layer_runs"),
    ],
    "states/layouts.py": [
        ("a model that reads ahead passes", "    if off > 2 * allowed:", "    if False:",
         "test_layouts.py::test_a_model_that_reads_ahead_is_refused"),
        ("any layout is equal", "return self.off[way] <= self.allowed[way]", "return True",
         "test_layouts.py::test_a_packed_row_is_refused_where_it_changes_the_states"),
        ("nothing is equal", "return self.off[way] <= self.allowed[way]", "return False",
         "test_layouts.py::test_families_whose_layouts_are_equal_keep_them"),
    ],
    "states/offload.py": [
        ("teachers may fill the device", "> (1 - STEP_SHARE) * (self.device or 0)", "> (self.device or 0)",
         "test_offload.py::test_teachers_wait_where_all_would_leave_a_step_less_than_a_quarter"),
        ("one model under two names waits", "sum(size > 0 for size in self.teachers) > 1", "len(self.teachers) > 1",
         "test_offload.py::test_teachers_wait_where_all_would_leave_a_step_less_than_a_quarter"),
        ("moments of weights that are not trained", "2 * trained, trained if overlap", "2 * weights, trained if overlap",
         "test_offload.py::test_the_training_state_of_a_model_by_hand"),
    ],
    "states/several.py": [
        ("two teachers are on the device at once", "key=lambda one: id(one) in wanted", "key=lambda one: id(one) not in wanted",
         "test_offload.py::test_a_teacher_leaves_the_device_before_the_next_one_comes"),
        ("where all teachers read, each reads its own rollouts", "everywhere or own == name", "own == name",
         "test_several_teachers.py::test_where_all_teachers_read_a_rollout_each_counts_equally"),
    ],
    "states/self_teacher.py": [
        ("the teacher moves in every step", "if step % self.sync_steps:", "if False:",
         "test_privileged.py::test_the_teacher_follows_by_the_closed_form"),
        ("a resumed teacher starts anew", "            weight.copy_(found[name])\n", "            pass\n",
         "test_privileged.py::test_a_resumed_run_goes_on_with_the_same_teacher"),
        ("the base is the student in training", "FrozenTeacher(deepcopy(student), info,", "FrozenTeacher(student, info,",
         "test_extrapolation.py::test_a_run_equals_one_with_the_target_written_out"),
    ],
    "alignment/privileged.py": [
        ("words of the student's own prompt are quotations", "_runs(_text(hidden)) - _runs(_text(shown))", "_runs(_text(hidden))",
         "test_privileged.py::test_a_quotation_is_four_words_in_a_row_that_only_the_teacher_was_shown"),
        ("a column that the row lacks is empty", "    if value is None:\n", "    if False:\n",
         "test_privileged.py::test_a_row_without_the_column_is_named"),
    ],
    "states/teachers.py": [
        ("the base samples with the adapter on", "        with _adapter_off(self.model):\n            yield self.model",
         "        if True:\n            yield self.model",
         "test_lora.py::test_the_base_as_teacher_writes_with_the_adapter_off_and_the_student_with_it_on"),
        ("the teacher keeps its dropout", "= model.eval().requires_grad_(False), autocast_dtype",
         "= model.requires_grad_(False), autocast_dtype", "test_trainer.py::test_the_teacher_never_changes"),
        ("the base is read with dropout", "with evaluating(self.model), _adapter_off", "with _adapter_off",
         "test_lora.py::test_the_base_as_teacher_is_read_without_dropout_and_leaves_the_mode_alone"),
        ("frozen adapters thaw", "parameter.requires_grad_(flag)", "pass",
         "test_objectives_in_training.py::test_asking_the_base_leaves_frozen_adapters_frozen"),
    ],
    "states/extrapolation.py": [
        ("the base reads on", "dtype), strength)", "dtype), 2 - strength)",
         "test_extrapolation.py::test_the_target_is_rides_and_lambda_1_is_the_teacher_to_the_bit"),
        ("the LM head reads past the teacher", "states if layer == HEAD else extrapolated(", "extrapolated(",
         "test_extrapolation.py::test_layers_move_and_the_heads_input_stays"),
    ],
    "states/similarity.py": [
        ("a debiasing term is halved", "- 2 * both / (n - 2)", "- both / (n - 2)",
         "test_similarity.py::test_cka_equals_its_definition"),
        ("short responses are diluted", "(total[-1] - total[max(0, len(total) - 1 - k)]) / min(k, len(total) - 1)",
         "(total[-1] - total[max(0, len(total) - 1 - k)]) / k",
         "test_similarity.py::test_the_position_curve_equals_a_loop"),
    ],
    "states/layer_maps.py": [
        ("proportional to the number of layers", "Fraction(index * (teacher_layers - 1), student_layers - 1)",
         "Fraction(index * teacher_layers, student_layers)",
         "test_layer_maps.py::test_proportional_equals_the_exact_formula_for_all_depths_below_96"),
        ("the map may step back", "source = t if best[t] > best[source] else source",
         "source = max(range(teacher_layers), key=best.__getitem__)",
         "test_layer_maps.py::test_cka_optimal_is_the_best_of_all_monotone_maps"),
        ("the last kept block stands for the last state", "spec = (*kept[:-1], teacher_layers)", "spec = tuple(kept)",
         "test_layer_map_setting.py::test_pairs_of_a_setting"),
        ("a state after the norm goes with an inner one", "if (own == student_layers) != (other == teacher_layers):",
         "if own == student_layers and other != teacher_layers:",
         "test_layer_map_setting.py::test_layers_that_do_not_fit_are_refused"),
    ],
    "states/mapped.py": [
        ("two student layers share one tensor", "copies = [states_ND.clone() for _ in others]", "copies = [states_ND for _ in others]",
         "test_layer_map_setting.py::test_states_are_the_teachers_at_the_mapped_layers"),
    ],
    "models/pruning.py": [
        ("lists of token ids are cut", "and not key.endswith(_NOT_PER_LAYER):", "and not key.startswith(_NOT_PER_LAYER):",
         "test_prune.py::test_only_lists_with_an_entry_a_block_are_cut"),
        ("cached keys stay where the block was", 'vars(module)["layer_idx"] = place', "pass",
         "test_prune.py::test_kinds_of_layers_stay_with_their_blocks"),
        ("a block is matched twice", "found.append(place + 1)", "found.append(place)",
         "test_layer_map_setting.py::test_a_block_that_equals_none_is_named"),
    ],
    "models/quantization.py": [
        ("the positive end is clipped", "groups.amax(-1, keepdim=True) / high", "groups.amax(-1, keepdim=True) / -low",
         "test_student_quantization.py::test_rounding_is_the_nearest_number_of_the_grid"),
        ("an old rounding is kept", "self._kept is None or self._kept[0] != state", "self._kept is None",
         "test_student_quantization.py::test_what_is_kept_between_tokens_follows_the_weight"),
        ("the rounded weights stay", "layer.weight.copy_(weight)", "pass",
         "test_student_quantization.py::test_rounded_weights_end_with_their_context"),
    ],
    "tools/prune.py": [
        ("the block of most influence goes", "key=lambda layer: (-influence[layer - 1], layer)",
         "key=lambda layer: (influence[layer - 1], layer)", "test_prune.py::test_choices"),
        ("the mean is over rollouts", "return [total / count for total in sums]", "return [total / len(rollouts) for total in sums]",
         "test_prune.py::test_influence_equals_a_loop_over_rollouts_and_positions"),
    ],
    "alignment/position_pairs.py": [
        ("pairs stay those of the whole batch", "self.pairs.select([entry[place] for place in places])", "self.pairs",
         "test_cross_tokenizer_training.py::test_groups_of_rollouts_do_not_matter"),
        ("pairs of one of several teachers are those of other rollouts", "[entry[place] for place in places]",
         "[place % len(entry) for place in places]",
         "test_several_tokenizers.py::test_next_token_distributions_of_each_are_compared_over_what_it_shares"),
        ("distributions are compared where the next tokens differ", "if same and ids[t] in event_of",
         "if ids[t] in event_of",
         "test_cross_tokenizer_training.py::test_two_steps_of_an_output_space_loss_equal_plain_pytorch"),
        ("micro-batches have room for the shorter text", "list(map(max, own,", "list(map(min, own,",
         "test_cross_tokenizer_training.py::test_no_batch_of_either_side_is_larger_than_allowed"),
        ("the teacher reads the rollouts of the whole batch", "teacher_rollouts=self.teacher_rollouts.select(indices)",
         "teacher_rollouts=self.teacher_rollouts",
         "test_cross_tokenizer_training.py::test_groups_of_rollouts_do_not_matter"),
        ("compared positions of the next rollout", "starts = [0, *accumulate(rollouts.completion_lengths)]",
         "starts = [*accumulate(rollouts.completion_lengths)]",
         "test_cross_tokenizer_training.py::test_two_steps_of_an_output_space_loss_equal_plain_pytorch"),
    ],
    "alignment/boundaries.py": [
        ("a mapped token of one vocabulary is passed on as it is",
         "frozenset(i for i, _ in text | special if self.special_map.get(i, i) == i)",
         "frozenset(i for i, _ in text | special)",
         "test_alignment.py::test_one_vocabulary_with_a_special_token_that_means_another_passes_the_other_on"),
        ("a teacher position has two partners", "theirs[n] > pairs[-1][1]", "theirs[n] >= pairs[-1][1]",
         "test_alignment.py::test_partners_have_read_the_same_bytes"),
        ("the end follows an opening space", "else complete and t == len(completion) - 1", "else complete",
         "test_alignment.py::test_a_response_of_the_opening_space_alone_is_empty"),
        ("the opening counts as read", "[max(0, n - skipped) for n in", "[n for n in",
         "test_alignment.py::test_partners_have_read_the_same_bytes"),
        ("an unfinished text is ended", "complete = ends and teacher.stopped is None", "complete = ends",
         "test_alignment.py::test_a_special_token_in_the_middle"),
        ("every broken text was cut",
         'broken == "partial" and cut and number == len(parts) - 1 and student.stopped is None', 'broken == "partial"',
         "test_alignment.py::test_bytes_that_are_no_text_end_the_alignment"),
        ("text after a special token begins too early", "start = student.read[n + 1]", "start = student.read[n]",
         "test_alignment.py::test_a_special_token_in_the_middle"),
    ],
    "alignment/teacher_prompts.py": [
        ("null in a teacher's entry leaves the run's setting", "in PROMPT_KEYS.items() if key in entry}",
         "in PROMPT_KEYS.items() if entry.get(key) is not None}",
         "test_several_tokenizers.py::test_one_model_under_two_ids_may_read_two_system_prompts"),
    ],
    "alignment/aligner.py": [
        ("counts are those of the last teacher", "getattr(self, f.name) + getattr(other, f.name)", "getattr(other, f.name)",
         "test_several_tokenizers.py::test_each_teacher_teaches_what_it_would_alone"),
        ("the teacher gets the student's opening", "self.pair.teacher.opening(prompt, teacher_space)",
         "self.pair.teacher.opening(prompt, student_space)", "test_alignment.py::test_partners_have_read_the_same_bytes"),
        ("tokens are shared twice", "if ours not in self.pair.stop_ids and i not in taken}",
         "if ours not in self.pair.stop_ids}",
         "test_alignment.py::test_the_shared_vocabulary_by_meaning"),
        ("the opening is left out of the prompt", "prompts.append([*prompt, *alignment.teacher_opening])",
         "prompts.append(list(prompt))", "test_alignment.py::test_partners_have_read_the_same_bytes"),
        ("every response ends", '["stop" if a.ended else "length" for a in alignments]', '["stop" for a in alignments]',
         "test_alignment.py::test_partners_have_read_the_same_bytes"),
    ],
    "alignment/model_pair.py": [
        ("quotes are of what another teacher was shown", "self.aligners.get(str(rows[row].columns.get(TEACHER_ID)), first)",
         "first", "test_several_tokenizers.py::test_a_quote_is_of_what_the_rows_own_teacher_was_shown"),
        ("the last teacher's bridge projects for all", "reader = self._reader(teacher_id)\n        return reader.project",
         "reader = teachers_of(self.teacher)[-1]\n        return reader.project",
         "test_several_bridges.py::test_states_of_a_teacher_without_a_bridge_are_compared_as_they_are"),
        ("the teacher's ends count by id, too", 'if self.compared.end_of_turn != "by_id" else {}', "",
         "test_off_policy.py::test_a_teacher_with_an_end_of_its_own"),
        ("a rollout counts once however many read it", "for reading in readings.values()]",
         "for reading in [*readings.values()][:1]]",
         "test_several_teachers.py::test_where_all_teachers_read_a_rollout_each_counts_equally"),
        ("one teacher's vocabulary is shared with all", "if teacher_id not in self._shared_vocabularies:",
         "teacher_id = next(iter(self.aligners))\n        if teacher_id not in self._shared_vocabularies:",
         "test_several_tokenizers.py::test_next_token_distributions_of_each_are_compared_over_what_it_shares"),
        ("padding rows are events", "size = min(vocabulary, student.size, teacher.size)",
         "size = min(student.size, teacher.size)",
         "test_objectives_in_training.py::test_padding_rows_do_not_count_and_get_no_gradient"),
        ("matched and compared positions are swapped", "pairs.num_matched, sum(lengths), pairs.num_compared]",
         "pairs.num_compared, sum(lengths), pairs.num_matched]",
         "test_cross_tokenizer_training.py::test_composites_equal_plain_pytorch"),
        ("the end is compared although it is to be skipped",
         'if self.compared.output_positions == "all" and self.compared.end_of_turn != "skip":',
         'if self.compared.output_positions == "all":',
         "test_off_policy.py::test_positions_of_the_output_space_loss_by_hand"),
        ("states are matched where distributions are compared",
         "return self._select(rollouts, self.compared.positions, self.compared.position_k)",
         "return self._select(rollouts, self.compared.output_positions, self.compared.output_position_k)",
         "test_off_policy.py::test_states_without_the_end_by_hand"),
        ("only the usual end is an event", "events | dict.fromkeys(stops, events[stops[0]])", "events",
         "test_cross_tokenizer_training.py::test_all_ends_of_a_side_are_one_event_and_padding_is_none"),
        ("the teacher's context is counted in the student's tokens", "infos = (self.student.info, *self.infos_of_same_tokens.values())",
         "infos = (self.student.info, self.teacher.info)",
         "test_cross_tokenizer_training.py::test_a_teacher_that_cannot_read_so_much_is_refused"),
    ],
    "bridge/fit.py": [
        ("no mean shift in the choice of a ridge",
         "held_out.student_mean_D - origin_D, held_out.teacher_mean_E - statistics.teacher_mean_E",
         "origin_D * 0, statistics.teacher_mean_E * 0",
         "test_bridge_fit.py::test_the_chosen_ridge_knows_how_far_the_held_out_means_have_moved"),
        ("a constant dimension becomes noise", "torch.where(spread_D > rounding_D, spread_D, torch.inf)",
         "torch.where(spread_D > 0, spread_D, torch.inf)",
         "test_bridge_fit.py::test_a_dimension_that_varies_by_less_than_its_float32_rounding_is_constant"),
        ("the variance of a population", "sizes_R / (statistics.n - 1)", "sizes_R / statistics.n",
         "test_bridge_fit.py::test_directions_are_those_of_the_sample_covariance"),
        ("a rotation without its scale", "@ left_DM.T * (sizes_M.sum() / captured.clamp_min(1e-300))", "@ left_DM.T",
         "test_bridge_fit.py::test_procrustes_finds_a_rotation_and_a_scale"),
        ("an intercept nobody asked for", "student_mean_D = statistics.student_mean_D if intercept else "
         "torch.zeros_like(statistics.student_mean_D)\n    means", "student_mean_D = statistics.student_mean_D\n    means",
         "test_bridge_fit.py::test_the_intercept_matters_where_means_are_large"),
        ("weak directions are kept", "[sizes_R > ridge * sizes_R[0]]", "[sizes_R > 0]",
         "test_bridge_fit.py::test_cca_leaves_out_directions_below_the_ridge"),
        ("the least important direction comes first", "_signed(vectors[:, kept].T.flip(0))", "_signed(vectors[:, kept].T)",
         "test_bridge_fit.py::test_directions_are_those_of_the_sample_covariance"),
    ],
    "bridge/statistics.py": [
        ("the mean moves by the tokens before", "self.student_mean_D.add_(student_D, alpha=n / total)",
         "self.student_mean_D.add_(student_D, alpha=self.n / total)",
         "test_bridge_statistics.py::test_sums_equal_torch_cov"),
        ("a merge forgets how far the means are apart",
         "self.cross_DE.addr_(student_D, teacher_E, alpha=self.n * n / total)",
         "self.cross_DE.addr_(student_D, teacher_E, alpha=n / total)",
         "test_bridge_statistics.py::test_shards_merge_to_the_whole"),
        ("the sample is not paired", "torch.cat([self.teacher_sample_KE, teacher_nE])[kept]",
         "torch.cat([self.teacher_sample_KE, teacher_nE])[kept.sort().values]",
         "test_bridge_statistics.py::test_the_sample_is_uniform_and_paired"),
        ("each chunk draws the same keys", 'f"{self.seed} {self.n}".encode()', 'f"{self.seed}".encode()',
         "test_bridge_statistics.py::test_the_sample_is_uniform_and_paired"),
        ("the similarity of few tokens is biased", "/ ((count - 1) * (count - 2))", "/ (count * (count - 1))",
         "test_similarity.py::test_cka_equals_the_bridge_s_two"),
        ("the part of a strip below the diagonal is not mirrored", "sum_XX[rest, strip] = sum_XX[strip, rest].T", "pass",
         "test_bridge_statistics.py::test_sums_of_states_wider_than_a_strip_are_whole"),
    ],
    "bridge/curve.py": [
        ("direct R² of the tokens of the fit", "direct_r2=held_out.direct_r2()", "direct_r2=statistics.direct_r2()",
         "test_bridge_fit.py::test_each_figure_of_a_report_is_of_the_tokens_that_it_is_said_to_be_of"),
        ("cosines of the tokens of the fit", "rank_cosines(fit, held_out)", "rank_cosines(fit, statistics)",
         "test_bridge_fit.py::test_each_figure_of_a_report_is_of_the_tokens_that_it_is_said_to_be_of"),
        ("CKA of the held-out tokens", "cka=statistics.cka()", "cka=held_out.cka()",
         "test_bridge_fit.py::test_each_figure_of_a_report_is_of_the_tokens_that_it_is_said_to_be_of"),
        ("useful variance counts once", "variance_R - 2 * useful_R", "variance_R - useful_R",
         "test_bridge_fit.py::test_theorem_3_by_hand"),
        ("shifts of the means add up", "(student_shift_R - teacher_shift_R).square()",
         "(student_shift_R + teacher_shift_R).square()", "test_bridge_fit.py::test_held_out_errors_equal_brute_force"),
        ("models of other depth are direct", "if same_depth and all(direct):", "if all(direct):",
         "test_bridge_fit.py::test_verdicts"),
    ],
    "bridge/collect.py": [
        ("the sample is larger than its limit", "values_ND[: tokens - seen]", "values_ND",
         "test_cross_tokenizer_training.py::test_the_similarity_of_layers_is_of_states_that_have_read_the_same"),
        ("rollouts are held out by their place in the batch", "(start + i in held) is judging", "(i in held) is judging",
         "test_bridge_training.py::test_a_fit_reads_all_rollouts_once_and_holds_some_out"),
        ("every batch has one seed", "seed=derive_seed(seed, start)", "seed=derive_seed(seed)",
         "test_bridge_training.py::test_a_fit_reads_all_rollouts_once_and_holds_some_out"),
        ("the teacher's layers by the student's numbers", "wanted = tuple(sorted({phi[layer - 1] for layer in chosen}))",
         "wanted = chosen",
         "test_bridge_training.py::test_statistics_are_those_of_full_forwards_whatever_the_micro_batches"),
    ],
    "bridge/bridge.py": [
        ("prompts of another date are other prompts", 'name != "chat_template_date" and ', "",
         "test_several_bridges.py::test_a_bridge_of_other_prompts_is_said"),
        ("the upper median of the suggested ranks", "suggested[(len(suggested) - 1) // 2]",
         "suggested[len(suggested) // 2]",
         "test_bridge.py::test_the_default_rank_is_the_lower_median_of_what_the_layers_suggest"),
        ("the mean is not subtracted", "(states_NX.to(dtype) - mean_X.to(device, dtype)) @ rows_rX.T",
         "states_NX.to(dtype) @ rows_rX.T", "test_bridge.py::test_projections_are_the_paper_s"),
        ("a scale of all ranks", "SCALES[self.scale](variance_R[: self.rank])",
         "SCALES[self.scale](variance_R)[: self.rank]", "test_bridge.py::test_projections_are_the_paper_s"),
    ],
    "rollouts/probe.py": [
        ("logits alone are those of the next token", "output.logits[0, len(text) - 1 : -1]", "output.logits[0, len(text) :]",
         "test_layouts.py::test_families_whose_layouts_are_equal_keep_them"),
    ],
    "rollouts/draw.py": [
        ("a token of weight 0 at the end", "torch.nextafter(total_B1, torch.zeros_like(total_B1))", "total_B1 + 1",
         "test_decode.py::test_the_inverse_of_the_distribution_function"),
        ("a nucleus without the token that crosses top_p", "todo = todo[above_B >= top_p]", "todo = todo[above_B >= 0.9 * top_p]",
         "test_decode.py::test_draws_follow_the_exact_distribution"),
    ],
    "rollouts/cached_rows.py": [
        ("rows that leave keep their cache", "kept[moved, :, :length] = kept[beam_idx[moved], :, :length]", "pass",
         "test_decode.py::test_greedy_equals_generate_in_every_family"),
        ("positions count padding", "(self._mask.cumsum(-1) - 1).clamp(min=0)", "torch.arange(input_ids.shape[1])[None]",
         "test_decode.py::test_greedy_equals_generate_in_every_family"),
    ],
    "rollouts/decode.py": [
        ("all generations of a prompt draw alike", "derive_seed(seed, before[prompt], *prompt)", "derive_seed(seed, *prompt)",
         "test_decode.py::test_equal_prompts_are_read_once_and_get_completions_of_their_own"),
        ("log-probabilities after the vocabulary is cut", "_log_probs(cached.logits_BV, tokens_B)",
         "_log_probs(cached.logits_BV[:, :vocab_size], tokens_B)",
         "test_decode.py::test_log_probs_are_those_of_a_full_forward"),
    ],
    "rollouts/weights_copy.py": [
        ("the copy keeps its first weights", "copied[name].copy_(live)", "pass",
         "test_decode.py::test_weights_that_change_change_rollouts"),
    ],
    "models/lm_head/contiguous.py": [
        ("the head gets the slice", "args[0].contiguous()", "args[0]",
         "test_rollout.py::test_a_frozen_head_is_multiplied_once_not_once_a_row"),
        ("the head keeps its hook", "handle.remove()", "pass",
         "test_rollout.py::test_a_frozen_head_is_multiplied_once_not_once_a_row"),
    ],
    "tools/doctor/time.py": [
        ("every batch's tokens cost nothing to draw", "rows * shape.rows * device.logit_seconds", "0.0",
         "test_doctor.py::test_what_a_cpu_adds_in_closed_form"),
        ("elementwise operations cost nothing", "self.compute(flops) + self.write(layers * tokens * _written_numbers(shape))",
         "self.compute(flops)", "test_doctor.py::test_what_a_cpu_adds_in_closed_form"),
    ],
    "tools/doctor/workload.py": [
        ("the student's dtype is ignored", 'own.get("dtype", "float32")', '"float32"',
         "test_doctor.py::test_the_dtype_of_the_weights_is_that_of_the_arguments_of_from_pretrained"),
    ],
    "tools/doctor/memory.py": [
        ("an adapter is as narrow as its base", "(weight * shape.parameters + _FLOAT * adapter)",
         "weight * (shape.parameters + adapter)",
         "test_doctor.py::test_the_dtype_of_the_weights_is_that_of_the_arguments_of_from_pretrained"),
    ],
    "rollouts/transformers_engine.py": [
        ("parts of a batch draw for themselves", "if self.batch in (None, rows):", "if True:",
         "test_memory.py::test_halved_generation_gives_the_same_tokens"),
        ("the next batch draws as if nothing was drawn", "after, most = generator.get_state(), draw.count", "most = draw.count",
         "test_memory.py::test_halved_generation_gives_the_same_tokens"),
        ("the next batch goes on from the last part's draws", "if draw.count > most:", "if draw.count:",
         "test_memory.py::test_halved_generation_gives_the_same_tokens"),
    ],
    "rollouts/background.py": [
        ("the copy keeps its first weights", "copied.copy_(live)", "pass",
         "test_overlap.py::test_the_copy_follows_when_asked_and_not_before"),
        ("rollouts of other prompts are taken", "found.step == step and found.rows() == rows", "found.step == step",
         "test_overlap.py::test_rollouts_of_another_step_or_of_other_prompts_are_not_taken"),
        ("nothing is stale", "staleness=1)", "staleness=0)",
         "test_overlap.py::test_each_step_learns_from_what_the_weights_before_the_last_update_sampled"),
        ("the copy has dropout", "copy.deepcopy(student, dict(frozen)).eval()", "copy.deepcopy(student, dict(frozen))",
         "test_overlap.py::test_the_copy_follows_when_asked_and_not_before"),
        ("frozen weights are copied", "copy.deepcopy(student, dict(frozen))", "copy.deepcopy(student)",
         "test_overlap.py::test_an_adapter_is_copied_and_its_base_is_shared"),
    ],
    "rollouts/parity.py": [
        ("measured with dropout", "with evaluating(model), explaining_out_of_memory", "with explaining_out_of_memory",
         "test_parity.py::test_dropout_is_off_while_it_is_measured_and_as_before_after_it"),
        ("rollouts in the order of the micro-batches", "[own[i] for i in range(len(rollouts))]", "list(own.values())",
         "test_parity.py::test_gaps_are_in_the_order_of_the_rollouts"),
    ],
    "states/teacher_settings.py": [
        ("one of all the teachers that read a prompt writes it",
         'if args.teachers_per_prompt == "all" and not args.student_writes:', "if False:",
         "test_teachers_write.py::test_settings_that_do_not_fit_are_refused_before_a_model_is_loaded"),
    ],
    "rollouts/teacher_text.py": [
        ("responses in the order of the teachers", "order = sorted(range(len(places)), key=places.__getitem__)",
         "order = list(range(len(places)))",
         "test_teachers_write.py::test_each_prompt_is_written_by_its_teacher_in_its_place"),
        ("a teacher writes where it waits", "several.ready(teacher_id, device), places",
         "several.teachers[teacher_id], places", "test_teachers_write.py::test_a_teacher_is_where_it_runs_before_it_writes"),
        ("a finished response keeps no end", "            ids.append(self._end(row))", "            pass",
         "test_teacher_text.py::test_a_finished_response_ends_with_the_students_end"),
        ("a response may be longer than the limit", "kept[place] = ids[:limit]", "kept[place] = ids",
         "test_teacher_text.py::test_more_tokens_than_allowed_are_cut_and_counted"),
        ("a lost last token is not said", 'return "unknown_to_teacher" if unwritten else ""', 'return ""',
         "test_teacher_text.py::test_a_last_character_that_the_student_lacks_is_counted"),
        ("last bytes of no character are not said", 'return "invalid_utf8"', 'return ""',
         "test_teacher_text.py::test_a_part_of_a_character_at_the_limit_is_no_loss_and_other_bytes_are"),
    ],
    "rollouts/engine.py": [
        ("the stop token is cut off", "completion[: index + 1]", "completion[:index]",
         "test_rollout.py::test_a_completion_ends_with_its_first_stop_token_or_at_the_limit"),
        ("rows in the wrong order", "[row for row in names for _ in range(num_generations)]",
         "[row for _ in range(num_generations) for row in names]",
         "test_rollout.py::test_generations_lie_prompt_after_prompt"),
        ("the writer is drawn once", 'derive_seed(seed, step, "writer")', 'derive_seed(seed, "writer")',
         "test_off_policy.py::test_a_share_of_steps_is_the_students"),
    ],
    "rollouts/vllm/http.py": [
        ("a completion may be drawn partly by old weights", "if drawn_by != {version}:", "if version not in drawn_by:",
         "test_vllm_server.py::test_a_completion_that_two_sets_of_weights_drew_is_not_used"),
    ],
    "http/client.py": [
        ("a request may take as long as bytes come", "with anyio.fail_after(self.timeout):", "with anyio.fail_after(None):",
         "test_vllm_server_faults.py::test_a_passing_fault_changes_no_rollout"),
    ],
    "http/patience.py": [
        ("a server is asked again before it wants to be", "asked + _jitter.uniform(0, limit)", "_jitter.uniform(0, limit)",
         "test_vllm_server_faults.py::test_a_busy_server_is_left_alone_as_long_as_it_asks"),
    ],
    "states/remote/teacher.py": [
        ("another model's states are learnt from", "now != served.identity", "False",
         "test_teacher_server.py::test_what_waiting_does_not_mend_is_one_sentence"),
        ("a flipped bit is learnt from", "not in (None, wire.digest(answer.content))", "not in (None, answer.headers.get(wire.SHA256))",
         "test_teacher_server.py::test_a_passing_fault_changes_no_state"),
    ],
    "states/remote/wire.py": [
        ("states of another shape are taken", "if received[name] != shapes[name]]", "if received[name] == 'nothing']",
         "test_teacher_server.py::test_what_waiting_does_not_mend_is_one_sentence"),
        ("a client reads beyond the batch", '"flat_index": tokens, "head_index"', '"flat_index": None, "head_index"',
         "test_teacher_server.py::test_what_is_no_request_is_refused"),
        ("a small request has an answer of any size", "len(found[name]) > tokens", "False",
         "test_teacher_server.py::test_what_is_no_request_is_refused"),
        ("a server is asked twice for one state", "if len(once) == len(places_N):", "if True:",
         "test_teacher_server.py::test_interpolated_states_are_those_of_a_teacher_here"),
    ],
    "states/remote/server.py": [
        ("a server is open to others without a token", "if not token and not is_loopback(host):", "if False:",
         "test_teacher_server.py::test_others_are_let_in_with_a_token_alone"),
        ("any token is accepted", "if not hmac.compare_digest(", "if False and not hmac.compare_digest(",
         "test_teacher_server.py::test_a_token_is_asked_for"),
        ("zeros before a length let any body in", 'digits = length.lstrip("0") or "0"', "digits = length[:19]",
         "test_teacher_server.py::test_no_way_of_writing_a_length_lets_a_larger_body_in"),
        ("a length of any number of digits is read", "if len(digits) <= _MOST_DIGITS else None", "if True else None",
         "test_teacher_server.py::test_no_way_of_writing_a_length_lets_a_larger_body_in"),
        ("who sends nothing stays", "_MOST_UNAUTHENTICATED = 64", "_MOST_UNAUTHENTICATED = 10**6",
         "test_teacher_server.py::test_who_sends_nothing_keeps_no_place_from_who_has_the_token"),
        ("an admitted request has no place", "self.server.admit(self.connection)", "pass",
         "test_teacher_server.py::test_who_may_ask_has_as_many_places_as_requests_may_wait"),
        ("a place is kept after its connection", "                    self._places.release()", "                    pass",
         "test_teacher_server.py::test_who_may_ask_has_as_many_places_as_requests_may_wait"),
        ("headers have as much time as the request", "Timer(self._limits.headers,", "Timer(self._limits.timeout,",
         "test_teacher_server.py::test_headers_have_a_time_of_their_own"),
        ("a request that waits at the stop fails", "except CancelledError:", "except ZeroDivisionError:",
         "test_teacher_server.py::test_a_request_that_waits_when_the_server_stops_is_told_to_come_again"),
    ],
    "states/cache/teacher.py": [
        ("states of a neighbouring position", "return shard, start + wanted[0] - first, end", "return shard, start, end - wanted[0] + first",
         "test_teacher_cache.py::test_states_are_found_by_what_is_read"),
    ],
    "states/cache/folder.py": [
        ("a damaged shard is read", "or file_digest(file) != sha256:", "or False:",
         "test_teacher_cache.py::test_damage_is_noticed_before_training_and_mended_by_the_writer"),
        ("a killed writer starts over from nothing", "self._keep_what_is_whole()", "self.index = CacheIndex(content)",
         "test_teacher_cache.py::test_a_killed_writer_goes_on_and_leaves_the_same_bytes"),
    ],
    "bridge/teacher.py": [
        ("projected states are not interpolated", "hand_over(self.teacher, asked if self.projected",
         "hand_over(self.teacher, request if self.projected",
         "test_teacher_server.py::test_interpolated_states_are_those_of_a_teacher_here"),
    ],
    "resolve/checks.py": [
        ("a cache has no states for the teacher's own prompts", "if own := run.args.prompt_rendering.own_prompt_settings:", "if own := []:",
         "test_teacher_cache.py::test_what_a_cache_cannot_do_is_refused_before_models_are_loaded"),
        ("a supervised term needs the teacher's head", " and not is_supervised(found.objective)", "",
         "test_teacher_cache.py::test_a_cached_teacher_trains_to_the_bits_of_a_live_one"),
        ("a sharded student is probed", "if run.args.learning_rate == AUTO and run.args.splits_weights:", "if False:",
         "test_rate_probe.py::test_a_sharded_student_is_refused_before_models_are_read"),
    ],
    "cli/train.py": [
        ("a dry run of a resumed run probes again", "    take_what_was_chosen(run, resumes)\n", "",
         "test_rate_probe.py::test_a_dry_run_of_a_resumed_run_keeps_its_rate"),
    ],
    "data/responses.py": [
        ("a response has tokens that the student lacks", "if max(ids) >= most:", "if False:",
         "test_teacher_cache.py::test_the_writer_refuses_what_it_cannot_cache"),
        ("a response ends without an end", "and ids[-1] not in ends:", "and False:",
         "test_teacher_cache.py::test_the_writer_refuses_what_it_cannot_cache"),
    ],
    "rollouts/vllm/requests.py": [
        ("a restarted server draws before it has the weights", "if attempt and await", "if False and await",
         "test_vllm_server_faults.py::test_a_killed_server_is_waited_for_and_gets_the_weights_again"),
        ("a set has no deadline", "anyio.move_on_after(wanted.seconds_left)", "anyio.move_on_after(None)",
         "test_vllm_server_faults.py::test_a_set_of_rollouts_has_a_deadline"),
    ],
    "rollouts/vllm/held_folder.py": [
        ("folders of live runs are removed", "            with FileLock(folder / _LOCK, timeout=0):\n                _remove(folder)\n",
         "            _remove(folder)\n",
         "test_vllm_server_faults.py::test_folders_of_dead_runs_are_removed_and_those_of_live_ones_are_not"),
    ],
    "models/recomputation.py": [
        ("all of a block is kept", "if not torch.is_grad_enabled():", "if True:",
         "test_long_sequences.py::test_the_input_of_a_block_is_what_is_kept_and_a_chunk_is_what_an_mlp_sees"),
        ("a part that mixes tokens is cut", "known.append(states and _treats_each_token_alone(mlp, forward, args[0]))",
         "known.append(states)", "test_long_sequences.py::test_a_part_that_mixes_tokens_is_not_cut"),
        ("an MLP sees the whole sequence", "chunks = args[0].split(tokens, dim=1)", "chunks = args[0].split(10**9, dim=1)",
         "test_long_sequences.py::test_the_input_of_a_block_is_what_is_kept_and_a_chunk_is_what_an_mlp_sees"),
        ("forwards stay replaced", "                del module.forward", "                pass",
         "test_long_sequences.py::test_gradients_are_those_of_the_whole_sequence"),
    ],
    "training/long_sequences.py": [
        ("every rollout runs as a long one", "if longest <= token_budget:", "if False:",
         "test_long_sequences.py::test_a_run_without_long_rollouts_is_left_alone"),
        ("it is said in every step", "self._said.add(about)", "pass",
         "test_long_sequences.py::test_a_run_with_long_rollouts_learns_the_same"),
    ],
    "training/memory.py": [
        ("a failed pass leaves its gradients", "self.parallel.student.zero_grad()", "pass",
         "test_memory.py::test_the_gradients_are_those_without_the_error"),
        ("earlier batches of the step are forgotten", "for earlier, relearn in self._accumulated:",
         "for earlier, relearn in self._accumulated[:0]:", "test_memory.py::test_the_gradients_are_those_without_the_error"),
        ("metrics of a failed pass count", "lambda **values: observed.append(values))", "self.recorder.observe)",
         "test_memory.py::test_the_gradients_are_those_without_the_error"),
        ("gradients from elsewhere are dropped", "if not (self._only_ours and self.parallel.may_run_again(part)):",
         "if not self.parallel.may_run_again(part):", "test_memory.py::test_gradients_from_elsewhere_are_not_dropped"),
        ("one rollout that is too large ends the run at once", "or self._is_long(part)):", "or True):",
         "test_long_sequences.py::test_where_one_rollout_does_not_fit_it_is_run_as_a_long_one"),
        ("a resumed run forgets the lower budget", "int(saved[\"value\"]) if same else size.configured", "size.configured",
         "test_memory.py::test_a_resumed_run_keeps_the_lower_budget"),
    ],
    "training/rollout_source.py": [
        ("rollouts are sampled in full precision", "with self.parallel.sampling_precision():", "if True:",
         "test_precision.py::test_rollouts_are_sampled_in_the_precision_of_training"),
        ("plain prompts count as conversations", "if row in conversations and ids[-1]", "if ids[-1]",
         "test_control_tokens.py::test_rollouts_that_do_not_end_as_the_template_does_are_counted_and_said_once"),
        ("all ranks draw the same", "derive_seed(self.args.seed, step, batch, self.args.process_index, *parts)",
         "derive_seed(self.args.seed, step, batch, *parts)",
         "test_trainer.py::test_rollouts_of_the_same_step_differ_from_process_to_process"),
        ("old log-probabilities are those of the last update",
         "if self.args.num_iterations > 1 and batch.old_log_probs is None:", "if self.args.num_iterations > 1:",
         "test_objectives_in_training.py::test_several_updates_on_the_same_rollouts_are_clipped_against_the_policy"
         "_that_wrote_them"),
        ("every accumulated batch is the first one again", "return self._kept[self._batch_of_step]", "return self._kept[1]",
         "test_objectives_in_training.py::test_accumulated_batches_are_kept_for_the_second_update"),
        ("one dropout mask for all micro-batches", "self._seed(terms.step, batch_of_step - 1, part.number)",
         "self._seed(terms.step, batch_of_step - 1)",
         "test_objectives_in_training.py::test_dropout_is_new_in_each_step_batch_and_micro_batch"),
        ("accumulated batches draw the same", "seed = self._seed(terms.step, self._batch_of_step - 1)",
         "seed = self._seed(terms.step, 0)",
         "test_trainer.py::test_rollouts_differ_from_step_to_step_and_between_accumulated_batches"),
        ("the next step is sampled with the seed of this one", "partial(self._sample_step, self._next_batches, step + 1)",
         "partial(self._sample_step, self._next_batches, step)",
         "test_overlap.py::test_without_change_of_weights_it_is_the_run_without_overlap"),
    ],
    "training/recorder.py": [
        ("a resumed run forgets what its terms have seen", '            self._tell(row["step"], row)\n', "",
         "test_adaptive_switch.py::test_a_resumed_run_switches_where_the_other_did"),
        ("distances stay in the order of the micro-batches", ".index_add_(0, places, values)",
         ".index_add_(0, places.sort().values, values)", "test_tracker_media.py::test_distances_find_their_rollouts"),
        ("the teacher's rollouts count as the student's accuracy", "batch.correct if mine else []",
         "batch.correct", "test_off_policy.py::test_the_teachers_accuracy_is_not_logged_as_the_students"),
        ("padding of accumulated batches adds up", "padding_share=share * padding_share(", "padding_share=padding_share(",
         "test_trainer.py::test_gradient_accumulation_equals_one_larger_batch"),
        ("an unfinished step counts in the next call",
         "self._metrics, self._batches, self._prompts = StepMetrics(), [], []", "self._batches, self._prompts = [], []",
         "test_trainer.py::test_an_interrupted_step_does_not_count_in_the_next_call"),
    ],
    "training/finite.py": [
        ("a loss that is not finite goes on", "values if norm is None else [*values, norm]", "[] if norm is None else [norm]",
         "test_finite.py::test_a_loss_alone_stops_the_run"),
        ("gradients changed after the norm are not read", "if not bad and self._gradients_may_have_changed():", "if False:",
         "test_finite.py::test_a_gradient_that_a_callback_makes_nan"),
        ("a skipped step moves the optimizer's state", "            parameter.grad = None", "            parameter.grad = torch.zeros_like(parameter)",
         "test_finite.py::test_a_skipped_step_moves_nothing_and_is_counted"),
        ("a bad norm spreads", "if max_norm > 0 and torch.isfinite(norm):", "if max_norm > 0:",
         "test_finite.py::test_a_gradient_of_the_backward_pass_is_named"),
    ],
    "training/stopping.py": [
        ("the clock does not save", "control.should_save = control.should_save or asked > 0", "pass",
         "test_stopping.py::test_save_seconds"),
        ("an evaluation that a signal left out is not made up", "        self.make_up_evaluation()", "        pass",
         "test_rare_settings.py::test_a_run_that_is_resumed_has_the_evaluations_of_one_that_never_stopped"),
        ("a stop inside an epoch evaluates", "            control.should_evaluate = control.should_save = False", "            pass",
         "test_rare_settings.py::test_a_run_that_is_resumed_has_the_evaluations_of_one_that_never_stopped"),
        ("a stop comes between two updates", "if state.global_step % self.args.num_iterations:", "if False:",
         "test_stopping.py::test_a_stop_waits_for_the_last_update_on_the_same_rollouts"),
    ],
    "runs/identity.py": [
        ("a run goes on with another bridge of one teacher", 'if name is None else f"bridge_content/{name}"', "",
         "test_several_bridges.py::test_a_resumed_run_names_the_bridge_that_has_changed"),
        ("teachers are known by their addresses", "{name: entry_in_words(entry) for name,", "{name: entry for name,",
         "test_several_teachers.py::test_a_run_whose_teachers_are_objects_of_a_script_can_be_resumed"),
        ("a run goes on with other responses", "file_digest(source.responses)", '""',
         "test_teacher_cache.py::test_a_run_does_not_go_on_with_other_responses"),
        ("another teacher is not noticed", '{"tokenizer": _tokenizer_digest(pair.tokenizer), "teacher": _teacher_digest(pair.teacher)}',
         '{"tokenizer": _tokenizer_digest(pair.tokenizer)}', "test_stopping.py::test_other_inputs_are_shown_and_refused"),
        ("answers do not count", 'found.update(repr(prompt.row.answer)', 'found.update(""',
         "test_stopping.py::test_other_answers_are_other_prompts"),
    ],
    "models/probe_logits.py": [
        ("any difference is rounding", "return difference <=", "return True or difference <=",
         "test_export_check.py::test_an_adapter_that_is_another_is_not_verified"),
    ],
    "models/architecture.py": [
        ("longrope has the whole context", 'rope.get("rope_type") != "longrope"', "True",
         "test_rare_models.py::test_with_longrope_the_context_ends_where_texts_begin_to_change_each_other"),
        ("vision towers stay trainable", "ids |= {id(p) for p in lm.parameters()}", "ids |= {id(p) for p in body.parameters()}",
         "test_layouts.py::test_frozen_is_exactly_what_gets_no_gradient"),
        ("a part that runs before the block is frozen", "before = called[: called.index(block)]", "before = []",
         "test_layouts.py::test_frozen_is_exactly_what_gets_no_gradient"),
    ],
    "models/fingerprint.py": [
        ("a changed value is not in the checksum", "int(bits.sum(dtype=torch.int64))", "0",
         "test_stopping.py::test_one_changed_value_changes_the_checksum"),
    ],
    "models/finite.py": [
        ("finite values whose sum overflows count", "    return int((~torch.isfinite(values)).sum())", "    return 1",
         "test_finite.py::test_counting"),
    ],
    "models/load_report.py": [
        ("unexpected weights are left out", "unexpected = sorted({*report[\"unexpected_keys\"]} - left_out, key=_natural)",
         "unexpected = []", "test_loading.py::test_it_is_refused_in_one_sentence"),
        ("any two heads pass", "sorted({*wanted} - {*model.all_tied_weights_keys})", "[]",
         "test_loading.py::test_it_is_refused_in_one_sentence"),
        ("what transformers cannot convert is not named", "source.setLevel(min(level, logging.WARNING))", "pass",
         "test_loading.py::test_transformers_own_report_is_not_printed_beside_ours_and_its_level_stays "
         "test_loading.py::test_it_is_refused_in_one_sentence"),
        ("buffers of older releases are refused", " or names & {*buffers})", ")",
         "test_loading.py::test_what_changes_nothing_is_loaded_without_a_word"),
    ],
    "models/folder_check.py": [
        ("cut weights pass", 'folder.glob("*.safetensors")', 'folder.glob("*.none")', "test_messages.py::test_the_message"),
        ("an old set of weights is read", "if (folder / _WHOLE).is_file() and _WHOLE not in shards:", "if False:",
         "test_loading.py::test_a_folder_that_cannot_be_right_is_refused_before_its_weights_are_read"),
        ("an unreadable generation config is left out", '_read(name, folder / "generation_config.json")', "pass",
         "test_loading.py::test_a_folder_that_cannot_be_right_is_refused_before_its_weights_are_read"),
    ],
    "models/adapters.py": [
        ("what an adapter lacks is random", "refuse_adapter(adapter.name, adapter.base, missing, unexpected)",
         "refuse_adapter(adapter.name, adapter.base, [], unexpected)", "test_adapters.py::test_it_is_refused_in_one_sentence"),
        ("the newest base model is taken", "asked or revision, hub", "asked, hub",
         "test_adapters.py::test_the_revision_of_its_base_is_loaded"),
        ("a continued adapter is frozen", "config.inference_mode = not trainable", "config.inference_mode = True",
         "test_adapters.py::test_it_is_loaded_as_peft_loads_it_and_goes_on"),
    ],
    "models/export_check.py": [
        ("logits are not compared", "if not is_rounding(off", "if False and is_rounding(off",
         "test_export_check.py::test_an_adapter_that_is_another_is_not_verified"),
        ("the config is not compared", "saved.get(key) != own.get(key)", "False",
         "test_export_check.py::test_a_whole_model_that_is_another_is_not_verified"),
        ("dropout stays on", "fork_rng(devices=devices), evaluating(model):", "fork_rng(devices=devices):",
         "test_export_check.py::test_the_check_leaves_model_and_random_numbers_as_they_are"),
    ],
    "models/saved.py": [
        ("a mixture resumes without its experts", "return not hasattr(model, \"peft_config\") and not is_laid_out_as_saved(causal_lm(model))",
         "return False", "test_export_check.py::test_a_mixture_of_experts_resumes_from_its_experts"),
    ],
    "models/tokens.py": [
        ("a stale end of the model config counts", "*named.get(GENERATION, named.get(MODEL, ()))",
         "*named.get(GENERATION, ()), *named.get(MODEL, ())",
         "test_models.py::test_the_generation_config_and_the_tokenizer_say_what_ends_a_text"),
    ],
    "training/metrics.py": [
        ("accuracy counts ungraded rollouts", 'totals["correct"] / totals["graded"]',
         'totals["correct"] / totals["rollouts"]', "test_trainer.py::test_metrics_are_what_happened"),
        ("a report counts the steps of the one before", "self._closed.clear()", "pass",
         "test_trainer.py::test_tensorboard_gets_every_metric"),
        ("clipped_ratio counts what ended", '1 - totals["finished"] / totals["rollouts"]',
         'totals["finished"] / totals["rollouts"]', "test_trainer.py::test_metrics_are_what_happened"),
        ("a count is a mean over ranks", "sums.pop(name) for name in _COUNTS if", "sums.pop(name) / 2 for name in _COUNTS if",
         "test_evaluate.py::test_answers_that_took_too_long_are_in_the_metrics_of_their_step"),
        ("ranks add up", "row = {n: v / ranks for n, v in sums.items()}", "row = dict(sums)",
         "test_distributed.py::test_two_processes_equal_one_with_twice_the_batch"),
    ],
    "training/rate_probe.py": [
        ("a rate starts where the one before ended", "        self._restore()\n        optimizer = self._optimizer(rate)",
         "        optimizer = self._optimizer(rate)", "test_rate_probe.py::test_the_losses_are_those_of_plain_pytorch"),
        ("the run starts where the probe ended", "        finally:\n            self._restore()", "        finally:\n            pass",
         "test_rate_probe.py::test_a_run_equals_one_with_the_number_and_resuming_does_not_probe"),
        ("held-out prompts are learnt from", "order[:held], order[held:]", "order[:held], order",
         "test_rate_probe.py::test_no_prompt_is_on_both_sides"),
        ("sampled tokens are judged on old rollouts", ' and not getattr(term.objective, "on_policy_only", False)', "",
         "test_rate_probe.py::test_terms_that_need_fresh_rollouts_are_left_out_and_named"),
    ],
    "runs/verdict.py": [
        ("any fall is worse", "change + spread < 0, change", "change < 0, change",
         "test_verdict.py::test_the_verdict_has_its_interval"),
    ],
    "training/alarm.py": [
        ("updates on the same rollouts count again", "if key not in _OF_ROLLOUTS} if again else row", "} if again else row",
         "test_alarm.py::test_only_graded_rollouts_count"),
        ("one step makes a loss rise", " or mean - lowest < _STANDARD_ERRORS * math.sqrt(variance + its_variance)", "",
         "test_verdict.py::test_noise_and_progress_do_not_ring"),
        ("cut-off completions do not count", 'elif totals["finished"] == 0:', 'elif totals["finished"] < 0:',
         "test_useless_steps.py::test_they_are_counted_from_the_first_step"),
        ("a useful step does not end the row", "self._in_a_row + 1 if self._reason else 0", "self._in_a_row + bool(self._reason)",
         "test_useless_steps.py::test_they_are_counted_from_the_first_step"),
        ("it rings at every step", "        if alarm:\n            rows.clear()\n", "",
         "test_alarm.py::test_it_waits_for_a_whole_window_and_is_quiet_for_one_after"),
        ("errors of two measurements add up", "(n * error) ** 2 for n, _, error in measured) / tokens**2",
         "n * error for n, _, error in measured) ** 2 / tokens**2",
         "test_alarm.py::test_worse_while_closer_rings"),
        ("the window never moves", "deque(maxlen=self.window)", "deque()",
         "test_alarm.py::test_a_log_of_any_length_is_read_once_and_a_window_of_it_is_kept"),
        ("a resumed run forgets that it has rung", "            self._judge(rows)\n\n", "            pass\n\n",
         "test_alarm.py::test_a_resumed_run_is_quiet_as_long_as_the_uninterrupted_one"),
    ],
    "training/processes.py": [
        ("two processes that never joined train on", "launched > 1 and accelerator.num_processes == 1",
         "launched > 2 and accelerator.num_processes == 1",
         "test_nodes.py::test_processes_that_do_not_work_together_are_refused"),
        ("every error of torch is a lost process", "isinstance(error, dist.DistError) or", "isinstance(error, RuntimeError) or",
         "test_nodes.py::test_other_errors_of_torch_are_no_lost_process"),
        ("a disk of one's own is not noticed", "0 if found == written else dist.get_rank() + 1", "0 if found else dist.get_rank() + 1",
         "test_nodes.py::test_nodes_that_do_not_share_the_folder_are_told_so"),
        ("a lost process is a bug", "or bool(_GLOO_PREFIX.match(str(error)))", "",
         "test_nodes.py::test_a_node_that_is_lost_ends_the_other_with_one_sentence"),
    ],
    "training/parallel.py": [
        ("accelerate's FSDP is not asked", "check_sharded(args, by)", "pass",
         "test_fsdp.py::test_what_fully_shard_refuses_accelerates_own_fsdp_refuses_too"),
        ("DeepSpeed's split is not asked", "deepspeed.zero_stage == 3", "False",
         "test_fsdp.py::test_a_teacher_cannot_follow_a_student_that_deepspeed_splits"),
        ("micro-batches of several teachers ask the first", "return [teacher_id for teacher_id, _ in found]",
         "return [found[0][0] for _ in found]",
         "test_several_teachers.py::test_routed_rows_learn_what_each_teacher_alone_would_teach"),
        ("a rank repeats one micro-batch at most", "[groups[-1][:1]] * missing]", "[groups[-1][:1]] * min(missing, 1)]",
         "test_fsdp.py::test_a_rank_repeats_one_rollout_until_it_has_as_many_micro_batches_as_any"),
        ("means are over one of the accumulated batches", "device=self.args.device) / share", "device=self.args.device)",
         "test_trainer.py::test_gradient_accumulation_equals_one_larger_batch"),
        ("nothing compared divides by zero", "StepTotals(*totals.clamp_min(1e-9).tolist())", "StepTotals(*totals.tolist())",
         "test_cross_tokenizer_training.py::test_where_nothing_is_compared_nothing_is_learnt"),
    ],
    "training/evaluator.py": [
        ("evaluated in full precision", "stack.enter_context(self.parallel.sampling_precision())", "pass",
         "test_evaluate.py::test_the_student_is_evaluated_in_the_precision_it_is_trained_in_and_another_model_in_its_own"),
        ("the teacher is evaluated with the student's prompts", "return self.model(model, theirs, engine)",
         "return self.model(model, prompts, engine)",
         "test_cross_tokenizer_training.py::test_the_teacher_is_evaluated_in_its_own_tokens"),
    ],
    "training/trainer.py": [
        ("the best model is not evaluated",
         "last[0] == now and not self.args.load_best_model_at_end",
         "last[0] == now", "test_resume.py::test_the_best_model_is_kept_and_loaded"),
        ("an evaluation of other problems is remembered",
         "        if eval_dataset is None:\n            self._last_evaluation",
         "        if True:\n            self._last_evaluation",
         "test_evaluate.py::test_the_last_evaluation_is_the_one_of_the_own_set"),
        ("a step counts in part", "share = len(inputs) / int(num_items_in_batch or len(inputs))", "share = 1.0",
         "test_trainer.py::test_gradient_accumulation_equals_one_larger_batch"),
        ("the shuffle ignores data_seed",
         "args.seed if args.data_seed is None else args.data_seed",
         "args.seed",
         "test_prompt_order.py::test_the_trainer_sees_each_steps_prompts_as_often_as_it_updates"),
    ],
    "runs/checkpoints.py": [
        ("a second save at a step is dropped",
         "        write_manifest(staged)\n", "        write_manifest(staged)\n        if final.exists():\n            return\n",
         "test_checkpoint.py::test_a_checkpoint_of_the_same_step_is_replaced"),
        ("generators are not restored", "set_random_state(json.loads(path.read_text()))", "json.loads(path.read_text())",
         "test_resume.py::test_resuming_after_step_k_ends_at_the_same_bits"),
        ("the bridge's digest is not in the checkpoint",
         '            write_json(staged / BRIDGE, {"sha256": self.bridge_digest})\n', "            pass\n",
         "test_bridge_training.py::test_a_resumed_run_ends_at_the_same_bits_and_wants_the_same_bridge"),
        ("numpy's generator is not restored", 'np.random.set_state(tuple(state["numpy"]))', "pass",
         "test_checkpoint.py::test_generators_go_on_where_they_were"),
        ("the oldest checkpoint is the newest", 'key=lambda p: -int(p.name.rsplit("-", 1)[1])',
         'key=lambda p: int(p.name.rsplit("-", 1)[1])',
         "test_checkpoint.py::test_newest_means_the_highest_step_that_verifies"),
        ("a bridge where there was none is accepted", "    if before != digest:",
         "    if before is not None and before != digest:",
         "test_bridge_training.py::test_a_run_does_not_change_between_a_bridge_and_none"),
        ("a damaged checkpoint stops the search",
         '            logger.warning("skipping %s: %s", folder.name, error)\n            continue',
         '            logger.warning("skipping %s: %s", folder.name, error)\n            break',
         "test_checkpoint.py::test_newest_means_the_highest_step_that_verifies"),
        ("scalars of an optimizer are lost", '{int(i): dict(entries) for i, entries in rest["scalars"].items()}', "{}",
         "test_checkpoint.py::test_an_optimizers_state_that_is_no_tensor_is_kept"),
    ],
    "runs/rewards.py": [
        ("the reward at the end is that at the start", "_mean(values[-few:])", "_mean(values[:few])",
         "test_rewards_in_words.py::test_the_change_of_each_reward_is_that_between_the_ends_of_the_run"),
    ],
    "tools/report/distances.py": [
        ("the teacher's token at a place is that of another", ".argmax(-1)", ".argmin(-1)",
         "test_report.py::test_the_teachers_token_is_the_likeliest_of_its_own_logits"),
    ],
    "runs/folder.py": [
        ("parts after the step that is resumed from stay", 'if part["step"] < resumed["step"]]', "]",
         "test_stopping.py::test_every_setting_that_may_change_is_said_with_its_old_and_new_value"),
        ("the step that is resumed from is cut off", 'and at <= step',
         'and at < step',
         "test_resume.py::test_going_back_puts_later_checkpoints_aside_and_other_runs_are_refused"),
    ],
    "runs/jsonl.py": [
        ("a line without its end is read", 'if not text.endswith(b"\\n"):\n                found.cut = True\n                break', "pass",
         "test_jsonl.py::test_damaged_lines_are_left_out_counted_and_said_once_with_file_and_line"),
        ("damage is not said", "if damage is None and (sentences", "if damage is not None and (sentences",
         "test_jsonl.py::test_damaged_lines_are_left_out_counted_and_said_once_with_file_and_line"),
    ],
    "runs/columns.py": [
        ("a picture loses its peaks", "part.argmax()", "part.argmin()",
         "test_columns.py::test_few_points_keep_the_ends_and_the_peaks"),
    ],
    "files.py": [
        ("a kill between two renames loses a folder",
         "    replaced = path.with_name(_REPLACED + path.name)", "    replaced = path.with_name(PARTIAL + path.name)",
         "test_checkpoint.py::test_a_kill_between_the_renames_that_replace_a_checkpoint_loses_nothing"),
        ("files are not flushed before the manifest", "        fsync(path)\n", "",
         "test_checkpoint.py::test_files_are_on_the_disk_before_the_manifest_that_lists_them"),
        ("a changed file verifies", "if file_digest(path) != digest:", "if False:",
         "test_checkpoint.py::test_every_flipped_bit_of_a_file_is_seen"),
        ("the folder's entries are not flushed", "            fsync(path.parent)\n    finally:\n        temporary", "    finally:\n        temporary",
         "test_checkpoint.py::test_files_are_on_the_disk_before_the_manifest_that_lists_them"),
    ],
    "resolve/run.py": [
        ("states of other tokens are compared", "and (teacher_id not in aligners or aligners[teacher_id].same_ids)", "",
         "test_cross_tokenizer_training.py::test_states_of_other_tokens_are_not_compared_though_the_shapes_agree"),
        ("the loss does not know the temperature of the sampling", "        temperature=args.temperature,\n", "",
         "test_objectives_in_training.py::test_grpo_equals_plain_pytorch_and_does_not_ask_the_teacher"),
        ("models of another shape are not refused",
         "if compares_states(terms) and not projected and run.args.layer_map is None:", "if False:",
         "test_bridge_training.py::test_without_a_bridge_shapes_must_agree"),
    ],
    "resolve/student.py": [
        ("each adapter starts elsewhere", "set_seed(args.seed)  # the adapter's", "pass  # the adapter's",
         "test_lora.py::test_the_same_seed_starts_the_same_adapter"),
        ("nothing above the highest layer is frozen", "freeze_above(model, info.layers if head else layers[-1], head=head)",
         "freeze_above(model, info.layers, head=head)", "test_lora.py::test_layers_above_the_top_one_train_no_adapter"),
    ],
    "resolve/terms.py": [
        ("the representation fades in", 'weight, "out")', 'weight, "in")',
         "test_objectives_in_training.py::test_a_composite_equals_plain_pytorch"),
        ("the weight forgets how far the target lies", "args.extrapolation**-2", "1.0",
         "test_extrapolation.py::test_the_first_loss_does_not_depend_on_lambda"),
    ],
    "resolve/datasets.py": [
        ("evaluation prompts have the room of training", "args.eval_sampling if evaluated else args.sampling",
         "args.sampling", "test_evaluate.py::test_an_evaluation_needs_room_for_completions_of_its_own_length"),
    ],
    "run_config.py": [
        ("a key without a value is a flag", 'elif not equals and _may_be_flag(key.replace("-", "_")):', "elif not equals:",
         "test_keys.py::test_a_key_without_a_value_is_refused_unless_it_is_a_flag"),
        ("a limit of 0 is accepted", "and value < 1:", "and value < 0:", "test_recipe.py::test_bad_settings_are_refused"),
    ],
    "data/control_tokens.py": [
        ("a message writes control tokens", 'lambda match: f"{_BEGIN}{match[0]}{_END}"', "lambda match: match[0]",
         "test_control_tokens.py::test_only_the_template_writes_control_tokens"),
        ("a template that depends on the text is not noticed", 'replace(_END, "") != plain:',
         'replace(_END, "") is None:', "test_control_tokens.py::test_what_cannot_be_kept_apart_is_refused_with_the_row"),
        ("a Unigram vocabulary keeps the names", "[[names.get(word, word), score] for", "[[word, score] for",
         "test_control_tokens.py::test_a_token_of_a_unigram_vocabulary_is_not_found_in_text"),
        ("only special tokens are control tokens", "{name for name in others - words if name in written}", "set()",
         "test_control_tokens.py::test_which_added_tokens_are_control_tokens"),
        ("private characters of a text are control tokens", "if found := _PRIVATE.search(text):", "if found := None:",
         "test_control_tokens.py::test_what_cannot_be_kept_apart_is_refused_with_the_row"),
    ],
    "data/chat_template.py": [
        ("an open turn is closed and a new one begun", 'goes_on = messages[-1]["role"] == "assistant"', "goes_on = False",
         "test_chat_template.py::test_an_assistants_last_turn_is_left_open"),
        ("a template that leaves a message out passes", "    if place is None:\n        return\n    role", "    if True:\n        return\n    role",
         "test_chat_template.py::test_a_template_that_leaves_out_what_a_message_says_is_refused"),
        ("a missing generation prompt passes", "    if not opening or opening.isspace():", "    if True:",
         "test_chat_template.py::test_only_a_template_that_leaves_out_the_words_of_a_turn_is_refused"),
        ("the clock is read at each rendering", "    if date is None or not prints_date(tokenizer, kwargs):", "    if True:",
         "test_chat_template.py::test_a_date_is_printed_as_transformers_prints_todays"),
    ],
    "data/prompts.py": [
        ("plain prompts always write control tokens", "if self.split_special_tokens and control_token is not None:",
         "if False:", "test_control_tokens.py::test_a_plain_prompt_keeps_the_start_that_its_tokenizer_writes"),
    ],
    "alignment/token_bytes.py": [
        ("a student writes the marks of a turn", "unwritten = special | {*control_token_ids(tokenizer).values()}",
         "unwritten = special", "test_control_tokens.py::test_marks_of_a_turn_that_are_not_special_are_not_written_by_a_student"),
    ],
    "data/order.py": [
        ("the steps of a teacher come in a row", "for number in torch.randperm(len(steps), generator=generator).tolist():",
         "for number in range(len(steps)):",
         "test_several_teachers.py::test_the_steps_of_the_teachers_are_shuffled_by_seed_and_epoch"),
        ("neighbouring seeds share epochs", "seed * 1_000_003 + epoch", "seed + epoch",
         "test_prompt_order.py::test_each_epoch_and_each_seed_has_an_order_of_its_own"),
        ("an epoch ends with a partial step", "range(0, len(order) - self.prompts_a_step + 1, self.prompts_a_step)",
         "range(0, len(order), self.prompts_a_step)",
         "test_prompt_order.py::test_each_step_is_repeated_and_no_prompt_comes_twice"),
    ],
    "data/compact.py": [
        ("a row takes the one before with it", "self._text[self._ends[index] : self._ends[index + 1]]", "self._text[self._ends[index - 1] : self._ends[index + 1]]",
         "test_compact.py::test_values_come_back_as_they_were"),
    ],
    "data/rows.py": [
        ("a response is part of its prompt", 'if whole and messages[-1]["role"] == "assistant":', "if False:",
         "test_data.py::test_layouts_of_others"),
        ("messages as text are one message", "        if inner is None:\n            return value", "        if True:\n            return value",
         "test_data.py::test_layouts_of_others"),
        ("of two equal keys the last counts", "    if len(found) < len(pairs):", "    if False:",
         "test_data.py::test_what_jsonl_is_not_is_said_with_the_line_and_the_mend"),
        ("blank lines are not counted", "for number, line in enumerate(file, start=1):\n            if line.strip():", "for number, line in enumerate((l for l in file if l.strip()), start=1):\n            if line:",
         "test_data.py::test_jsonl_keeps_order_duplicates_and_line_numbers"),
        ("half of a surrogate pair passes", "        text.encode()\n", "        text.encode(errors=\"replace\")\n",
         "test_data.py::test_half_a_surrogate_pair_is_refused_by_name"),
    ],
    "data/contamination.py": [
        ("a phrase of every test problem is rare", "_rarity(np.bincount(test_ids, minlength=len(distinct)), len(test)),",
         "_rarity(np.bincount(ids, minlength=len(distinct)), len(train)),",
         "test_contamination.py::test_a_phrase_that_every_problem_of_one_set_has_makes_no_match"),
        ("shingles of four words", "SHINGLE_WORDS = 5", "SHINGLE_WORDS = 4",
         "test_contamination.py::test_shingles_by_hand"),
        ("short problems are judged", "not (short[1][index] or short[0][row])", "True",
         "test_contamination.py::test_generated_sums_are_too_short_to_judge"),
        ("signs are content", "sum(word[0].isalnum() for word in set(words) - stock)", "len(set(words) - stock)",
         "test_contamination.py::test_a_problem_is_judged_from_eight_content_words_on"),
        ("what every problem says is content", "set(words) - stock", "set(words)",
         "test_contamination.py::test_words_of_most_problems_are_no_content"),
    ],
    "runs/model_card.py": [
        ("a lost gap is called closed", "    if closed < 0:\n", "    if closed < -1:\n",
         "test_model_card.py::test_a_run_that_did_harm_says_so"),
        ("the teacher's responses are called the student's", 'return sum(bounds(settings.get("lmbda", 1.0))) / 2', "return 1.0",
         "test_model_card.py::test_the_card_names_what_was_done"),
        ("a card without OPRD's loss names the paper", 'settings.get("representation_weight", 1.0) == 0',
         'settings.get("representation_weight", 1.0) is None', "test_model_card.py::test_the_card_names_what_was_done"),
        ("intervals that overlap are not mentioned", "before[1] < after[0] or", "before[0] < after[0] or",
         "test_model_card.py::test_intervals_that_overlap_are_said"),
    ],
    "runs/pictures.py": [
        ("names at the ends of lines stay on each other", "moved.append(max(middle, least))", "moved.append(middle)",
         "test_picture_style.py::test_texts_that_are_apart_stay"),
        ("names leave the panel", "moved[index] = min(moved[index], limit - sizes[index] / 2)", "moved[index] = moved[index]",
         "test_picture_style.py::test_texts_that_are_apart_stay"),
        ("names may be formulas", '"text.parse_math": False,', '"text.parse_math": True,',
         "test_picture_style.py::test_names_with_a_dollar_are_no_formulas"),
    ],
    "tasks/answer_formats.py": [
        ("answers are not checked before the start", "    if task.check_answer is not None:\n", "    if False:\n",
         "test_answer_formats.py::test_an_answer_that_cannot_be_used_is_refused_with_a_remedy"),
        ("answers are graded as they are written", 'if answer_format in (None, "plain"):', "if True:",
         "test_answer_formats.py::test_a_parsed_answer_is_what_is_graded"),
    ],
    "tasks/measures.py": [
        ("the last n-gram is missing", "len(ids) - n + 1)", "len(ids) - n)",
         "test_measures.py::test_distinct_n_counts_over_all_responses_of_a_problem"),
        ("the best sample of all problems", ".max(axis=1)", ".max(axis=0)",
         "test_measures.py::test_avg_and_best_on_a_hand_computed_case"),
        ("an interval of twice the error", "[(1 - confidence) / 2, (1 + confidence) / 2]", "[1 - confidence, confidence]",
         "test_measures.py::test_bootstrap_matches_a_plain_loop"),
        ("accuracy of all is that of the finished", "if s.finished and s.correct is not None]", "if s.correct is not None]",
         "test_measures.py"),
    ],
    "tasks/evaluation.py": [
        ("samples of a problem are those of others", "model * samples + start + sample", "start * len(parts) + model * k + sample",
         "test_several_teachers.py::test_where_all_teachers_answer_a_problem_it_counts_once"),
        ("parts of ranks are joined in the wrong order", "place: start + number * k", "place: start + number",
         "test_evaluate.py::test_parts_of_ranks_come_back_in_the_order_of_the_problems"),
        ("verdicts move up where an answer is missing", "zip(gradable, graded, strict=True)", "enumerate(graded)",
         "test_evaluate.py::test_rows_without_an_answer_are_not_graded"),
        ("a closed grader is used again", "            stack.callback(self._closed)\n", "",
         "test_evaluate.py::test_a_grader_is_opened_once_at_a_time_and_anew_after_it_was_closed"),
    ],
    "children.py": [
        ("a killed parent leaves its busy child", " | os.O_ASYNC", "",
         "test_children.py::test_workers_end_while_they_evaluate_hostile_answers"),
        ("a parent that is dead already is waited for", "if lifeline.poll():", "if False:",
         "test_children.py::test_a_child_whose_parent_is_dead_already_ends_at_once"),
        ("a program's group goes on", "-process.pid if options", "process.pid if options",
         "test_children.py::test_a_program_ends_with_its_group"),
    ],
    "tasks/grading.py": [
        ("a hostile answer is checked in each step", "self.cache.put(self._key(pair), verdict)", "pass",
         "test_grading.py::test_a_pair_is_checked_once_however_it_ended"),
        ("a batch has no limit", "return self._slow_s >= self._limit_s", "return False",
         "test_grading.py::test_a_batch_of_hostile_answers_is_bounded_and_what_it_does_not_reach_is_checked_later"),
        ("what a batch reaches depends on the workers", "in self.pairs[: self._reached]}",
         "in self.pairs if pair in self._found}",
         "test_grading.py::test_a_batch_of_hostile_answers_is_bounded_and_what_it_does_not_reach_is_checked_later"),
        ("ordinary answers use up the limit", "seconds if seconds > _ORDINARY_S else 0.0", "seconds",
         "test_grading.py::test_ordinary_answers_do_not_use_up_the_limit_of_a_batch"),
    ],
    "tasks/answers/algebra.py": [
        ("tiny numbers are alike", "relative * max(abs(first), abs(second))", "relative",
         "test_answers.py::test_every_pair_of_the_table_is_judged_as_it_says"),
        ("R and r are one radius", "keep_case = _both_cases(answer) or _both_cases(truth)\n        a, t", "keep_case = False\n        a, t",
         "test_answers.py::test_every_pair_of_the_table_is_judged_as_it_says"),
    ],
    "tasks/answers/comparison.py": [
        ("a tuple may be swapped", "return self._in_order(answer.items, truth.items)\n\n    def _vector",
         "return self._in_any_order(answer, truth)\n\n    def _vector",
         "test_answers.py::test_every_pair_of_the_table_is_judged_as_it_says"),
        ("an open interval is a closed one", "if answer.text != truth.text or not _may_be_one_name", "if not _may_be_one_name",
         "test_answers.py::test_every_pair_of_the_table_is_judged_as_it_says"),
    ],
    "tasks/answers/words.py": [
        ("anagrams are one word", "        return a == t\n    words, other", "        return sorted(''.join(a)) == sorted(''.join(t))\n    words, other",
         "test_answers.py::test_every_pair_of_the_table_is_judged_as_it_says"),
        ("a base is left out", 'return number[1] == 10 and other', "return other",
         "test_answers.py::test_every_pair_of_the_table_is_judged_as_it_says"),
    ],
    "tasks/near_misses.py": [
        ("an answer without a box is no near miss", "_boxed(response) or response.strip()", '_boxed(response) or ""',
         "test_answers.py::test_near_misses_are_counted_and_the_first_kept"),
        ("a formula is markup", "if _MEANING.fullmatch(match[1]) else", "if False else", "test_answers.py::test_near_miss"),
    ],
    "tasks/grading_worker.py": [
        ("a worker without a pool goes on", "_kill_after(timeout_s + 1.0)", "_kill_after(0.0)",
         "test_grading.py::test_a_worker_whose_pool_is_gone_ends_itself"),
        ("only new files are refused", 'set("wax+")', 'set("w")',
         "test_grading.py::test_the_guard_refuses_each_way_out_and_lets_files_be_read"),
        ("programs and the network are allowed", ', "pty.spawn", "subprocess", "socket")', ', "pty.spawn")',
         "test_grading.py::test_the_guard_refuses_each_way_out_and_lets_files_be_read"),
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One bug.

    Args:
        file: below `src/oprd`.
        name: what is wrong.
        old: text that occurs once in the file.
        new: text in its place.
        tests: files or node ids below `tests/` that must notice.
    """

    file: str
    name: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def label(self) -> str:
        """File and name."""
        return f"{self.file}: {self.name}"

    def problems(self, root: Path = ROOT) -> list[str]:
        """Why it does not fit the code; empty if it does."""
        path = root / SOURCE / self.file
        if not path.is_file():
            return [f"{self.label}: there is no file {path.relative_to(root)}"]
        found = []
        if (count := path.read_text().count(self.old)) != 1:
            found.append(f"{self.label}: the old text occurs {count} times: {self.old!r}")
        if self.old == self.new:
            found.append(f"{self.label}: it changes nothing")
        for test in self.tests:
            file, _, name = test.partition("::")
            path = root / "tests" / file
            if not path.is_file() or (name and f"def {name}(" not in path.read_text()):
                found.append(f"{self.label}: there is no test {test}")
        return found


MUTANTS = tuple(
    Mutant(file, name, old, new, tuple(tests.split()))
    for file, entries in TABLE.items()
    for name, old, new, tests in entries
)


@dataclass(frozen=True)
class Run:
    """Tests to run on a copy, with a mutant in it or without."""

    tests: Sequence[str]
    mutant: Mutant | None = None


@dataclass
class Child:
    """A fork that runs tests.

    Args:
        run: what it runs.
        tree: the copy that it runs in.
        started: on the monotonic clock.
        seconds: that it took, once it has ended.
        timed_out: whether it was ended.
        passed: whether its tests passed.
        output: of pytest.
    """

    run: Run
    tree: Path
    started: float
    seconds: float = 0.0
    timed_out: bool = False
    passed: bool = False
    output: str = ""

    @property
    def noticed_by(self) -> str:
        """The test that failed first, as pytest's last lines say it."""
        found = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", self.output, flags=re.MULTILINE)
        return found[1] if found else "a run that ended without a report"


def execute(runs: Sequence[Run], trees: Sequence[Path]) -> Iterator[Child]:
    """Run all, one in each tree at a time. Yields each when it has ended."""
    waiting, free = list(enumerate(runs, 1)), list(trees)
    children: dict[int, Child] = {}
    try:
        while waiting or children:
            while waiting and free:
                number, run = waiting.pop(0)
                tree = free.pop(0)
                if run.mutant is not None:
                    insert(run.mutant, tree, number)
                children[fork(run, tree)] = Child(run, tree, time.monotonic())
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                for late, child in children.items():
                    if child.run.mutant is not None and time.monotonic() - child.started > SECONDS:
                        child.timed_out = True
                        stop(late)
                time.sleep(0.02)
                continue
            child = children.pop(pid)
            stop(pid)  # what its tests may have left running
            child.seconds = time.monotonic() - child.started
            child.passed = os.waitstatus_to_exitcode(status) in (0, NO_TEST)
            child.output = (child.tree / "output.txt").read_text(errors="replace")
            if child.run.mutant is not None:
                remove(child.run.mutant, child.tree)
            free.append(child.tree)
            yield child
    finally:
        for pid in children:
            stop(pid)


def insert(mutant: Mutant, tree: Path, number: int) -> None:
    """Put a mutant into a copy. Its time is its number, so that Python's cache never takes one mutant for another."""
    path = tree / SOURCE / mutant.file
    path.write_text(path.read_text().replace(mutant.old, mutant.new))
    os.utime(path, (number, number))


def remove(mutant: Mutant, tree: Path) -> None:
    """Take a mutant out of a copy."""
    shutil.copy2(tree / "pristine" / mutant.file, tree / SOURCE / mutant.file)


def fork(run: Run, tree: Path) -> int:
    """Run tests in a child process, in a session of its own; returns its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.setsid()
        os.chdir(tree)
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number, descriptor in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
            os.dup2(descriptor, number)
        sys.path.insert(0, str(tree / "src"))
        os.environ["PYTHONPATH"] = str(tree / "src")
        import pytest

        options = [
            "-x",
            "-q",
            "--tb=line",
            "--timeout=0",
            "-m",
            "",
            "-p",
            "no:cacheprovider",
            f"--basetemp={tree / 'basetemp'}",
        ]
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins that are imported already
        code = int(pytest.main([*options, *(f"tests/{test}" for test in run.tests)]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def stop(pid: int) -> None:
    """End a child and everything that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def copy_tree(tree: Path) -> Path:
    """A copy of the code and its tests."""
    tree.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name)
        else:
            shutil.copy2(ROOT / name, tree / name)
    shutil.copytree(ROOT / SOURCE, tree / "pristine", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    return tree


def preload() -> None:
    """Import what tests import, except oprd."""
    os.environ.update(ENVIRONMENT)
    sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "scripts"]
    for name in PRELOADED:
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    assert "oprd" not in sys.modules, "a fork would test the code that is imported here, not its copy"
    gc.freeze()  # no collection in a fork walks through the libraries


def check_tests(mutants: Sequence[Mutant], trees: Sequence[Path]) -> bool:
    """Whether the tests of these mutants pass without any of them; says which do not."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    parts = [Run(tests[start :: len(trees)]) for start in range(min(len(trees), len(tests)))]
    sound = True
    for child in execute(parts, trees):
        print(f"without a mutant: {'passed' if child.passed else 'FAILED'} ({child.seconds:.0f} s)", flush=True)
        if not child.passed:
            print(child.output[-4000:])
        sound = sound and child.passed
    return sound


def run_mutants(mutants: Sequence[Mutant], jobs: int) -> int:
    """Run mutants and print what became of each; returns the exit status."""
    survivors = []
    with tempfile.TemporaryDirectory(prefix="oprd-mutants-") as folder:
        trees = [copy_tree(Path(folder).resolve() / str(number)) for number in range(min(jobs, len(mutants)))]
        if not check_tests(mutants, trees):
            return 2
        for child in execute([Run(m.tests, m) for m in mutants], trees):
            assert child.run.mutant is not None, "each of these runs has one"
            if child.passed or child.timed_out:  # a slow or paused machine must not look like a test that fails
                survivors.append(child.run.mutant)
                word = "TOO SLOW " if child.timed_out else "SURVIVED "
                print(f"{word} {child.run.mutant.label} ({child.seconds:.0f} s)", flush=True)
            else:
                print(f"killed    {child.run.mutant.label} ({child.seconds:.0f} s, {child.noticed_by})", flush=True)
    share = 1 - len(survivors) / len(mutants)
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} mutants killed: {share:.1%}")
    for mutant in survivors:
        print(f"  not killed: {mutant.label}")
    return 0 if share >= WANTED else 1


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="mutants to run; repeatable")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="mutants at a time (default 2)")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    options = parser.parse_args()
    patterns = [f"*{pattern}*" for pattern in options.only or ["*"]]
    chosen = [mutant for mutant in MUTANTS if any(fnmatch(mutant.label, pattern) for pattern in patterns)]
    if options.list:
        print("\n".join(mutant.label for mutant in chosen))
        return 0
    if not chosen or options.jobs < 1:
        parser.error("no mutant matches" if not chosen else "--jobs must be at least 1")
    if problems := [problem for mutant in chosen for problem in mutant.problems()]:
        print("\n".join(problems), file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are ended and copies removed
    preload()
    return run_mutants(chosen, options.jobs)


if __name__ == "__main__":
    sys.exit(main())
