"""Each row of the tables in README.md and docs/migration.md names the tests that fail without it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# By document, the first cell of each row. Tests of Python without the folder and the ending, of Rust by their path.
CLAIMS = {
    "README.md": {
        # The three programs.
        "[`examples/float16.py`](examples/float16.py)": """
            test_examples::test_an_example_is_the_seed_but_for_imports_and_accelerator
            test_arguments::test_each_compression_shrinks_what_it_names""",
        "[`examples/size_adaptive.py`](examples/size_adaptive.py)": """
            test_examples::test_an_example_is_the_seed_but_for_imports_and_accelerator
            test_compression::test_adaptive_rules_choose_by_size_role_and_key""",
        "[`examples/powersgd.py`](examples/powersgd.py)": """
            test_examples::test_an_example_is_the_seed_but_for_imports_and_accelerator
            test_arguments::test_the_factory_of_the_gradient_averager_is_used""",
        # What works with what.
        "16-bit mixed precision": """
            test_lightning_strategy::test_alone_equals_plain_lightning
            test_lightning_options::test_the_users_scaler_works_and_is_kept
            test_lightning_options::test_a_scaler_and_reused_buffers_are_refused
            test_precision::test_one_peers_overflow_does_not_skip_the_others""",
        "bf16": """
            test_lightning_strategy::test_alone_equals_plain_lightning
            test_lightning_peers::test_every_way_to_join""",
        "gradient accumulation": "test_lightning_strategy::test_accumulation_equals_plain_lightning",
        "gradient clipping": """
            test_lightning_strategy::test_alone_equals_plain_lightning
            test_lightning_options::test_two_peers_clip_their_average""",
        "schedulers": """
            test_lightning_strategy::test_schedulers_count_shared_epochs
            test_lightning_strategy::test_a_scheduler_counts_shared_epochs_whatever_its_interval
            test_lightning_strategy::test_resuming_equals_never_having_stopped
            test_schedules::test_two_peers_are_one_process""",
        "`ReduceLROnPlateau`": """
            test_lightning_strategy::test_reduce_on_plateau
            test_lightning_roster::test_all_peers_take_the_writers_rate_at_the_same_epoch""",
        "frozen parameters, parameter groups": """
            test_lightning_strategy::test_frozen_parameters_and_groups
            test_precision::test_frozen_parameters_and_groups
            test_precision::test_what_was_frozen_at_first_stays_so""",
        "checkpoints, `ckpt_path`": """
            test_lightning_strategy::test_resuming_equals_never_having_stopped
            test_lightning_strategy::test_a_checkpoint_opens_in_plain_lightning""",
        "writing checkpoints and logs": """
            test_lightning_peers::test_every_way_to_join
            test_lightning_peers::test_a_survivor_goes_on_and_writes
            test_lightning_peers::test_writer_can_be_set
            test_lightning_roster::test_told_otherwise""",
        "early stopping, validation, callbacks": """
            test_lightning_strategy::test_callbacks_loggers_and_early_stopping
            test_lightning_strategy::test_validation_and_prediction_need_no_run
            test_lightning_options::test_who_stops_early_leaves_and_the_others_go_on""",
        "shuffling": "test_lightning_options::test_who_joins_shuffles_in_an_order_of_its_own",
        "Lightning's versions": """
            test_readme::test_the_versions_of_lightning_are_those_that_make_test_installs
            test_lightning_strategy::test_either_package_when_both_are_imported
            test_lightning_strategy::test_alone_equals_plain_lightning""",
        "several optimizers, LBFGS": "test_lightning_strategy::test_several_optimizers_and_lbfgs_are_refused",
        "`devices` > 1, `num_nodes` > 1, `sync_batchnorm`": "test_lightning_strategy::test_refused_with_a_reason",
        "overlap of network and training": """
            test_lightning_strategy::test_work_beside_the_training
            test_policies::test_a_delayed_step_is_plain_torch_with_gradients_of_before
            test_policies::test_state_averaging_does_not_disturb_equal_peers""",
        "notebooks, `spawn`, `DataLoader` workers": """
            test_lightning_manners::test_a_notebook
            test_lightning_manners::test_a_spawned_child
            test_lightning_manners::test_a_script_without_a_guard_and_with_workers
            test_manners::test_a_notebook
            test_manners::test_a_spawned_child
            test_manners::test_a_script_without_a_guard_and_with_workers""",
        # Other imports.
        "`import hivemind`": """
            test_names::test_names_are_at_their_module_or_in_the_guide
            test_names::test_arguments_have_their_names_order_and_defaults""",
        "`from hivemind import Float16Compression` (never worked)": """
            test_package::test_compressions_are_importable_without_torch""",
        "`from hivemind.optim.power_sgd_averager import …`": """
            test_names::test_names_are_at_their_module_or_in_the_guide""",
        "`from lightning_hivemind.strategy import HivemindStrategy`": """
            test_names::test_arguments_have_their_names_order_and_defaults
            test_compat::test_lightning_hivemind""",
        # What behaves differently.
        "the printed way to join": """
            test_examples::test_an_example_is_joined_by_pasting_what_it_prints
            test_lightning_joining::test_the_printed_forms_are_read_back""",
        "`matchmaking_time` and other timing arguments": """
            test_arguments::test_timing_arguments_are_neither_waited_for_nor_deadlines
            test_dht::test_hiveminds_clocks_are_accepted""",
        "an argument that cannot have an effect": """
            test_arguments::test_options_that_could_have_no_effect_are_refused
            test_dht::test_an_option_that_cannot_have_an_effect_says_so
            test_lightning_joining::test_an_option_without_effect_is_refused
            test_lightning_joining::test_a_misspelled_variable_is_an_error
            test_lightning_strategy::test_refused_with_a_reason""",
        '`precision="16-mixed"`, `ReduceLROnPlateau`, `accumulate_grad_batches`': """
            test_lightning_strategy::test_alone_equals_plain_lightning
            test_lightning_strategy::test_reduce_on_plateau
            test_lightning_strategy::test_accumulation_equals_plain_lightning""",
        "`delay_*` and offloading": """
            test_lightning_strategy::test_work_beside_the_training
            test_lightning_options::test_the_users_scaler_works_and_is_kept
            test_lightning_options::test_an_offloaded_optimizer_resumes""",
        "clipping": "test_lightning_options::test_two_peers_clip_their_average",
        "checkpoints and logs": "test_lightning_peers::test_every_way_to_join",
        "a killed peer": """
            crates/averaging/tests/membership.rs::killed_frozen_and_vanished_peers_are_out_of_every_view_within_three_seconds
            test_lost_peers::test_a_peer_killed_in_a_round_is_left_out_of_it""",
        "processes of a peer": """
            test_lightning_manners::test_ctrl_c_once_ends_a_training
            test_lightning_manners::test_kill_9_leaves_nothing_and_the_same_command_goes_on
            test_manners::test_kill_9_leaves_nothing_and_the_same_command_goes_on""",
    },
    "docs/migration.md": {
        "timing arguments decide": "test_arguments::test_timing_arguments_are_neither_waited_for_nor_deadlines",
        "processes, pipes": "test_manners::test_kill_9_leaves_nothing_and_the_same_command_goes_on",
        "`delay_state_averaging=True` also": """
            test_arguments::test_options_that_could_have_no_effect_are_refused
            test_arguments::test_state_is_averaged_beside_the_training_unless_told_otherwise""",
        "an argument without effect": """
            test_arguments::test_options_that_could_have_no_effect_are_refused
            test_optimizer::test_arguments_without_an_effect_are_errors""",
        "`averager_opts` reach": "test_arguments::test_options_that_could_have_no_effect_are_refused",
        "`load_state_compression` changes": """
            test_arguments::test_a_state_download_travels_compressed
            test_arguments::test_a_state_that_a_scheme_cannot_express_travels_as_it_is
            test_arguments::test_state_averaging_removes_what_rounding_did_to_a_newcomer""",
        "`performance_ema_alpha`": "test_arguments::test_timing_arguments_are_neither_waited_for_nor_deadlines",
        "only `hivemind.GradScaler": """
            test_precision::test_gradient_scalers
            test_precision::test_a_scaler_given_to_step_unscales_and_skips
            test_precision::test_a_scaler_and_reused_buffers_are_refused
            test_precision::test_float16_parameters_with_potlucks_scaler""",
        "`scheduler=` must": """
            test_arguments::test_a_schedulers_class_is_a_function_of_the_optimizer
            test_arguments::test_a_schedule_is_that_of_the_given_optimizer
            test_schedules::test_a_plateau_is_one_of_the_mean_loss
            test_schedules::test_a_silent_peer_does_not_count_as_a_loss_of_zero
            test_losses::test_an_accelerator_is_waited_for_once_an_epoch""",
        "clipping works": """
            test_precision::test_gradient_scalers
            test_precision::test_clipping_what_everybody_averaged
            test_precision::test_the_docstrings_hook_clips_what_is_applied""",
        "`param_groups` of an offloaded": """
            test_precision::test_groups_of_an_offloaded_optimizer_are_the_models
            test_torch_habits::test_the_state_is_found_by_the_groups_parameters""",
        "a parameter that is unfrozen": "test_precision::test_what_was_frozen_at_first_stays_so",
        "a parameter that no loss touched": """
            test_precision::test_a_parameter_that_no_loss_touches_stands_still
            test_untouched::test_it_is_touched_if_anybodys_loss_touched_it""",
        "a batch without gradients": "test_precision::test_a_skipped_batch_has_no_samples",
        "a checkpoint during": "test_checkpoints::test_a_checkpoint_during_a_delayed_step_is_whole",
        '`state_dict()["state"]["local_epoch"]`': "test_checkpoints::test_the_schedule_goes_on_where_it_was",
        "an older checkpoint": "test_checkpoints::test_an_older_checkpoint_is_refused",
        "a delayed gradient average": """
            test_policies::test_a_delayed_step_is_plain_torch_with_gradients_of_before
            test_policies::test_gradients_gathered_during_a_slow_step_do_not_change_it""",
        "`PerTensorCompression` raises": """
            test_compression::test_adaptive_rules_choose_by_size_role_and_key
            test_arguments::test_a_rule_for_a_tensor_that_there_is_not_is_refused""",
        "`allow_state_sharing=True`": """
            test_averager_options::test_a_peer_that_only_dials_out_is_a_member
            test_averager_options::test_an_auxiliary_peer_helps_and_keeps_its_tensors""",
        "`initialize_optimizer_state_`": "test_state_averager::test_an_initialized_optimizer_steps_as_a_new_one",
        "`TrainingStateAverager(reuse_tensors=False)`": """
            test_state_averager::test_arguments_that_cannot_have_an_effect_say_why
            test_state_averager::test_the_schedule_follows_the_epochs""",
        "`Optimizer.state_averager`": "test_torch_habits::test_what_holds_the_state_is_the_optimizer_itself",
        "`RSASignatureValidator`": "test_validators::test_only_the_owner_writes_under_its_key",
        "validators run": "test_validators::test_peers_sign_and_check_what_they_share",
        "`gather` of a round": "test_rounds::test_gather_is_bounded_and_plain",
        "`step()` without a group": """
            test_averagers::test_without_a_group_nothing_changes
            test_rounds::test_a_round_that_others_do_not_come_to_ends_at_its_timeout""",
        "all weights 0": "test_rounds::test_who_weighs_nothing_receives_and_nobody_with_weight_is_no_round",
    },
}


def first_cells(document: str) -> list[str]:
    """Of every row but those of the headings, and but the table of names, which test_names reads."""
    text = (ROOT / document).read_text().split("## Names that expose")[0]
    tables = re.findall(r"^\|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, flags=re.M)
    return [row.split(" | ")[0].removeprefix("| ") for table in tables for row in table.splitlines()]


@pytest.mark.parametrize("document", CLAIMS)
def test_every_row_has_tests(document: str) -> None:
    """A row is known by how it begins."""
    rows, known = first_cells(document), CLAIMS[document]
    assert [row for row in rows if not any(row.startswith(text) for text in known)] == []
    assert [text for text in known if not any(row.startswith(text) for row in rows)] == []


def test_the_tests_of_the_rows_exist() -> None:
    missing = []
    for test in {test for rows in CLAIMS.values() for tests in rows.values() for test in tests.split()}:
        file, name = test.split("::")
        path = ROOT / (file if "/" in file else f"python/tests/{file}.py")
        if not re.search(rf"^\s*(async fn|fn|def) {name}\(", path.read_text(), flags=re.M):
            missing.append(test)
    assert not missing
