"""Every knob of trueup, once: default, type, range and meaning. config.py fills them in from files.

Frozen; nothing is read from the environment. Loads no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trueup.errors import ConfigError, nearest


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class LimitsConfig(_Section):
    """How far beyond the predicted noise floor is too far (clean engines: 0.7 to 0.95 times the predicted rms)."""

    rms_factor: float = Field(1.25, gt=0, description="how many times the predicted noise a clean engine may have")
    false_alarm_rate: float = Field(
        2e-4, gt=0, lt=0.5,
        description="probability that a clean engine exceeds a limit by chance, for each judgement of a setting: all "
        "tokens together, each row, each token, and how tokens were drawn",
    )  # fmt: skip
    bias_factor: float = Field(0.25, gt=0, description="largest systematic offset as a share of the predicted rms")
    sequence_nats: float = Field(
        0.5, gt=0, description="largest systematic offset, nats summed over a completion of the mean length"
    )
    bias_sigmas: float = Field(4.0, gt=0, description="an offset counts from so many standard errors from zero on")
    edge_share: float = Field(0.05, ge=0, le=1, description="share of tokens allowed outside the trainer's kept set")
    min_tokens: int = Field(64, ge=1, description="fewer comparable tokens than this are not judged")
    min_floor: float = Field(2e-5, gt=0, description="smallest rms floor ever claimed, nats")
    min_bias: float = Field(
        2e-5, gt=0, description="smallest offset called a bias, nats (a plain fp32 log_softmax is itself off by 8e-6)"
    )


class CheckConfig(_Section):
    """`trueup check`: what is compared with what."""

    trace: Path | None = Field(None, description="recorded trace (trueup.trace/1, JSONL)")
    model: Path | None = Field(None, description="the trainer's checkpoint: a local Hugging Face folder")
    trainer: Literal["processed", "tempered", "raw", "trl", "verl"] = Field(
        "processed", description="what your trainer computes; TRL and verl are tempered (divide by T, ignore the rest)"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of the trainer's body; auto follows the engine's declared dtype"
    )
    head: Literal["float32", "bfloat16"] = Field("float32", description="dtype the trainer multiplies its head in")
    device: str = Field("cpu", description="torch device of the trainer's forward pass; tested on cpu and cuda")
    batch_rows: int = Field(16, ge=1, description="rows a forward pass")
    max_rows: int | None = Field(None, ge=1, description="use at most this many rows of each sampling setting")
    against: str | None = Field(None, description="another trace, a report.json, or another engine's URL")
    engine: tuple[str, ...] = Field((), description="URLs of running engines, replicas of one another")
    token_file: Path | None = Field(None, description="holds the bearer token of the engine")
    sampling: str = Field("", description="the run's own sampling, as temperature=0.7,top_p=0.9; nothing else is sent")
    depth: Literal["quick", "full"] = Field(
        "full", description="quick: half the prompts, and probes that are left out are listed"
    )
    prompts: int = Field(16, ge=2, le=256, description="prompts a setting")
    tokens: int = Field(32, ge=4, le=4096, description="tokens a completion")
    seed: int = Field(0, ge=0, lt=2**31, description="of the random numbers that completions are drawn with")
    allow_updates: bool = Field(False, description="change the engine's weights and put them back")
    parallel: int = Field(
        64, ge=1, le=1024, description="requests sent to an engine at once; fewer once it answers that it is busy (429)"
    )
    request_timeout_s: float = Field(60.0, gt=0, le=3600, description="a request that takes longer has failed")
    search_tokens: int = Field(
        400_000, ge=0, description="tokens that a search for causes may run through changed models (work, not time)"
    )
    search_s: float | None = Field(
        None,
        gt=0,
        description="ceiling on the search, seconds; a search that it cuts short says so",
    )
    against_token_file: Path | None = Field(None, description="bearer token of the engine that --against names")
    checkpoints: tuple[Path, ...] = Field((), description="older weights of the model, oldest first: folders")
    limits: LimitsConfig = LimitsConfig()

    @property
    def sampling_fields(self) -> dict[str, float]:
        """`sampling` as request fields. Raises ConfigError for what is no sampling field or no number."""
        known = SamplingConfig.model_fields
        fields: dict[str, float] = {}
        for part in filter(None, (p.strip() for p in self.sampling.split(","))):
            name, sign, text = part.partition("=")
            if not sign or name.strip() not in known:
                raise ConfigError(f"--sampling {part!r}: expected name=value{nearest(name.strip(), known)}")
            try:
                value = float(text)
            except ValueError:
                raise ConfigError(f"--sampling {part!r}: {text!r} is no number") from None
            if not -1e9 < value < 1e9:
                raise ConfigError(f"--sampling {part!r}: {text!r} is out of range")
            fields[name.strip()] = int(value) if name.strip() == "top_k" else value
        return fields


class SamplingConfig(_Section):
    """The rollouts' sampling, for the recipe linter; vLLM's names and meanings."""

    temperature: float = Field(1.0, ge=0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0 is off")
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)


class EngineConfig(_Section):
    """The rollout engine: what `trueup train` starts, and as it is launched elsewhere for the recipe linter (None: not
    declared)."""

    kind: Literal["embedded", "vllm"] = Field("embedded", description="started by `trueup train`; vllm as in [vllm]")
    name: str = "vllm"
    api: Literal["V0", "V1"] = "V1"
    version: str = ""
    logprobs_mode: Literal["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"] | None = None
    enable_prefix_caching: bool | None = None
    async_scheduling: bool | None = None
    clear_cache_on_update: bool | None = Field(None, description="the cache is cleared at each weight update")
    salt_cache_with_version: bool | None = Field(
        None, description="requests carry a cache_salt that changes at an update"
    )
    updates_in_flight: bool = Field(True, description="weights change while the engine keeps running")
    faults: tuple[str, ...] = Field(
        (), description='broken on purpose, to see what a run does with it: "stale_prefixes", "late_sync lag=2"'
    )
    faults_from: int = Field(0, ge=0, description="batch after which they are; 0: before the preflight check")


class ServeConfig(_Section):
    """`trueup serve`: the embedded engine and its server."""

    model: Path | None = Field(None, description="local Hugging Face folder, served as weight version 0")
    host: str = Field("127.0.0.1", description="loopback unless told otherwise; there is no TLS")
    port: int = Field(8000, ge=0, le=65535, description="0 picks a free one")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="dtype of the body and its cache")
    head: Literal["float32", "bfloat16"] = Field("float32", description="dtype the head is multiplied in")
    bitwise: bool = Field(False, description="fixed tiles: equal to the training forward to the last bit, slower")
    slots: int = Field(64, ge=1, le=4096, description="sequences that run at once; others queue")
    max_length: int | None = Field(None, ge=2, description="prompt and completion together (default: 2,048 at most)")
    step_tokens: int = Field(2048, ge=16, description="tokens a step at most; longer prompts come in chunks")
    prefix_cache: bool = Field(True, description="start from known beginnings of prompts, of the same weights only")
    threads: int | None = Field(None, ge=1, description="torch threads (default: torch's own choice)")
    weights: Path | None = Field(None, description="folder that new weights may be loaded from; none: no updates")
    token_file: Path | None = Field(None, description="holds the bearer token; made, readable by you only, if absent")
    request_timeout_s: float = Field(600.0, gt=0, le=86400, description="a request that takes longer is aborted")
    allow_faults: bool = Field(False, description="let /control/faults break the engine on purpose")
    max_queue: int = Field(4096, ge=1, description="requests that may wait; beyond it the server answers 429")
    until_stdin_closes: bool = Field(False, description="end with whoever started it, however that ends")


class VllmConfig(_Section):
    """`trueup vllm serve`: vLLM as an engine that agrees with the trainer unless told otherwise."""

    model: Path | None = Field(None, description="local Hugging Face folder, served as weight version 0")
    version: Literal["0.32.0", "0.18.1"] = Field("0.32.0", description="of vLLM; `trueup vllm install` makes it")
    environments: Path = Field(Path(), description="where `trueup vllm install` made .venv-vllm-VERSION")
    run: Path = Field(Path("vllm-run"), description="folder for the log and the checkpoint as vLLM is given it")
    host: str = Field("127.0.0.1", description="vLLM's key does not guard its control plane: keep it on loopback")
    port: int = Field(8001, ge=0, le=65535, description="0 picks a free one")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="dtype of the body and its cache")
    head: Literal["float32", "bfloat16"] = Field("float32", description="dtype the head is multiplied in")
    logprobs_mode: Literal["processed_logprobs", "raw_logprobs"] = Field(
        "processed_logprobs", description="processed: of the distribution that tokens were drawn from"
    )
    prefix_caching: bool = Field(False, description="reuse cached beginnings of prompts")
    async_scheduling: bool = Field(False, description="schedule a step before the last one has ended")
    untie: bool = Field(True, description="write a tied head out: on CPU vLLM does not update it otherwise")
    slots: int = Field(64, ge=1, le=4096, description="sequences that run at once; others wait outside the engine")
    max_length: int = Field(2048, ge=16, description="prompt and completion together")
    cache_gib: int = Field(1, ge=1, description="memory for keys and values on CPU, GiB")
    reserved_cores: int = Field(0, ge=0, description="cores that the CPU build leaves alone")
    start_timeout_s: float = Field(600.0, gt=0, le=3600, description="until it is warm; a start takes 20 to 120 s here")
    flags: tuple[str, ...] = Field((), description="further flags for vLLM, as they are")


class TrainConfig(_Section):
    """`trueup train`: the policy that is trained, on what, and where the run is kept."""

    model: Path | None = Field(None, description="local Hugging Face folder to start from: weight version 0")
    reference: Path | None = Field(None, description="policy of the KL term (default: the model itself)")
    run: Path | None = Field(None, description="run folder; a new one unless the run is resumed")
    from_log: Path | None = Field(None, description="train on this rollout log (a folder of segments) and on no engine")
    steps: int | None = Field(None, ge=1, description="optimiser batches; none: to the end of the log")
    groups: int = Field(8, ge=1, description="prompts a batch, each with all its completions")
    epochs: int = Field(1, ge=1, le=100, description="times a batch is gone through")
    minibatches: int = Field(1, ge=1, description="optimiser steps each time, over an equal share of the prompts")
    seed: int = Field(0, ge=0, lt=2**31, description="of the order of prompts in the minibatches of a batch")
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="of the forward pass and of published weights: the engine's; masters are float32"
    )
    head: Literal["float32", "bfloat16"] = Field("float32", description="dtype the head is multiplied in")
    bitwise: bool = Field(False, description="fixed tiles: the logprobs of an engine in bitwise mode to the last bit")
    micro_tokens: int = Field(4096, ge=1, description="tokens a forward pass; the gradient does not depend on it")
    share_prompts: bool = Field(True, description="run a group's prompt once, forward and backward")
    gradient_checkpointing: bool = Field(False, description="keep no activations inside layers: less memory, slower")
    checkpoint_every: int = Field(10, ge=1, description="batches between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="older ones are deleted")
    threads: int | None = Field(None, ge=1, description="torch threads (default: torch's own choice)")


class TaskConfig(_Section):
    """Where prompts come from and what a completion is worth."""

    name: str = Field("repeat", description="repeat, jsonl, or reasoning_gym/TASK")
    path: Path | None = Field(None, description='of jsonl: one {"prompt": ..., "answer": ...} a line')
    scorer: Literal["exact", "contains", "math"] = Field("exact", description="of jsonl")
    seed: int = Field(0, ge=0, lt=2**31, description="of procedural tasks, and of the order of a data set")
    settings: dict[str, Any] = Field({}, description="of a reasoning_gym task, its own")
    chat: bool = Field(True, description="ask through the model's chat template")
    system: str = Field("", description="system message of the chat")
    held_out: int = Field(64, ge=1, description="prompts for evaluation; they are never trained on")
    score_timeout_s: float = Field(10.0, gt=0, le=3600, description="a completion that takes longer has no reward")


class RolloutConfig(_Section):
    """How rollouts are made while a policy is trained; the distribution they are drawn from is [sampling]."""

    group_size: int = Field(8, ge=1, description="completions of a prompt")
    max_tokens: int = Field(128, ge=1, description="of a completion")
    max_lag: int = Field(4, ge=0, description="groups whose oldest token is further behind are dropped; 0: on-policy")
    clear_cache: bool = Field(True, description="an update clears the cache; false: keys of older weights stay in use")
    engines: int = Field(1, ge=1, description="processes, replicas of one another")
    concurrency: int = Field(4, ge=1, description="groups under way in each engine")
    threads: int = Field(1, ge=1, description="torch threads of each embedded engine")
    retries: int = Field(2, ge=0, description="times a group is asked for again after a failure")
    timeout_s: float = Field(300.0, gt=0, description="a group that takes longer has failed")
    score_workers: int = Field(1, ge=1, description="processes that compute rewards")
    eval_every: int = Field(10, ge=1, description="batches between evaluations on held-out prompts")
    late: Literal["drop", "train"] = Field(
        "drop",
        description="what becomes of groups beyond max_lag: dropped, which selects short completions, or trained on "
        "all the same, which needs a correction",
    )
    keep_weights: int = Field(8, ge=2, description="published versions that stay on disk")
    seed: int = Field(0, ge=0, lt=2**31, description="of the completions")
    update: Literal["in_flight", "drain", "synchronous"] = Field(
        "in_flight",
        description="drain: an update waits until the engines' requests have run to their end; synchronous: max_lag + "
        "1 batches are made with one version, then trained on while nothing is generated",
    )
    min_ess: float | None = Field(
        None, gt=0, le=1, description="after a batch with a lower token ESS of pi/mu, on-policy groups only for one"
    )


class AuditConfig(_Section):
    """While training: are the engines still the trainer's? A sample of a batch is computed again with the weights and
    the cache that its engine had, and a canary is scored after every update."""

    every: int = Field(20, ge=0, description="batches between audits; 0: none")
    tokens: int = Field(512, ge=1, description="of the batch's completions, at least, that an audit computes again")
    stop: bool = Field(True, description="an alarm stops the run; false: it is written down and shown")
    threads: int = Field(1, ge=1, description="torch threads of the process that audits")


class MonitorConfig(_Section):
    """Where the numbers of a run go besides its folder."""

    sinks: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (), description="tensorboard writes into the run folder, wandb offline there; extras of the same names"
    )


class ObjectiveConfig(_Section):
    """What is maximised. None: as the paper of `kind` has it; `trueup config` and the run's config.json print what
    that is."""

    kind: Literal["reinforce", "ppo", "grpo", "dr_grpo", "dapo", "gspo", "cispo"] = "grpo"
    advantage: (
        Literal["group_mean", "leave_one_out", "std_normalised", "batch_normalised", "batch_normalised_rewards"] | None
    ) = Field(None, description="batch_normalised divides by the spread of advantages, _rewards by that of rewards")
    aggregation: Literal["token", "sequence", "prompt", "fixed"] | None = None
    fixed_length: int | None = Field(None, ge=1, description="tokens, for aggregation by a fixed length")
    low: float | None = Field(None, ge=0, le=1, description="pi/old is clipped below at 1 - low")
    high: float | None = Field(None, ge=0, description="and above at 1 + high")
    max_ratio: float | None = Field(None, gt=0, description="largest weight of reinforce and cispo (1 + epsilon_high)")
    dual: float | None = Field(None, gt=1, description="ppo: loss of a token with A < 0 is at most -dual A")
    old: Literal["bypass", "decoupled", "interpolated"] | None = Field(
        None, description="denominator of the ratio: what the engine reported, the trainer at the start of the batch"
    )
    kl: float | None = Field(None, ge=0, description="coefficient of the KL term to the reference policy")
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_unbiased: bool = Field(
        False, description="weigh the KL term by pi/old, as TRL does by default; old is objective.old"
    )
    entropy: float = Field(0.0, description="coefficient of the entropy bonus")
    drop_zero_variance: bool | None = Field(None, description="leave out prompts whose rewards are all equal")
    drop_overlong: bool | None = Field(None, description="leave out completions that hit their length limit")


class CorrectionConfig(_Section):
    """Weights from pi_train/pi_rollout; on an unverified backend they hide its fault. None: the method's own bound."""

    kind: Literal[
        "none", "truncate_tokens", "truncate_sequences", "mask_tokens", "mask_sequences", "geometric_band",
        "k3_rejection",
    ] = "none"  # fmt: skip
    lower: float | None = Field(None, ge=0, description="bound on the ratio, never on its inverse")
    upper: float | None = Field(None, gt=0, description="bound on the ratio; for k3_rejection on mean K3, nats")
    veto: float | None = Field(None, gt=0, lt=1, description="drop sequences with a token below this ratio (1e-4)")
    normalise: bool = Field(False, description="divide weights by their mean over the batch")
    vcpo_ess: float | None = Field(
        None, gt=0, le=1, description="scale the learning rate by sqrt(ESS / this), the ESS on policy"
    )


class OptimizerConfig(_Section):
    """AdamW on float32 masters. Betas and eps are MiniMax-M1's, decay ScaleRL's, rate and norm PipelineRL's."""

    lr: float = Field(1e-6, ge=0, description="learning rate, constant after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="optimiser steps of linear warm-up")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-15, gt=0, description="gradients of 1e-18 to 1e-5 vanish beside the usual 1e-8")
    weight_decay: float = Field(0.01, ge=0, description="of matrices; lr x decay below 3e-8 is lost in float32")
    clip_norm: float = Field(0.3, gt=0, description="largest norm of the whole gradient")


class Config(_Section):
    """A whole configuration file."""

    preset: Literal["pipelinerl", "grpo", "gspo"] | None = Field(None, description="starting point, see presets.py")
    train: TrainConfig = TrainConfig()
    task: TaskConfig = TaskConfig()
    rollout: RolloutConfig = RolloutConfig()
    audit: AuditConfig = AuditConfig()
    monitor: MonitorConfig = MonitorConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    correction: CorrectionConfig = CorrectionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    check: CheckConfig = CheckConfig()
    serve: ServeConfig = ServeConfig()
    vllm: VllmConfig = VllmConfig()
    sampling: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()
