"""`llmkit rl`: a policy tries problems many times, and learns from the attempts that were worth more than others."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar

from llmkit.config import ToolConfig, TuningConfig, argument, as_options, check_one_horizon, lasting_options, option
from llmkit.errors import UserError
from llmkit.problems import read_problems
from llmkit.progress import quantity, say
from llmkit.rundir import MetricsLog, RunFolder, check_model_folder, read_metrics
from llmkit.stream import check_inputs, names_of, open_output

if TYPE_CHECKING:
    import torch

    from llmkit.engine.finetuning import Finetuning
    from llmkit.rewards import Weighted
    from llmkit.rl.algorithms import Algorithm
    from llmkit.rl.asking import AskedProblem

STARTED = time.monotonic()  # a time budget covers the start-up, too
# of AdamW at a width of 256; docs/experiments.md, "Reinforcement learning"
LEARNING_RATE, LORA_LEARNING_RATE = 2e-4, 1e-3
MICRO_BATCH_TOKENS = 8192
KL_COEF = 0.05  # against a reward model
STEPS = 300  # against a reward model: beyond a few hundred it is gamed
EPOCHS = 1.0
WARMUP_STEPS = (
    10  # at least: the first full step of Adam goes by signs alone and cost a model two thirds of its success
)
DIFFERENCES = {"torch.float32": 1e-3, "torch.bfloat16": 0.05}  # usual are 1e-6 and 5e-3 nats a token
DISAGREEMENTS = 20  # attempts shown that a reward and the gold one differ about
RESULTS = ("reward", "success", "val_reward", "val_success", "val_gold")
CURVES = {
    "reward.svg": {"training": "reward", "held out": "val_reward", "gold": "val_gold"},
    "success.svg": {"training": "success", "held out": "val_success", "calling": "called"},
    "length.svg": {"training": "length", "held out": "val_length"},
}


@dataclass(frozen=True, kw_only=True)
class RlConfig(TuningConfig, ToolConfig):
    """Options of `llmkit rl`."""

    examples: ClassVar[str] = """
        Examples:
          llmkit rl chat/ --data problems.jsonl --reward verifier -o policy/
          llmkit rl chat/ --data problems.jsonl --val held-out.jsonl --eval-every 10 --algo dapo -o policy/
          llmkit rl chat/ --data prompts.jsonl --reward rm:judge/ --reward length:-0.1 --max-kl 20 -o policy/
          llmkit rl chat/ --data p.jsonl --val v.jsonl --reward rm:judge/ --gold verifier --stop-on-hack -o policy/
          jq -c 'select(.reward == 1)' policy/rollouts.jsonl | llmkit sft chat/ --data - -o better/

        A problem is {"prompt", "answer"}; also question, solution, messages, GSM8K's ####. Rewards, with weights:
        verifier, rm:FOLDER, cmd:COMMAND, py:FILE.py:FUNCTION, format:REGEX, length (docs/rewards.md). Every attempt
        stands in rollouts.jsonl with what it was worth.
    """
    following: ClassVar[str] = "llmkit sample policy/ --chat"

    model: str | None = argument("Model folder: an assistant, or a base model.", metavar="MODEL", default=None)
    data: tuple[str, ...] = option((), "Problems; repeatable [stdin].", metavar="FILE")
    val: tuple[str, ...] = option((), "Held-out problems.", metavar="FILE")
    reward: tuple[str, ...] = option(("verifier",), "What attempts are worth; repeatable.", metavar="KIND[:WEIGHT]")

    algo: str = option(
        "grpo",
        "Advantage and loss.",
        group="Algorithm",
        choices=("grpo", "dr-grpo", "dapo", "rloo", "reinforce++", "gspo"),
    )
    updates: int = option(1, "Updates with the attempts of a step.", group="Algorithm", at_least=1)
    clip_low: float | None = option(
        None, "Least ratio is 1 less this [by algorithm].", group="Algorithm", above=0, at_most=1
    )
    clip_high: float | None = option(None, "Largest ratio is 1 and this [by algorithm].", group="Algorithm", above=0)
    kl_coef: float | None = option(
        None, "Weight of the divergence from MODEL [0; 0.05 with rm:].", group="Algorithm", at_least=0
    )
    max_difference: float | None = option(
        None,
        "Stop where log-probabilities of sampler and trainer differ by more [0.001; bfloat16 0.05].",
        group="Algorithm",
        above=0,
    )

    group: int = option(8, "Attempts at each problem.", group="Attempts", at_least=2, at_most=4096)
    batch_size: int = option(16, "Problems of a step.", group="Attempts", at_least=1)
    max_tokens: int = option(256, "Tokens of an attempt.", group="Attempts", unit="count", at_least=1)
    temperature: float = option(1.0, "Divides the logits.", group="Attempts", at_least=0.05, at_most=10)
    stop: tuple[str, ...] = option((), "End before this text; repeatable.", group="Attempts", metavar="TEXT")
    system: str | None = option(None, "System message for problems without one.", group="Attempts")
    refill: float = option(
        1.0, "Try up to so many times as many problems more, for groups worth the same.", group="Attempts", at_least=0
    )
    overlong: str = option(
        "auto",
        "Attempts that were cut: judged as they are, out of the loss, or penalised; auto: by algorithm.",
        group="Attempts",
        choices=("auto", "keep", "mask", "penalise"),
    )
    slots: int = option(64, "Sequences decoded at a time.", group="Attempts", at_least=1, at_most=4096, free=True)

    gold: str | None = option(None, "Watch this reward, which is not trained on.", group="Watch", metavar="KIND")
    stop_on_hack: bool = option(False, "Stop where the reward rises and the gold one falls.", group="Watch", free=True)
    max_kl: float | None = option(None, "Stop at this divergence, nats an attempt.", group="Watch", above=0)
    max_reward: float | None = option(None, "Stop at this mean reward.", group="Watch", free=True)
    eval_samples: int = option(1, "Attempts at each held-out problem; 1: the likeliest.", group="Watch", at_least=1)

    epochs: float | None = option(None, "Go through the problems this often [1].", group="Horizon", above=0)
    time_budget: float | None = option(None, "Be done in this time.", group="Horizon", unit="duration", above=0)

    def reads_stdin(self) -> bool:
        """Whether stdin is the input."""
        return not self.data or "-" in self.data


@dataclass(frozen=True)
class Summary:
    """What the command line prints. `success` is the share of right attempts in the last step, where rewards verify."""

    path: str
    steps: int
    attempts: int
    reward: float
    seconds: float
    success: float | None = None
    val_reward: float | None = None
    val_success: float | None = None
    val_gold: float | None = None
    kept_step: int | None = None
    stopped: str | None = None


def run(config: RlConfig) -> Summary | None:
    """Load, build, train, save, summarise. Raises UserError for the user's mistakes, Interrupted after a signal."""
    _check(config)
    folder = RunFolder(
        config.out or ("policy/" if config.dry_run else None),
        "policy/",
        resume=config.resume,
        force=config.force,
        dry_run=config.dry_run,
    )
    if folder.is_finished:
        return Summary(path=str(folder.out), **folder.results("rl"))
    with ExitStack() as stack:
        return _run(config, folder, stack)


def _run(config: RlConfig, folder: RunFolder, stack: ExitStack) -> Summary | None:
    from llmkit.engine import setup
    from llmkit.engine.devices import choose_device, choose_dtype
    from llmkit.engine.scaling import training_bytes
    from llmkit.engine.schedule import Schedule
    from llmkit.engine.tool_calls import open_tools
    from llmkit.rl.actor import Actor, Asking
    from llmkit.rl.asking import digest
    from llmkit.rl.collecting import BatchSettings, Collector
    from llmkit.rl.evaluating import HeldOut
    from llmkit.rl.policy_loss import PolicyLoss
    from llmkit.rl.rehearsing import rehearse
    from llmkit.rl.rollouts import ROLLOUTS, RolloutLog
    from llmkit.rl.rows import LONGEST_ROW
    from llmkit.rl.watching import Limits, Watch

    # load
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    tuning = _load(config, device, dtype)
    rewards, gold = _rewards(config, tuning, stack)
    asked = _ask(config, config.data or ("-",), tuning, rewards)
    tried = _ask(config, config.val, tuning, [*rewards, *gold]) if config.val else []

    # build
    plan = _plan(config, len(asked))
    reference = tuning.frozen_copy() if plan.kl_coef or config.max_kl is not None else None
    if config.lora_rank is not None:
        tuning.add_adapter(config.lora_rank, config.lora_alpha, config.lora_targets.split(","), config.seed)
    _say_plan(config, plan, len(asked), tuning.trained_parameters)
    tools = open_tools(config, tuning.tokenizer, stack)
    actor = Actor(tuning.model, tuning.tokenizer, rewards, slots=config.slots, name=str(config.model), tools=tools)
    loss = PolicyLoss(plan.algorithm, config.temperature, plan.kl_coef, reference is not None)
    asking = Asking(config.group, config.max_tokens, config.temperature, config.stop, config.seed)
    micro_batch_rows, share = config.micro_batch_size or MICRO_BATCH_TOKENS // LONGEST_ROW, device.type == "cpu"
    if config.dry_run:
        rehearsal = rehearse(actor, asked[: config.batch_size], asking, loss, micro_batch_rows, share)
        memory = training_bytes(tuning.model.config, micro_batch_rows * LONGEST_ROW, tuning.trained_parameters)
        memory += 4.0 * tuning.model.config.parameter_count * (reference is not None)
        for line in rehearsal.lines(plan.steps, config.updates, memory):
            say(line, config.quiet)
        return None
    identity = lasting_options(config) | {"the data": digest(asked)}
    folder.notes(identity)
    folder.begin(identity)
    optimizer = tuning.build_optimizer(
        config.learning_rate, config.weight_decay, anchor=LEARNING_RATE, lora_anchor=LORA_LEARNING_RATE
    )
    warmup_steps = (
        max(WARMUP_STEPS, (plan.steps or STEPS) // 20) if config.warmup_steps is None else config.warmup_steps
    )
    trainer = setup.build_trainer(
        tuning.model,
        optimizer,
        Schedule(warmup_steps, config.decay_fraction),
        batches=lambda step: collector.batches(step),
        loss=loss,
        micro_batch_rows=micro_batch_rows,
        flops=0.0,
        folder=folder.work,
        # rows differ in length from step to step, and each length would be compiled anew
        options=replace(config, compile="off") if config.compile == "auto" else config,
        updates_per_batch=config.updates,
        spike_nats=float("inf"),  # this loss does not measure progress
        shown="reward",
    )
    log = RolloutLog(folder.work / ROLLOUTS, trainer.step)
    collector = Collector(
        actor,
        asked,
        plan.algorithm,
        asking,
        BatchSettings(config.batch_size, config.refill, plan.kl_coef, share, config.seed),
        loss=loss,
        log=log,
        pad=tuning.pad_id,
        reference=reference,
    )
    limits = Limits(config.max_difference or DIFFERENCES[str(dtype)], config.max_kl, config.max_reward)
    watch = Watch(trainer, collector, loss, limits, read_metrics(folder.work / "metrics.jsonl"))
    held_out, evaluate = None, None
    if tried:
        temperature = config.temperature if config.eval_samples > 1 else 0.0
        how = replace(asking, group=config.eval_samples, temperature=temperature)
        held_out = HeldOut(actor, tried, how, gold[0] if gold else None)
        figure = "val_gold" if gold else "val_reward"
        evaluate = watch.evaluation(held_out, config.stop_on_hack)
        evaluate = tuning.keep_best(trainer, evaluate, lambda scores: scores[figure])

    # train
    if evaluate is not None and trainer.step == 0:
        with MetricsLog(folder.work / "metrics.jsonl") as metrics:
            metrics.write({"step": 0, **evaluate()})
    trainer.fit(
        total_steps=plan.steps,
        seconds=None if config.time_budget is None else config.time_budget - (time.monotonic() - STARTED),
        evaluate=evaluate,
        sample=collector.example,
    )

    # save
    figures = _figures(read_metrics(folder.work / "metrics.jsonl"), tuning.best_step)
    results = {
        "steps": trainer.step,
        "attempts": log.groups * config.group,
        **{name: figures[name] for name in RESULTS if name in figures},
        "seconds": round(time.monotonic() - STARTED, 1),
        "kept_step": tuning.best_step,
        "stopped": watch.stopped,
    }
    inputs = [path for path in config.data if path != "-"]
    folder.document(
        "rl", as_options(config), inputs=inputs, parents=[str(config.model)], results=results, curves=CURVES
    )
    if held_out is not None and gold:
        with open_output(str(folder.work / "disagreements.jsonl"), force=True) as write:
            for record in held_out.disagreements(DISAGREEMENTS):
                write(record)
    tuning.write_tokenizer(folder.work)
    tuning.save(folder.work)
    folder.finish()

    # summarise
    return Summary(path=str(folder.out), **results)


def _figures(rows: Sequence[Mapping[str, Any]], kept_step: int | None) -> dict[str, Any]:
    """The last of each figure of training, and those of the evaluation whose parameters were kept."""
    kept = (row for row in rows if row["step"] == kept_step)
    last = {name: value for row in rows for name, value in row.items()}
    return last | {name: value for row in kept for name, value in row.items() if name.startswith("val_")}


# ---- what is asked for


def _check(config: RlConfig) -> None:
    """Raise UserError for what can be known to be wrong before the work."""
    check_model_folder(config.model, "llmkit rl chat/ --data problems.jsonl")
    check_one_horizon(config, ("epochs", "max_steps", "time_budget"))
    if not config.val and (config.gold or config.eval_every):
        raise UserError(f"{'--gold' if config.gold else '--eval-every'}: needs --val, problems to look at")
    if config.stop_on_hack and not (config.gold and config.eval_every):
        raise UserError("--stop-on-hack: needs --gold, a reward to watch, and --eval-every, how often to look")
    if config.gold in config.reward:
        raise UserError(f"--gold {config.gold}: expected a reward that is not trained on")
    check_inputs([*config.data, *config.val])


@dataclass(frozen=True)
class Plan:
    """What follows from the options: an algorithm as they change it, the weight of the divergence, the steps."""

    algorithm: Algorithm
    kl_coef: float
    steps: int | None


def _plan(config: RlConfig, problems: int) -> Plan:
    from llmkit.rl.algorithms import ALGORITHMS

    algorithm = ALGORITHMS[config.algo]
    if config.overlong != "auto":
        algorithm = replace(algorithm, overlong=config.overlong)
    if config.clip_low is not None or config.clip_high is not None:
        if algorithm.clip is None:
            raise UserError(f"--clip-low, --clip-high: --algo {config.algo} does not clip")
        low, high = algorithm.clip
        algorithm = replace(algorithm, clip=(config.clip_low or low, config.clip_high or high))
    with_model = any(spec.startswith("rm:") for spec in config.reward)
    kl_coef = (KL_COEF if with_model else 0.0) if config.kl_coef is None else config.kl_coef
    if config.time_budget is not None:
        return Plan(algorithm, kl_coef, None)
    if config.max_steps is None and config.epochs is None and with_model:
        return Plan(algorithm, kl_coef, STEPS)
    return Plan(algorithm, kl_coef, config.max_steps or ceil((config.epochs or EPOCHS) * problems / config.batch_size))


def _say_plan(config: RlConfig, plan: Plan, problems: int, parameters: int) -> None:
    horizon = f"{config.time_budget:.0f} s" if plan.steps is None else f"{plan.steps} steps"
    attempts = config.batch_size * config.group
    say(
        f"{horizon} of {config.batch_size} problems of {problems}, {config.group} attempts at each: {attempts}; "
        f"{config.algo}, divergence weighs {plan.kl_coef:g}; {quantity(parameters)} parameters are trained",
        config.quiet,
    )


# ---- model, rewards, problems


def _load(config: RlConfig, device: torch.device, dtype: torch.dtype) -> Finetuning:
    """The model, which stays what it is: an assistant, or with a warning a base model."""
    from llmkit.engine.finetuning import Finetuning

    tuning = Finetuning.load_unchanged(str(config.model), device=device, dtype=dtype)
    if not tuning.is_assistant:
        if config.system is not None:
            raise UserError(f"--system: {config.model} is a base model, which knows no turns; tune it by llmkit sft")
        say(
            f"{config.model}: a base model: prompts are continued as text, and an attempt may never stop; "
            "llmkit sft teaches turns, --stop ends attempts at a text",
            config.quiet,
        )
    return tuning


def _rewards(config: RlConfig, tuning: Finetuning, stack: ExitStack) -> tuple[list[Weighted], list[Weighted]]:
    """The rewards of training, and that which is watched."""
    from llmkit.rewards import parse_rewards

    details = {
        "sandbox": config.sandbox,
        "timeout": config.tool_timeout,
        "device": config.device,
        "dtype": config.dtype,
    }
    rewards = parse_rewards(config.reward, **details)
    gold = parse_rewards([config.gold], **details) if config.gold else []
    for weighted in (*rewards, *gold):
        stack.callback(weighted.reward.close)
    return rewards, gold


def _ask(config: RlConfig, paths: Sequence[str], tuning: Finetuning, rewards: Sequence[Weighted]) -> list[AskedProblem]:
    from llmkit.rl.asking import ask

    problems = read_problems(paths, config.limit)
    asked, too_long = ask(problems, tuning, rewards, config.system, config.max_tokens)
    left_out = f"{too_long} longer than the context of {tuning.context} with --max-tokens {config.max_tokens}"
    if not asked:
        raise UserError(f"{names_of(paths)}: expected problems, found {left_out if too_long else 'none'}")
    say(f"{names_of(paths)}: {len(asked)} problems{f', {left_out} left out' if too_long else ''}", config.quiet)
    return asked
