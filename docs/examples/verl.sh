#!/bin/sh
# GRPO with verl 0.9: training on one GPU, an engine on another, whose weights come through the companion of that GPU.
# Usage: verl.sh MODEL TRAIN.parquet TEST.parquet
exec python -m verl.experimental.one_step_off_policy.main_ppo \
    algorithm.adv_estimator=grpo \
    data.train_files="$2" \
    data.val_files="$3" \
    data.train_batch_size=16 \
    actor_rollout_ref.hybrid_engine=False \
    actor_rollout_ref.model.path="$1" \
    actor_rollout_ref.actor.strategy=fsdp2 \
    actor_rollout_ref.actor.ppo_mini_batch_size=16 \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
    actor_rollout_ref.rollout.load_format=companion \
    actor_rollout_ref.rollout.checkpoint_engine.backend=companion \
    actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=vllm_companion_plugin.trainers.verl \
    +actor_rollout_ref.rollout.checkpoint_engine.engine_kwargs.companion.model="$1" \
    trainer.nnodes=1 \
    trainer.n_gpus_per_node=1 \
    rollout.nnodes=1 \
    rollout.n_gpus_per_node=1
