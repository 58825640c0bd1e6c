"""hivemind 1.1's public names by module, and signatures: what people import. The table that test_names walks."""

from __future__ import annotations

# Module under `hivemind` (empty: the package itself) -> names.
NAMES = {
    "": """DHT DecentralizedAverager Optimizer GradScaler TrainingAverager
        averaging compression dht optim p2p proto utils""",
    "dht": """DHT DHTNode DHTID DHTValue DHTExpiration CompositeValidator DHTRecord RecordValidatorBase
        MAX_DHT_TIME_DISCREPANCY_SECONDS""",
    "dht.dht": "DHT",
    "dht.node": "DHTNode Blacklist CacheRefreshQueue DEFAULT_NUM_WORKERS",
    "dht.protocol": "DHTProtocol",
    "dht.routing": "DHTID RoutingTable KBucket",
    "dht.storage": "DictionaryDHTValue DHTLocalStorage",
    "dht.traverse": "traverse_dht simple_traverse_dht",
    "dht.validation": "RecordValidatorBase CompositeValidator DHTRecord",
    "dht.crypto": "RSASignatureValidator",
    "dht.schema": "SchemaValidator conbytes BytesWithPublicKey",
    "averaging": "DecentralizedAverager",
    "averaging.averager": "DecentralizedAverager compute_schema_hash",
    "averaging.control": "StepControl AveragingStage",
    "averaging.allreduce": "AllReduceRunner AveragingMode",
    "averaging.matchmaking": "Matchmaking PotentialLeaders MatchmakingException",
    "averaging.key_manager": "GroupKeyManager",
    "averaging.group_info": "GroupInfo",
    "averaging.partition": "TensorPartContainer TensorPartReducer AllreduceException BannedException",
    "averaging.load_balancing": "load_balance_peers optimize_parts_lp hagenbach_bishoff",
    "compression": """NoCompression Float16Compression ScaledFloat16Compression Uniform8BitQuantization
        Quantile8BitQuantization BlockwiseQuantization SizeAdaptiveCompression RoleAdaptiveCompression
        PerTensorCompression AdaptiveCompressionBase CompressionBase CompressionInfo TensorRole
        serialize_torch_tensor deserialize_torch_tensor deserialize_tensor_stream""",
    "compression.base": "CompressionBase CompressionInfo NoCompression TensorRole",
    "compression.floating": "Float16Compression ScaledFloat16Compression",
    "compression.quantization": "Uniform8BitQuantization Quantile8BitQuantization BlockwiseQuantization",
    "compression.adaptive": """AdaptiveCompressionBase SizeAdaptiveCompression RoleAdaptiveCompression
        PerTensorCompression""",
    "compression.serialization": """serialize_torch_tensor deserialize_torch_tensor deserialize_tensor_stream
        BASE_COMPRESSION_TYPES""",
    "optim": "Optimizer GradScaler TrainingAverager",
    "optim.optimizer": "Optimizer",
    "optim.grad_averager": "GradientAverager GradientAveragerFactory",
    "optim.power_sgd_averager": "PowerSGDGradientAverager",
    "optim.state_averager": """TrainingStateAverager initialize_optimizer_state_ dump_optimizer_state
        load_optimizer_state""",
    "optim.progress_tracker": """ProgressTracker GlobalTrainingProgress LocalTrainingProgress
        TrainingProgressSchema""",
    "optim.grad_scaler": "GradScaler",
    "optim.training_averager": "TrainingAverager",
    "p2p": """P2P P2PContext P2PDaemonError P2PHandlerError PeerID PeerInfo ServicerBase StubBase
        StreamInfo ControlFailure DispatchFailure""",
    "p2p.p2p_daemon": "P2P P2PContext",
    "p2p.servicer": "ServicerBase StubBase",
    "p2p.p2p_daemon_bindings.p2pclient": "Client",
    "p2p.p2p_daemon_bindings.control": "ControlClient",
    "utils": """get_dht_time DHTExpiration ValueWithExpiration TimedStorage MAX_DHT_TIME_DISCREPANCY_SECONDS
        MSGPackSerializer SerializerBase MPFuture PerformanceEMA TensorDescriptor BatchTensorDescriptor
        nested_flatten nested_pack nested_map nested_compare get_logger use_hivemind_log_handler
        choose_ip_address log_visible_maddrs increase_file_limit split_for_streaming combine_from_streaming
        as_aiter iter_as_aiter azip achain aenumerate asingle anext amap_in_executor aiter_with_timeout
        attach_event_on_finished enter_asynchronously switch_to_uvloop cancel_and_wait await_cancelled
        cancel_task_if_running""",
    "utils.asyncio": """as_aiter iter_as_aiter azip achain aenumerate asingle anext amap_in_executor
        aiter_with_timeout attach_event_on_finished enter_asynchronously switch_to_uvloop cancel_and_wait
        await_cancelled cancel_task_if_running""",
    "utils.auth": "AuthorizerBase TokenAuthorizerBase AuthRPCWrapper AuthRole",
    "utils.crypto": "RSAPrivateKey RSAPublicKey",
    "utils.limits": "increase_file_limit",
    "utils.logging": "get_logger use_hivemind_log_handler",
    "utils.math": "get_flatten_greedy_dims orthogonalize_",
    "utils.mpfuture": "MPFuture",
    "utils.multiaddr": "Multiaddr",
    "utils.nested": "nested_flatten nested_pack nested_map nested_compare",
    "utils.networking": "choose_ip_address log_visible_maddrs",
    "utils.performance_ema": "PerformanceEMA",
    "utils.serializer": "MSGPackSerializer SerializerBase",
    "utils.streaming": "split_for_streaming combine_from_streaming",
    "utils.tensor_descr": "TensorDescriptor BatchTensorDescriptor",
    "utils.timed_storage": """get_dht_time DHTExpiration ValueWithExpiration TimedStorage
        MAX_DHT_TIME_DISCREPANCY_SECONDS""",
}

# Attributes of classes that exist.
MEMBERS = {
    "dht.DHT": """run_in_background() wait_until_ready() shutdown() get() store() run_coroutine() add_validators()
        peer_id client_mode get_visible_maddrs() replicate_p2p()""",
    # What `run_coroutine` hands out.
    "dht.dht.DHTNode": """store() get() get_many() get_visible_maddrs() store_many() get_many_by_id()
        find_nearest_nodes()""",
    "dht.validation.CompositeValidator": "validate() sign_value() strip_value()",
    "dht.validation.RecordValidatorBase": "validate sign_value strip_value priority merge_with",
    "dht.crypto.RSASignatureValidator": "local_public_key",
    "averaging.DecentralizedAverager": """step() get_tensors() load_state_from_peers() get_current_state()
        allow_state_sharing state_sharing_priority get_group_bits() set_group_bits() run_in_background()
        wait_until_ready() shutdown() peer_id request_timeout rpc_join_group() rpc_aggregate_part()
        rpc_download_state()""",
    "averaging.control.StepControl": """scheduled_time weight deadline allow_retries stage triggered
        began_allreduce data_for_gather allow_allreduce() cancel() get_timeout() result()""",
    "averaging.control.AveragingStage": """IDLE LOOKING_FOR_GROUP AWAITING_TRIGGER RUNNING_ALLREDUCE FINISHED""",
    "compression.CompressionBase": "compress() extract() estimate_compression_ratio()",
    "compression.CompressionInfo": "from_tensor get_part",
    "compression.TensorRole": "ACTIVATION PARAMETER GRADIENT OPTIMIZER UNSPECIFIED",
    "Optimizer": """step zero_grad load_state_from_peers is_synchronized_with_peers local_epoch local_progress
        tracker state_averager grad_averager use_local_updates use_gradient_averaging state_dict load_state_dict
        state opt param_groups is_alive shutdown add_param_group""",
    "optim.grad_averager.GradientAverager": """accumulate_grads_() schedule_step() step()
        load_accumulators_into_averager_() reset_accumulated_grads_() use_averaged_gradients()
        notify_used_averaged_gradients()
        local_samples_accumulated local_times_accumulated""",
    "optim.state_averager.TrainingStateAverager": """step() schedule_step() load_state_from_peers()
        averaging_in_progress local_epoch""",
    "optim.progress_tracker.ProgressTracker": """global_progress local_progress global_epoch
        ready_to_update_epoch estimated_next_update_time report_local_progress pause_updates update_epoch
        fetched_global_progress_this_epoch shutdown""",
    "optim.progress_tracker.GlobalTrainingProgress": """epoch samples_accumulated target_batch_size num_peers
        num_clients eta_next_epoch next_fetch_time""",
    "GradScaler": "running_global_step() unscale_() step() update() are_grads_finite()",
    "optim.training_averager.TrainingAverager": "step() local_tensors() tensor_infos() get_current_state() load_state_from_peers()",
    "p2p.PeerID": "from_base58 to_bytes to_base58 from_identity",
    "utils.MSGPackSerializer": "dumps loads ext_serializable",
    "utils.PerformanceEMA": "update pause reset_timer update_threadsafe",
    "utils.crypto.RSAPrivateKey": "process_wide sign to_bytes get_public_key",
    "utils.crypto.RSAPublicKey": "verify to_bytes",
}

# Signatures: all of these arguments, in this order, with these defaults; potluck may have more behind them.
SIGNATURES = {
    "DHT": """initial_peers=None, *, start, p2p=None, daemon=True, num_workers=4, record_validators=(),
        shutdown_timeout=3, await_ready=True""",
    "DHT.run_in_background": "await_ready=True, timeout=None",
    "DHT.wait_until_ready": "timeout=None",
    "DHT.get": "key, latest=False, return_future=False",
    "DHT.store": "key, value, expiration_time, subkey=None, return_future=False",
    "DHT.run_coroutine": "coro, return_future=False",
    "DHT.get_visible_maddrs": "latest=False",
    "dht.crypto.RSASignatureValidator": "private_key=None",
    "dht.schema.SchemaValidator": "schema, allow_extra_keys=True, prefix=None",
    "averaging.DecentralizedAverager": """averaged_tensors, dht, *, start, prefix, target_group_size=None,
        min_group_size=2, initial_group_bits='', min_matchmaking_time=5.0, request_timeout=3.0,
        averaging_alpha=1.0, part_size_bytes=None, allreduce_timeout=None, next_chunk_timeout=None,
        sender_timeout=None, reducer_timeout=None, compression=NoCompression(),
        state_compression=NoCompression(), tensor_infos=None, bandwidth=None, min_vector_size=0,
        auxiliary=False, allow_state_sharing=None, declare_state_period=30, client_mode=None, daemon=True,
        shutdown_timeout=5""",
    "averaging.DecentralizedAverager.step": """gather=None, scheduled_time=None, weight=None, timeout=None,
        allow_retries=True, require_trigger=False, wait=True""",
    "averaging.DecentralizedAverager.load_state_from_peers": "wait=True, timeout=None",
    "averaging.DecentralizedAverager.set_group_bits": "group_bits, wait=True",
    "averaging.control.StepControl.result": "timeout=None",
    "compression.SizeAdaptiveCompression": "threshold, less, greater_equal",
    "compression.RoleAdaptiveCompression": """*, activation=None, parameter=None, gradient=None, optimizer=None,
        default=NoCompression()""",
    "compression.CompressionBase.compress": "tensor, info, allow_inplace=False",
    "compression.CompressionInfo": "key, descriptor, role=TensorRole.UNSPECIFIED, part_index=0, part_size=None",
    "compression.serialize_torch_tensor": "tensor, compression_type=0, info=None, allow_inplace=False",
    "compression.deserialize_torch_tensor": "serialized_tensor",
    "Optimizer": """*, dht, run_id, target_batch_size, optimizer, batch_size_per_step=None, params=None,
        scheduler=None, matchmaking_time=15.0, averaging_timeout=60.0, allreduce_timeout=None,
        next_chunk_timeout=None, load_state_timeout=600.0, reuse_grad_buffers=False, offload_optimizer=None,
        delay_optimizer_step=None, delay_grad_averaging=False, delay_state_averaging=None,
        average_state_every=1, use_local_updates=False, client_mode=None, auxiliary=False,
        grad_compression=NoCompression(), state_averaging_compression=NoCompression(),
        load_state_compression=NoCompression(), grad_averager_factory=None, average_opt_statistics=(),
        extra_tensors=(), averager_opts=None, tracker_opts=None, performance_ema_alpha=0.1,
        shutdown_timeout=5, verbose=False""",
    "Optimizer.step": "closure=None, batch_size=None, grad_scaler=None",
    "Optimizer.zero_grad": "set_to_none=True",
    "optim.grad_averager.GradientAverager": """parameters, *, dht, prefix, reuse_grad_buffers=False,
        accumulate_grads_on=None, client_mode=None, warn=True, averaged_grads=()""",
    "optim.grad_averager.GradientAverager.accumulate_grads_": "batch_size",
    "optim.grad_averager.GradientAverager.schedule_step": "scheduled_time=None",
    "optim.grad_averager.GradientAverager.step": """weight=None, reset_accumulators=True, control=None,
        timeout=None, wait=True""",
    "optim.power_sgd_averager.PowerSGDGradientAverager": """parameters, averager_rank, *, dht, prefix,
        reuse_grad_buffers=False, accumulate_grads_on=None, client_mode=None, warn=True,
        min_compression_ratio=0.5, averaged_grads=None""",
    "optim.state_averager.TrainingStateAverager": """*, dht, optimizer, params=None, scheduler=None,
        initialize_optimizer=None, offload_optimizer=False, custom_gradients=False, reuse_tensors=None,
        delta_rule_averaging=False, performance_ema_alpha=0.1, sync_epoch_when_averaging=False,
        parameter_names=None, average_opt_statistics=(), extra_tensors=(), status_loglevel=10""",
    "optim.state_averager.TrainingStateAverager.step": """wait_for_delayed_updates=None,
        apply_delayed_updates=True, increment_epoch=False, optimizer_step=False, zero_grad=False,
        delay_optimizer_step=False, averaging_round=False, delay_averaging=None, averaging_control=None,
        wait_for_trigger=None, grad_scaler=None, set_to_none=True, averaging_opts=None""",
    "optim.progress_tracker.ProgressTracker": """dht, prefix, target_batch_size, *, client_mode=None,
        min_refresh_period=0.5, max_refresh_period=10, default_refresh_period=3, expected_drift_peers=3,
        expected_drift_rate=0.2, performance_ema_alpha=0.1, metadata_expiration=60.0, status_loglevel=10,
        private_key=None, daemon=True, start""",
    "optim.progress_tracker.ProgressTracker.update_epoch": "new_epoch=None",
    "optim.training_averager.TrainingAverager": """opt, *, average_parameters, average_gradients,
        average_opt_statistics=(), extra_tensors=(), parameter_names=None, initialize_optimizer=True""",
    "optim.training_averager.TrainingAverager.step": "data_lock=None, wait=True",
    "optim.state_averager.TrainingStateAverager.schedule_step": "scheduled_time=None",
    "optim.state_averager.TrainingStateAverager.load_state_from_peers": "wait=True, timeout=None",
    "optim.progress_tracker.ProgressTracker.report_local_progress": "local_epoch, samples_accumulated",
    "utils.TimedStorage": "maxsize=None",
    "utils.PerformanceEMA": "alpha=0.1, eps=1e-20, paused=False",
    "utils.PerformanceEMA.update": "task_size, interval=None",
    "utils.networking.choose_ip_address": "maddrs, prefer_global=True, protocol_priority=('ip4', 'ip6')",
    "utils.networking.log_visible_maddrs": "visible_maddrs, only_p2p",
    "utils.limits.increase_file_limit": "new_soft=32768, new_hard=32768",
    "lightning.HivemindStrategy": """target_batch_size, run_id='lightning_run', batch_size=None,
        delay_state_averaging=False, delay_optimizer_step=None, delay_grad_averaging=False,
        offload_optimizer=None, reuse_grad_buffers=False, scheduler_fn=None, matchmaking_time=5.0,
        averaging_timeout=30.0, verbose=False, averager_opts=None, host_maddrs=None, initial_peers=None,
        use_ipfs=False, wait_timeout=None, bootstrap_timeout=None, use_relay=True, use_auto_relay=False,
        identity_path=None""",
}
